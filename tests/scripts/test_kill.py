"""The script that kills the demo: what it compares, and that it tells what differs."""

import json
import sys

import pytest

from scripts import kill

RUN = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--output_folder") + 1])
again = out.exists()
out.mkdir(exist_ok=True)
time.sleep(0.3)
(out / "answers.csv").write_text("again" if again and "--bad" in sys.argv else "the same")
(out / "report.html").write_text(str(time.time()))
record = {"seconds": time.time(), "flags": {"output_folder": str(out)}, "files": {}}
(out / "run.json").write_text(json.dumps(record))
"""


@pytest.fixture()
def demo(tmp_path, monkeypatch):
    """A stand-in for the demo, which takes a third of a second."""
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.setattr(kill, "DEMO", [sys.executable, str(tmp_path / "run.py")])


def test_runs_that_were_killed_and_left_the_same_files_are_told_as_such(demo, capsys):
    assert kill.main(["--kills", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("done")][2:] == ["1", "2", "3"]
    assert lines[-1] == "done: 2 files, other than uninterrupted: none"


def test_files_that_differ_after_a_kill_are_told(demo, capsys):
    assert kill.main(["--kills", "6", "--bad"]) == 1
    assert "other than uninterrupted: ['answers.csv']" in capsys.readouterr().out


def test_a_run_that_fails_is_no_kill(demo, tmp_path):
    (tmp_path / "run.py").write_text("import sys; sys.exit('no')")
    with pytest.raises(RuntimeError, match="exit code 1\nno"):
        kill.main(["--kills", "1"])


def test_the_stage_is_told_by_what_the_run_has_made_since_it_started(tmp_path):
    (tmp_path / ".variants.old").mkdir()
    (tmp_path / ".journal").mkdir()
    answers = tmp_path / ".journal" / "answers.jsonl"
    answers.write_text("one")
    before = kill.hidden(tmp_path)
    assert kill.stage(tmp_path, before, "") == "loading"
    assert kill.stage(tmp_path, before, "load: 2.0 s, peak memory 9 MiB") == "routing"
    (tmp_path / ".variants.new").mkdir()
    assert kill.stage(tmp_path, before, "") == "variants"
    answers.write_text("one two")
    assert kill.stage(tmp_path, before, "") == "answers"
    (tmp_path / ".results.new").mkdir()
    assert kill.stage(tmp_path, before, "") == "results"
    (tmp_path / "run.json").write_text(json.dumps({}))
    assert kill.stage(tmp_path, before, "") == "report"
