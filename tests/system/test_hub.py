"""Downloads: what is asked of the hub, what comes back, and one error for all that can go wrong."""

from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from router.system.hub import HubError, fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture()
def asked(monkeypatch, tmp_path):
    """What the hub's client was asked for."""
    calls = []

    def download(name, **how):
        calls.append((name, how))
        return str(tmp_path / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


@pytest.mark.parametrize(
    ("spec", "revision"), [("some/model", None), ("some/model@v2", "v2"), (f"some/model@{COMMIT}", COMMIT)]
)
def test_a_repository_has_its_folder_id_and_commit(asked, tmp_path, spec, revision):
    assert fetch(spec, ("*.json",)) == (tmp_path / "snapshots" / COMMIT, "some/model", COMMIT)
    fetch(spec, local_only=True, without=("a*",))
    network = {"allow_patterns": ["*.json"], "ignore_patterns": None, "local_files_only": False}
    cache = {"allow_patterns": None, "ignore_patterns": ["a*"], "local_files_only": True}
    assert asked == [("some/model", {"revision": revision} | how) for how in (network, cache)]


ANSWER = SimpleNamespace(headers={}, request=None, status_code=404)
ERRORS = {
    "no such id": (HFValidationError("Repo id must be in the form\n'namespace/name'"), "Repo id must be in"),
    "not in the cache": (LocalEntryNotFoundError("Cannot find\nsome file"), "Cannot find"),
    "no such repository": (RepositoryNotFoundError("404 Client Error.\n\nLog in", response=ANSWER), "404 Cl"),
    "a drop": (httpx.RemoteProtocolError("peer closed connection"), "peer closed connection"),
    "a proxy": (httpx.ProxyError("403 Forbidden"), "403"),
    "no network": (ConnectionError("unreachable"), "unreachable"),
    "no words": (TimeoutError(), "TimeoutError"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_whatever_goes_wrong_is_one_line(monkeypatch, kind):
    error, reason = ERRORS[kind]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    with pytest.raises(HubError) as caught:
        fetch("some/model")
    assert str(caught.value).startswith(reason) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("spec", ["some/model", "not/a/repository", "some/model@nothing"])
def test_what_is_not_in_the_cache_is_refused(monkeypatch, tmp_path, spec):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError):
        fetch(spec, local_only=True)


def test_other_errors_are_not_the_hubs(monkeypatch):
    mistake = Mock(side_effect=KeyError("a mistake in the code"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mistake)
    with pytest.raises(KeyError):
        fetch("some/model")
