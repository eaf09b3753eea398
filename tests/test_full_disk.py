"""No room for a file: earlier results stay whole, a sentence says so, and the same command goes on."""

import errno
import os
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from safetensors import SafetensorError

from helpers import files_of

resource = pytest.importorskip("resource", reason="there are no limits on files here")


@contextmanager
def at_most(size):
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing(target):
    """A writer that finds the disk full."""
    return patch(target, side_effect=OSError(errno.ENOSPC, "No space left on device"))


FULL = {
    "at the routing that is kept": lambda: at_most(100),
    "at the evidence that is kept": lambda: at_most(700),
    "at the variants": lambda: at_most(10_000),
    "at the answers": lambda: failing("router.run.write_submission"),
    "at the record": lambda: failing("router.run.json.dump"),
}


@pytest.mark.parametrize("full", FULL.values(), ids=FULL)
def test_a_full_disk_leaves_earlier_results_and_goes_on(full, command, capsys):
    new = ("--false_positive_rate", 0.9)
    _, reference = command("proto_route", *new, out="reference")
    _, out = command("proto_route")
    before = files_of(out, but=())
    assert files_of(out) != files_of(reference)
    capsys.readouterr()
    with full():
        code, _ = command("proto_route", *new)
    assert code == 2
    assert f"error: {out}: no room for the results" in capsys.readouterr().err
    assert files_of(out, but=()) == before
    assert command("proto_route", *new)[0] == 0
    assert files_of(out) == files_of(reference)
    assert not [path for path in out.iterdir() if path.name.startswith((".results", ".variants", ".journal"))]


NO_ROOM = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, NO_ROOM), SafetensorError(f"I/O error: {NO_ROOM} (os error 28)")]
)
def test_a_full_cache_is_named_in_place_of_the_output_folder(command, capsys, tmp_path, monkeypatch, error):
    (tmp_path / "model.gguf").write_bytes(b"model")
    monkeypatch.setattr("router.model.base.embedded_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setenv("PROTO_ROUTE_CACHE", str(tmp_path / "cache"))
    with patch("router.model.base.convert", side_effect=error):
        code, out = command("proto_route", "--base_model", "embedded")
    told = capsys.readouterr().err
    assert code == 2 and not out.exists() and "--output_folder" not in told
    assert f"error: {tmp_path / 'cache'}: no room for the converted base model ({NO_ROOM})" in told
    assert "PROTO_ROUTE_CACHE" in told and list((tmp_path / "cache").iterdir()) == []
