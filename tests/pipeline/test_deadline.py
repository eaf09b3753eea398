"""A run that must end in time ends in time, with a full submission; the clock is simulated."""

import json
import time

import pytest

from helpers import ROWS, read_table
from router.model import answer as module
from router.pipeline.deadline import FEWEST, RESERVE, Deadline
from router.pipeline.steps import route


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture()
def clock(monkeypatch):
    """The clock of the next run; what a batch takes is set by `seconds`."""
    clock = Clock()
    called = time.monotonic()

    def made(minutes, began):
        assert called < began <= time.monotonic()  # before the imports
        return Deadline(minutes, clock)

    monkeypatch.setattr("router.run.Deadline", made)
    return clock


@pytest.fixture()
def paced(monkeypatch, clock):
    """Lets a batch take so many seconds, and one more for each new token that it may have."""
    plain, limits = module.if_it_fits, []

    def pace(seconds):
        def slow(way, batch):
            limits.append(way.keywords["limit"])
            clock.now += seconds + way.keywords["limit"]
            return plain(way, batch)

        monkeypatch.setattr(module, "if_it_fits", slow)
        return limits

    return pace


def told(out):
    return json.loads((out / "run.json").read_text())["time_limit"]


def test_a_run_with_time_enough_is_not_cut(command, paced):
    limits = paced(1)
    code, out = command("base", "--batch_size", 1, "--time_limit", 60)
    assert code == 0 and limits == [6] * len(ROWS)
    assert told(out) == {"minutes": 60, "shortened": 0, "unanswered": 0}
    _, plain = command("base", "--batch_size", 1, out="plain")
    assert (out / "queries.csv").read_bytes() == (plain / "queries.csv").read_bytes()


def test_answers_get_shorter_before_any_is_left_out(command, paced, clock, capsys):
    limits = paced(0)
    code, out = command("base", "--batch_size", 1, "--max_gen_len", 100, "--time_limit", 6)
    assert code == 0 and limits[0] == 100 and FEWEST <= min(limits) < 100
    assert clock.now <= 6 * 60
    cut = told(out)
    assert cut["shortened"] > 0 and cut["unanswered"] == 0
    said = f"o end within 6 minutes, queries with a shorter answer: {cut['shortened']}, "
    assert said in capsys.readouterr().out and said in (out / "report.html").read_text()


@pytest.mark.parametrize("method", ["base", "proto_route", "average"])
def test_past_the_deadline_the_rest_is_unknown(command, paced, clock, method):
    limits = paced(50)
    code, out = command(method, "--batch_size", 1, "--time_limit", 2)
    rows = read_table(out / "queries.csv")
    assert code == 0 and [row["id"] for row in rows] == [row[0] for row in ROWS]
    cut = told(out)
    assert cut["unanswered"] == len(ROWS) - len(limits) > 0
    assert sum(row["prediction"] == "unknown" for row in rows) >= cut["unanswered"]
    assert clock.now <= 120 * (1 - RESERVE) + 56  # one batch may run over


def test_a_limit_shorter_than_routing_keeps_the_routing(command, paced, clock, monkeypatch, capsys):
    limits = paced(1)
    with monkeypatch.context() as patch:
        patch.setattr("router.run.route", lambda *of: (route(*of), setattr(clock, "now", 61))[0])
        code, out = command("proto_route", "--time_limit", 1)
    assert code == 2 and limits == [] and "--time_limit 1: " in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {".journal"}
    clock.now = 0
    monkeypatch.setattr("router.pipeline.fitted.probe", lambda *_: pytest.fail("routed again"))
    assert command("proto_route", "--time_limit", 1)[0] == 0 and limits


def test_what_the_limit_cut_is_counted_after_a_kill_too(command, paced, clock, monkeypatch):
    paced(0)
    cut = ("base", "--batch_size", 1, "--max_gen_len", 100, "--time_limit", 6)
    with monkeypatch.context() as patch:
        patch.setattr("router.run._commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(*cut)[0] == 130
    clock.now = 0
    monkeypatch.setattr(module, "generate", lambda *_: pytest.fail("asked again"))
    code, out = command(*cut)
    assert code == 0 and told(out)["shortened"] > 0


def test_without_a_pace_all_is_allowed_and_past_the_end_nothing():
    clock = Clock()
    clock.now = 100
    deadline = Deadline(1, clock, began=100)  # 57 seconds to answer in
    deadline.begin(1000)
    deadline.skip(900)  # answered before a kill, which says nothing of the pace
    assert deadline.new_tokens(64) == 64  # nothing is known yet
    clock.now = 156.9
    deadline.note(5)
    assert deadline.new_tokens(64) == FEWEST and deadline.new_tokens(4) == 4
    clock.now = 157
    assert deadline.new_tokens(64) == 0


@pytest.mark.parametrize("slow", [2, 4])
def test_a_steady_pace_needs_one_length_and_leaves_nobody_out(slow):
    """100 equal batches that at full length would take so many times what there is."""
    clock = Clock()
    deadline = Deadline(10, clock)
    deadline.begin(100)
    lengths = []
    for _ in range(100):
        lengths.append(deadline.new_tokens(64))
        clock.now += slow * 5.7 * lengths[-1] / 64
        deadline.note(1, lengths[-1] / 64)
    assert min(lengths) > 0 and clock.now <= 10 * 60
    assert max(lengths[1:]) - min(lengths[1:]) <= 3 and lengths[50] == pytest.approx(64 / slow, abs=2)
