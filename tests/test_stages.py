"""Stages: seconds add up, the memory is the process's, and what takes a while is told in the log."""

import logging
import re
import time

import numpy as np

from router.stages import Stages


def test_a_stage_that_runs_again_adds_to_its_seconds():
    stages = Stages()
    for name in ("one", "two", "one"):
        with stages(name):
            time.sleep(0.01)
    assert list(stages.seconds) == list(stages.peak_mib) == ["one", "two"]
    assert stages.seconds["one"] >= 0.02 > 0.01 <= stages.seconds["two"]


def test_the_peak_is_no_less_than_what_was_filled():
    stages = Stages()
    with stages("before"):
        pass
    with stages("filled"):
        np.ones((2 * stages.peak_mib["before"], 1 << 17))  # twice the memory so far, in float64
    assert stages.peak_mib["filled"] >= 2 * stages.peak_mib["before"]


def test_what_takes_a_second_has_a_line_in_the_log(caplog, monkeypatch):
    monkeypatch.setattr("router.stages.TOLD", 0.05)
    stages = Stages()
    with caplog.at_level(logging.INFO, "router"):
        for name, seconds in (("short", 0.0), ("long", 0.06)):
            with stages(name):
                time.sleep(seconds)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "router.stages"]
    assert re.fullmatch(r"long: 0\.\d s, peak memory \d+ MiB", line)
