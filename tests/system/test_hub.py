"""Downloads: what is asked of the hub, what comes back, and one error for all that can go wrong."""

from importlib import import_module
from types import SimpleNamespace
from unittest.mock import Mock, patch

import huggingface_hub
import pytest
from huggingface_hub import errors

from router.system.hub import HubError, fetch

# What the hub's client speaks HTTP with: httpx or httpx2, by its version.
CLIENT = import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
ANSWER = SimpleNamespace(headers={}, request=None, status_code=404)
ERRORS = {
    "no such id": errors.HFValidationError("Repo id must be in the form\n'namespace/name'"),
    "not in the cache": errors.LocalEntryNotFoundError("Cannot find\nsome file"),
    "no such repository": errors.RepositoryNotFoundError("404 Client Error.\n\nLog in", response=ANSWER),
    "no network": ConnectionError("unreachable"),
    "a dropped connection": CLIENT.RemoteProtocolError("peer closed"),
    "a proxy that refuses": CLIENT.ProxyError("403 Forbidden"),
    "no words": TimeoutError(),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_whatever_goes_wrong_is_one_line(monkeypatch, kind):
    error = ERRORS[kind]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    with pytest.raises(HubError) as caught:
        fetch("some/model", ["*"], where="--flag some/model: no such folder")
    first = str(error).partition("\n")[0] or "TimeoutError"
    said = str(caught.value)
    assert said.startswith(f"--flag some/model: no such folder, and the hub could not give it ({first}")
    assert "\n" not in said and said.endswith("pass its folder")
    assert caught.value.__cause__ is error
    mistake = KeyError("a mistake in the code")  # is none of the hub's errors
    with patch.object(huggingface_hub, "snapshot_download", side_effect=mistake), pytest.raises(KeyError):
        fetch("some/model", ["*"])


@pytest.mark.parametrize("spec", ["some/model", "not/a/repository", "some/model@nothing"])
def test_what_is_not_in_the_cache_is_refused(monkeypatch, tmp_path, spec):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError):
        fetch(spec, ["*"], local_only=True)
