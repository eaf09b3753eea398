"""The table of the speed benchmark says what was measured, turn by turn, and whether it is as aimed at."""

import pytest

from scripts.bench import runner, speed

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 100,
}  # fmt: skip


@pytest.fixture()
def known(tmp_path, monkeypatch):
    """Three turns; in one the static average failed."""
    monkeypatch.setattr(speed, "FOLDER", tmp_path)
    stages = {"load": 1.0, "probe": 2.0}
    for number, (routed, static) in enumerate([(30.0, 10.0), (10.0, None), (60.0, 30.0)]):
        found = {"seconds": routed, "stages": stages, "peak_mib": 1300, "variants": 9, "queries": 807}
        runner.keep(tmp_path, ("routed 22", str(number)), found)
        if static:
            runner.keep(tmp_path, ("static", str(number)), {"seconds": static, "peak_mib": 1000})
        runner.keep(tmp_path, ("probing", str(number)), {"seconds": 1.0 + number / 8, "pass": 1.0})
    return speed.known()


def test_a_ratio_is_of_measurements_that_took_turns(known):
    assert speed.ratios(known, "routed 22", "static") == [3, 2]
    assert speed.ratios(known, "routed 22", "static", "peak_mib") == [1.3, 1.3]
    assert speed.ratios(known, "routed 22", "demo") == []


def test_a_line_says_whether_the_median_keeps_the_limit(known):
    probe, run = speed.lines(known)  # nothing else is measured
    assert probe.row().endswith("| at most 1.15x | 1.12x (1.00 to 1.25) | met |")
    assert run.row().endswith("| at most 1.25x | 2.50x (2.00 to 3.00) | missed |")
    assert "807 queries" in run.what
    _, text = speed.by_stage(known)
    assert "load 1.0, probe 2.0" in text and "1,300 MiB" in text


def test_the_probe_and_a_pass_are_timed_on_a_layer_of_another_shape():
    found = speed.mistral(**TINY)
    assert found["seconds"] > 0 and found["pass"] > 0
