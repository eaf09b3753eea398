"""Damaged files are read or refused at every door, and the fuzzer notices where they are not."""

import sys
import time
from pathlib import Path

import pytest

from router.errors import InputError
from scripts import fuzz
from scripts.fuzz_doors import DOORS, Door, queries

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the fuzzer limits a case's memory as Linux alone does (/proc, RLIMIT_AS)"
)


@pytest.mark.parametrize("name", DOORS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    assert [what for _, what in fuzz.fuzz(name, 200, out=tmp_path)] == []
    assert list(tmp_path.iterdir()) == []


def half_written(path):
    path.with_suffix(".part").touch()


def written_and_refused(path):
    path.write_text("less")
    raise InputError("no")


BAD = {
    "an error": (lambda path: {}["key"], "KeyError"),
    "a hang": (lambda path: time.sleep(60), "TooLong"),
    "memory": (lambda path: bytearray(2 * fuzz.BYTES), "MemoryError"),
    "half": (half_written, "AssertionError"),
    "a change": (written_and_refused, "AssertionError"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_comes_through_is_told_and_can_be_replayed(tmp_path, monkeypatch, kind):
    bad, cause = BAD[kind]
    sound = []

    def read(path):
        sound.append(path.read_bytes())
        return bad(path) if path.read_bytes() != sound[0] else None

    monkeypatch.setitem(DOORS, "made", Door(queries, "queries.csv", read))
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    ((folder, what),) = fuzz.fuzz("made", 1, out=tmp_path)
    assert folder == tmp_path / "made-0-0" and what.startswith(f"queries.csv: {cause} in ")
    kept = fuzz.contents(folder)
    assert kept.keys() == {"queries.csv"} and kept["queries.csv"] not in sound[:1]
    with pytest.raises(BaseException) as caught:
        fuzz.replay(folder)
    assert caught.typename == cause and fuzz.contents(folder) == kept
    again = fuzz.fuzz("made", 1, out=Path(tmp_path, "again"))
    assert [fuzz.contents(folder) for folder, _ in again] == [kept]
