"""Files: hashed as they are, kept where they should be, whole or absent; folders that are not ours stay."""

import os
from pathlib import Path

import pytest

from helpers import OURS, THEIRS
from router.system.errors import InputError
from router.system.files import (
    cache_folder,
    is_ours,
    read_record,
    remove_ours,
    replacing,
    work_folder,
)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{'a': 1}", "", "1" * 5000])
def test_what_is_no_json_is_a_value_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError):
        read_record(dict[str, object], tmp_path / "a.json")


def test_json_of_gigabytes_is_a_value_error(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(3 << 30)  # of holes
    with pytest.raises(ValueError, match="MiB"):
        read_record(dict[str, object], tmp_path / "a.json")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "new" / "out.csv"
    with replacing(path) as file:
        file.write("old")
    with pytest.raises(error), replacing(path) as file:
        file.write("half of the n")
        file.flush()
        raise error
    assert path.read_text() == "old"
    assert [child.name for child in path.parent.iterdir()] == ["out.csv"]


def test_a_file_has_the_line_ends_that_were_written(tmp_path):
    with replacing(tmp_path / "out.txt") as file:
        file.write("one\r\ntwo\nüber\r")
    assert (tmp_path / "out.txt").read_bytes() == "one\r\ntwo\nüber\r".encode()
    assert (tmp_path / "out.txt").stat().st_mode & 0o777 == 0o644


def test_the_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PROTO_ROUTE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("PROTO_ROUTE_CACHE", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/proto-route")


def test_without_a_home_the_variable_is_asked_for(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PROTO_ROUTE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(InputError, match="set PROTO_ROUTE_CACHE"):
        cache_folder()


@pytest.mark.parametrize("kind", [*OURS, *THEIRS])
def test_only_a_folder_of_ours_is_removed(tmp_path, kind):
    (OURS | THEIRS)[kind](tmp_path / "one")
    before = sorted(tmp_path.rglob("*"))
    assert is_ours(tmp_path / "one") == (kind in OURS)
    remove_ours(tmp_path / "one")
    assert sorted(tmp_path.rglob("*")) == (before if kind in THEIRS else [])


@pytest.mark.parametrize("kind", [*OURS, *THEIRS])
def test_a_new_folder_replaces_those_that_killed_runs_left(tmp_path, kind):
    (OURS | THEIRS)[kind](tmp_path / ".work.one")
    before = sorted(tmp_path.rglob("*"))
    work = work_folder(tmp_path, ".work.")
    assert work.parent == tmp_path and work.name.startswith(".work.") and is_ours(work)
    (work / "file").touch()
    assert is_ours(work)
    kept = [path for path in sorted(tmp_path.rglob("*")) if work not in (path, path.parent)]
    assert kept == (before if kind in THEIRS else [])


def test_what_a_kill_leaves_of_a_folder_of_ours_is_ours(tmp_path, monkeypatch):
    folder, seen = tmp_path / "one", []
    OURS["marked"](folder)
    for n in range(50):
        (folder / f"file{n}").touch()
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path))))  # the mark first

    def watched(call):
        def instead(*args, **how):
            seen.append(is_ours(folder))
            return call(*args, **how)

        return instead

    monkeypatch.setattr(os, "unlink", watched(os.unlink))
    monkeypatch.setattr(os, "rmdir", watched(os.rmdir))
    remove_ours(folder)
    assert len(seen) > 50 and all(seen) and not folder.exists()
