"""No room for a file: earlier results stay whole, a sentence says so, and the same command goes on."""

import errno
from contextlib import contextmanager
from unittest.mock import patch

import pytest

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
def test_a_full_disk_leaves_earlier_results_and_the_same_command_goes_on(full, command, capsys):
    new = ("--false_alarm", 0.9)
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
