"""Files: hashed as they are, kept where they should be, whole or absent; folders that are not ours stay."""

import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from router.system.errors import InputError
from router.system.files import (
    MARKER,
    cache_folder,
    is_ours,
    mark,
    read_record,
    remaking,
    remove_ours,
    replacing,
    work_folder,
)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{'a': 1}", "", "1" * 5000])
def test_what_is_no_json_is_a_value_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError):
        read_record(dict[str, object], tmp_path / "a.json")
    os.truncate(tmp_path / "a.json", 3 << 30)  # gigabytes, of holes
    with pytest.raises(ValueError, match="MiB"):
        read_record(dict[str, object], tmp_path / "a.json")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "new" / "out.csv"
    with replacing(path) as file:
        file.write("one\r\ntwo\nüber\r")
    with pytest.raises(error), replacing(path) as file:
        file.write("half of the n")
        file.flush()
        raise error
    assert path.read_bytes() == "one\r\ntwo\nüber\r".encode()
    assert [child.name for child in path.parent.iterdir()] == ["out.csv"]


def test_the_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PROTO_ROUTE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("PROTO_ROUTE_CACHE", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/proto-route")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))
    with pytest.raises(InputError, match="PROTO_ROUTE_CACHE"):
        cache_folder()


def finished(folder, change=lambda file: None):
    """A folder of ours as it was finished, and what somebody did to it since, given one of its files."""
    (folder / "one").mkdir(parents=True)
    for name in ("a", "one/b"):
        (folder / name).write_text(name)
    mark(folder, finished=True)
    change(folder / "one" / "b")


def begun(folder):
    mark(folder)
    (folder / "0").mkdir()
    (folder / "0" / "file").touch()


def linked(folder):
    begun(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


OURS = {
    "missing": lambda folder: None, "empty": Path.mkdir, "begun": begun,
    "finished": finished, "half removed": lambda of: finished(of, Path.unlink),
}  # fmt: skip
THEIRS = {
    "foreign": lambda of: (of.mkdir(), (of / "mine").touch()), "file": Path.touch, "link": linked,
    "lost": lambda of: of.symlink_to("nowhere"),
    "changed": lambda of: finished(of, lambda file: file.write_text("mine")),
    "added": lambda of: finished(of, lambda file: file.with_name("c").touch()),
    "a link added": lambda of: finished(of, lambda file: file.with_name("c").symlink_to("..")),
    "marked again": lambda of: finished(of, lambda file: (file.parent / MARKER).touch()),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*OURS, *THEIRS])
def test_only_a_folder_of_ours_is_removed(tmp_path, kind):
    (OURS | THEIRS)[kind](tmp_path / ".work.one")
    before = sorted(tmp_path.rglob("*"))
    work = work_folder(tmp_path, ".work.")  # which replaces those that killed runs left
    (work / "file").touch()
    assert work.parent == tmp_path and work.name.startswith(".work.") and is_ours(work)
    kept = [path for path in sorted(tmp_path.rglob("*")) if work not in (path, path.parent)]
    assert kept == (before if kind in THEIRS else [])
    if kind in THEIRS:
        assert not is_ours(tmp_path / ".work.one")
        remove_ours(tmp_path / ".work.one")
        assert set(before) <= set(tmp_path.rglob("*"))


@pytest.mark.parametrize("done", [False, True])
def test_what_a_kill_leaves_of_a_folder_of_ours_is_ours(tmp_path, monkeypatch, done):
    folder, seen = tmp_path / "one", []
    folder.mkdir()
    for n in range(50):
        (folder / f"file{n}").touch()
    mark(folder, finished=done)
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


def test_a_folder_is_made_anew_as_a_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "one"
    finished(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError), remaking(folder) as made:
        (made / "new").touch()
        raise OSError("No space left on device")
    assert sorted(tmp_path.rglob("*")) == before and is_ours(folder)
    with remaking(folder) as made:
        (made / "new").touch()
    assert {path.name for path in folder.iterdir()} == {".proto-route", "new"} and is_ours(folder)
    (folder / "new").write_text("mine")
    with pytest.raises(InputError, match="one"), remaking(folder):
        pytest.fail("replaced")
    assert (folder / "new").read_text() == "mine" and list(tmp_path.iterdir()) == [folder]
