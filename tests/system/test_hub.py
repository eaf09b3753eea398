"""Downloads: what is asked of the hub, what comes back, and one error for all that can go wrong."""

import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from unittest.mock import Mock

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


class Hub(BaseHTTPRequestHandler):
    """A hub with one file, whose connection drops before the file is whole; as a proxy, it refuses."""

    def do_GET(self):
        if not self.path.startswith("/api/"):
            self.do_HEAD()
            self.wfile.write(b"{")  # of a hundred bytes
            return
        file = {"type": "file", "path": "config.json", "size": 100, "oid": "0" * 40}
        about = {"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}
        body = json.dumps([file] if "/tree/" in self.path else about).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.send_header("ETag", '"0123"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()

    def do_CONNECT(self):
        self.send_error(403)

    def log_message(self, *_):
        pass


@pytest.fixture()
def served():
    """The address of such a hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture()
def client(monkeypatch, tmp_path):
    """Makes the hub's own client ask another address; it does not wait before it tries again."""

    def asks(address):
        real = huggingface_hub.snapshot_download
        how = {"endpoint": address, "cache_dir": tmp_path, "max_workers": 1}
        monkeypatch.setattr(huggingface_hub, "snapshot_download", partial(real, **how))
        huggingface_hub.close_session()  # it has read the variables of proxies

    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    yield asks
    huggingface_hub.close_session()


def test_a_dropped_connection_and_a_proxy_that_refuses_are_told(served, client, monkeypatch):
    client(served)
    with pytest.raises(HubError, match="peer closed"):
        fetch("some/model")
    monkeypatch.setenv("HTTPS_PROXY", served)
    client("https://hub.invalid")
    with pytest.raises(HubError, match="403"):
        fetch("some/model")
