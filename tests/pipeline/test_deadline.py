"""A run that must end in time ends in time, with a full submission; the clock is simulated."""

import json
import time

import pytest

from helpers import ROWS, before_batches, read_table
from router.model.apply import Merged
from router.pipeline.context import RESERVE, Deadline
from router.pipeline.steps import route


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture()
def clock(monkeypatch):
    """The clock of the next run; what a batch takes is set by `paced`."""
    clock = Clock()
    called = time.monotonic()

    def made(minutes, began):
        assert called < began <= time.monotonic()  # before the imports
        return Deadline(minutes, clock)

    monkeypatch.setattr("router.run.Deadline", made)
    return clock


@pytest.fixture()
def paced(monkeypatch, clock):
    """Lets a batch take so many seconds; returns the batches that were answered."""

    def pace(seconds):
        batches = []

        def answered(batch):
            batches.append(batch)
            clock.now += seconds

        before_batches(monkeypatch, answered)
        return batches

    return pace


def told(out):
    return json.loads((out / "run.json").read_text())["time_limit"]


@pytest.mark.parametrize("method", ["base", "proto_route", "average"])
def test_past_the_deadline_the_rest_is_unknown(command, paced, clock, method):
    batches = paced(50)
    code, out = command(method, "--batch_size", 1, "--time_limit", 2)
    rows, cut = read_table(out / "queries.csv"), told(out)
    assert code == 0 and [row["id"] for row in rows] == [row[0] for row in ROWS]
    assert cut["unanswered"] == len(ROWS) - len(batches) > 0
    assert sum(row["prediction"] == "unknown" for row in rows) == cut["unanswered"]
    assert clock.now <= 120 * (1 - RESERVE) + 50  # one batch may run over
    clock.now = 0
    _, plain = command(method, "--batch_size", 1, out="plain")
    clock.now = 0
    asked = len(batches)
    _, enough = command(method, "--batch_size", 1, "--time_limit", 60)  # goes on where it stood
    assert told(enough) == {"minutes": 60, "unanswered": 0} and not (enough / ".journal").exists()
    assert len(batches) - asked == cut["unanswered"]
    assert (enough / "queries.csv").read_bytes() == (plain / "queries.csv").read_bytes()


def test_what_costs_least_is_answered_first_and_no_variant_is_read_in_vain(
    command, paced, clock, monkeypatch
):
    paced(50)
    read, plain = [], Merged.activate
    monkeypatch.setattr(
        Merged, "activate", lambda self, folder: (read.append(folder), plain(self, folder))[1]
    )
    _, out = command("average", "--batch_size", 1, "--time_limit", 2)
    answers = {row["id"]: row["prediction"] for row in read_table(out / "queries.csv")}
    lengths = {row[0]: len(row[1]) for row in ROWS if row[2] == "generation"}
    done = {own for own in answers if answers[own] != "unknown"}
    assert done == {"m1", "m2", min(lengths, key=lengths.get)}
    clock.now = 0
    assert command("base")[0] == 0  # what was cut is no unfinished run
    clock.now = 0
    _, out = command(
        "proto_route", "--batch_size", 1, "--time_limit", 1.8, "--false_positive_rate", 0.99, out="third"
    )
    answers = {row["id"]: row["prediction"] for row in read_table(out / "queries.csv")}
    assert "unknown" not in (answers["m1"], answers["m2"]) and told(out)["unanswered"]
    clock.now, read[:] = 0, []
    _, out = command("proto_route", "--batch_size", 1, "--time_limit", 0.9, out="other")
    assert told(out)["unanswered"] == len(ROWS) - 2 and not any(read)  # what the base model answers, first


def test_a_limit_shorter_than_routing_keeps_the_routing(command, paced, clock, monkeypatch, capsys):
    batches = paced(1)
    with monkeypatch.context() as patch:
        patch.setattr("router.run.route", lambda *of: (route(*of), setattr(clock, "now", 61))[0])
        code, out = command("proto_route", "--time_limit", 1)
    assert code == 2 and batches == [] and "--time_limit 1: " in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {".journal"}
    clock.now = 0
    monkeypatch.setattr("router.pipeline.fitted.probe", lambda *_: pytest.fail("routed again"))
    assert command("proto_route", "--time_limit", 2)[0] == 0 and batches


def test_what_the_limit_cut_is_told_after_a_kill_too(command, paced, clock, monkeypatch):
    batches, cut = paced(100), ("base", "--batch_size", 1, "--time_limit", 2)  # enough for two batches
    with monkeypatch.context() as patch:
        patch.setattr("router.run._commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(*cut)[0] == 130
    code, out = command(*cut)
    assert code == 0 and len(batches) == 4 and told(out)["unanswered"] == len(ROWS) - 4
