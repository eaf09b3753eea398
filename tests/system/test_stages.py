"""Stages: seconds add up, the memory is the process's, and what takes a while is told in the log."""

import logging
import re
import subprocess
import sys
import time

from router.system.stages import Stages


def test_a_stage_that_runs_again_adds_to_its_seconds():
    stages = Stages()
    for name in ("one", "two", "one"):
        with stages(name):
            time.sleep(0.01)
    assert list(stages.seconds) == list(stages.peak_mib) == ["one", "two"]
    assert stages.seconds["one"] >= 0.02 > 0.01 <= stages.seconds["two"]


def test_the_peak_is_that_of_the_process_so_far():
    code = """
from router.system.stages import Stages
stages = Stages()
with stages("before"):
    pass  # a child starts with its parent's peak
with stages("large"):
    bytearray(stages.peak_mib["before"] + 100 << 20)
with stages("after"):
    pass
print(*stages.peak_mib.values())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, large, after = map(int, done.stdout.split())
    assert large >= before + 100 and after == large


def test_what_takes_a_second_has_a_line_in_the_log(caplog, monkeypatch):
    monkeypatch.setattr("router.system.stages.TOLD", 0.05)
    stages = Stages()
    with caplog.at_level(logging.INFO, "router"):
        with stages("short"):
            pass
        with stages("long"):
            time.sleep(0.06)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "router.system.stages"]
    assert re.fullmatch(r"long: \d+\.\d s, peak memory \d+ MiB", line)


def test_a_gpu_has_its_own_peak(monkeypatch):
    """Of two cards that are not here."""
    used = {0: 3 << 30, 1: 1 << 30}
    assert not Stages().peak_gpu_mib
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(used))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", used.get)
    stages = Stages()
    with stages("one"):
        used[1] = 2 << 30
    assert stages.peak_gpu_mib == {"one": 5 << 10}
