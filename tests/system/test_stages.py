"""Stages: seconds add up, the memory is the process's, and what takes a while is told in the log."""

import time

from router.system.stages import Stages


def test_a_stage_that_runs_again_adds_to_its_seconds(monkeypatch):
    used = {0: 3 << 30, 1: 1 << 30}  # of two cards that are not here
    assert not Stages().peak_gpu_mib
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(used))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", used.get)
    stages = Stages()
    for name in ("one", "two", "one"):
        with stages(name):
            time.sleep(0.01)
    assert list(stages.seconds) == list(stages.peak_mib) == ["one", "two"]
    assert 0 < stages.peak_mib["two"] <= stages.peak_mib["one"]  # a process's peak never falls
    assert stages.seconds["one"] >= 0.02 > 0.01 <= stages.seconds["two"]
    assert stages.peak_gpu_mib == {"one": 4 << 10, "two": 4 << 10}
