"""What is missing is run, in processes of their own, and nothing twice; on a benchmark of three lines."""

import os

import pytest

from scripts.bench import runner

BENCH = """
import os, sys
from pathlib import Path
from scripts.bench import runner
*_, word, number = sys.argv
with Path("log").open("a") as log:
    log.write(f"{word} {number}\\n")
if word == "broken":
    sys.exit(3)
runner.keep(Path("cells"), (word, number), [word, os.getpid(), os.environ.get("OMP_NUM_THREADS")])
"""


@pytest.fixture()
def bench(tmp_path, monkeypatch, request):
    (tmp_path / "tiny_bench.py").write_text(BENCH)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(request.config.rootpath)]))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cells"


def filled(bench, *cells, **how):
    return runner.fill("tiny_bench", bench, [tuple(cell.split()) for cell in cells], **how)


def test_cells_run_in_order_each_in_its_own_process_and_not_again(bench):
    assert filled(bench, "one 0", "two 0", "one 1") == []
    found = dict(runner.kept(bench))
    assert list(found) == [("one", "0"), ("one", "1"), ("two", "0")]
    assert len({pid for _, pid, _ in found.values()} | {os.getpid()}) == 4
    (bench / "one" / "0.json").unlink()
    assert filled(bench, "one 0", "two 0", "one 1") == []
    assert (bench.parent / "log").read_text().splitlines() == ["one 0", "two 0", "one 1", "one 0"]


def test_what_fails_is_named_leaves_nothing_and_holds_nothing_up(bench):
    assert filled(bench, "broken 0", "one 0") == [("broken", "0")]
    assert [cell for cell, _ in runner.kept(bench)] == [("one", "0")]


def test_several_at_a_time_share_the_cores(bench, monkeypatch):
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 6)
    filled(bench, "one 0", "two 0", jobs=2)
    filled(bench, "three 0")
    threads = {word: threads for _, (word, _, threads) in runner.kept(bench)}
    assert threads == {"one": "3", "two": "3", "three": None}
