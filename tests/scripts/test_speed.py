"""The tables of the speed benchmark say what was measured, and whether it is what was aimed at."""

from dataclasses import replace

import pytest

from helpers import write_tiny_library
from router.model.base import load_base
from router.submission import GENERATION, MULTIPLE_CHOICE, Query
from scripts.bench import libraries, runner
from scripts.bench.speed import measures, tables


def known(**jobs):
    return {
        name.replace("_", " "): [
            {"seconds": s, "queries": 100, "repetition": n} for n, s in enumerate(each) if s is not None
        ]
        for name, each in jobs.items()
    }


def test_a_ratio_is_the_median_of_what_ran_in_turns():
    found = tables.ratio(
        known(slow=[30, 10, 50], fast=[10, 10, 10]), "slow", "fast", "a", "b", "at most 2x", 2
    )
    assert (found.value, found.low, found.high, found.met) == (3, 1, 5, False)
    odd = tables.ratio(  # one that failed leaves its partner alone
        known(slow=[None, 20, 30], fast=[1, 10, None]), "slow", "fast", "a", "b", "at most 2x", 2
    )
    assert (odd.value, odd.low, odd.high) == (2, 2, 2)
    assert found.row() == "| a | b | at most 2x | 3.00x (1.00 to 5.00) | missed |"


@pytest.mark.parametrize(("least", "limit", "met"), [(True, 3, True), (True, 3.1, False), (False, 3, True)])
def test_a_target_is_a_floor_or_a_ceiling(least, limit, met):
    found = tables.ratio(known(one=[6], other=[2]), "one", "other", "a", "b", "t", limit, least)
    assert found.met == met and "(" not in found.row()


def test_a_sample_of_the_queries_is_scaled_to_all():
    found = tables.ratio(known(kit=[10], ours=[20]), "kit", "ours", "a", "b", "t", 5, True, factor=8)
    assert found.value == 4


def test_operators_are_grouped_by_kind():
    operators = {"aten::mm": 3.0, "mkldnn::_linear_pointwise": 2.0, "aten::_softmax": 1.0, "aten::mul": 4.0}
    shares = tables.matmuls({"matmul_share 8": [{"seconds": 20.0, "operators": operators}]})
    assert shares == {
        "matrix products": 0.25, "aten::mul": 0.2, "attention": 0.05,
    }  # fmt: skip
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_choices_are_compared_with_those_of_whole_prompts():
    tops = {"128": [1, 2, 3, 3], "256": [1, 2, 3, 4], "512": [1, 2, 3, 4], "0": [1, 2, 3, 4]}
    found = {f"truncation {n}": [{"top": row, "queries": 4}] for n, row in tops.items()}
    lines = tables._truncation(found)
    assert lines[2] == "| 128 | 3 of 4 |" and lines[-1] == "| all | 4 of 4 |"


def test_of_calibration_only_what_a_second_run_takes_is_counted():
    runs = [{"seconds": 10.0, "stages": {"calibrate": 60.0}}, {"seconds": 12.0, "stages": {"calibrate": 2.0}}]
    assert tables._with_lookup(runs) == [12.0, 14.0]


def test_a_target_that_is_not_measured_has_no_line():
    one = [{"seconds": 2.0, "queries": 400}, {"seconds": 3.0, "queries": 400}]
    other = [{"seconds": 1.0, "queries": 400}, {"seconds": 2.0, "queries": 400}]
    lines = list(tables.targets({"decode arrow": one, "decode merged": other}))
    assert lines == []  # the lines of a group stand together
    probed = list(tables.targets({"probing 100": [{"ratios": [1.1, 1.3, 1.15]}]}))
    assert [(line.what, line.value, line.met) for line in probed] == [("probe", 1.15, True)]


def test_32_layers_cost_what_one_and_five_say():
    def measured(layers):  # a second for what is outside of layers, one for each of them
        seconds = dict.fromkeys(("prototypes", "variant", "probe", "read", "write"), 1.0 + layers)
        return [
            {
                **seconds,
                "linear": 10 * layers,
                "head": 7,
                "gemm_flops": tables.A6000_FLOPS / 2,
                "bytes": tables.A6000_BYTES / 4,
            }
        ]

    found = {"shape 1": measured(1), "shape 5": measured(5)}
    seconds = {
        cells[0]: cells[2:]
        for cells in (line.strip("| ").split(" | ") for line in tables._mistral(found)[2:7])
    }
    assert seconds["prototypes"] == ["33", "33"]  # on the CPU in both
    assert seconds["probe"] == ["1693725", "846862"]  # 51325 tokens; the card multiplies twice as fast
    assert seconds["writing"] == ["46200", "11550"]  # 350 / 16 batches, 64 steps; four times as fast


def test_repetitions_are_read_back_by_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    for number, seconds in ((10, 6.0), (2, 5.0), (0, 4.0)):
        runner.keep(tmp_path, ("routed", "22", "1", str(number)), {"seconds": seconds})
    runner.keep(tmp_path, ("floor", "0"), {"peak_mib": 9})
    assert tables.known() == {
        "routed 22 1": [{"seconds": s, "repetition": n} for n, s in ((0, 4.0), (2, 5.0), (10, 6.0))],
        "floor": [{"peak_mib": 9, "repetition": 0}],
    }


def test_tables_are_written_as_far_as_they_are_measured(tmp_path, monkeypatch, capsys):
    page = tmp_path / "speed.md"
    page.write_text("<!-- speed -->\n<!-- /speed -->\n<!-- truncation -->\n<!-- /truncation -->\n")
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "cells")
    monkeypatch.setattr(tables, "PAGE", page)
    for tokens in ("128", "256", "512", "0"):
        found = {"seconds": 1.0, "top": [1], "queries": 1}
        runner.keep(tmp_path / "cells", ("truncation", tokens, "0"), found)
    before = page.read_text()
    tables.write("mistral")
    assert page.read_text() == before
    tables.write()
    assert "| all | 1 of 1 |\n<!-- /truncation -->" in page.read_text()
    assert "no table mistral yet" in capsys.readouterr().out


def test_every_table_has_its_place_on_the_page(monkeypatch):
    """With whatever is measured there, `write` finds the lines to write between."""
    names = []
    monkeypatch.setattr(tables, "known", lambda: {})
    for name in ("_stages", "_truncation", "_mistral"):
        monkeypatch.setattr(tables, name, lambda _: ["|"])
    monkeypatch.setattr(tables, "insert", lambda page, name, lines: names.append(name))
    tables.write()
    text = tables.PAGE.read_text("utf-8")
    assert names == ["speed", "stages", "truncation", "mistral"]
    assert all(f"<!-- {name} -->\n" in text and f"<!-- /{name} -->" in text for name in names)


@pytest.fixture()
def tiny(tiny_base, tmp_path, monkeypatch):
    """The measurements on the tiny model, its tokenizer with the token that ends no text, and few queries."""

    def load(spec, device="cpu", dtype="float32"):
        base = load_base(str(tiny_base), device, "float32")
        base.tokenizer.add_tokens(["<file_sep>"])
        return base

    asked = [
        Query(str(n), "hello " * (n + 1), *((GENERATION,) if n % 2 else (MULTIPLE_CHOICE, ("yes", "no"))))
        for n in range(18)
    ]
    monkeypatch.setattr(measures, "load_base", load)
    monkeypatch.setattr(measures, "LIBRARY", write_tiny_library(tmp_path / "library"))
    monkeypatch.setattr(measures, "LARGEST", 6)
    monkeypatch.setattr(measures, "NEW_TOKENS", 4)
    monkeypatch.setattr(measures, "queries", lambda every=1: asked[::every])
    monkeypatch.setattr(libraries, "FOLDER", tmp_path / "made")


@pytest.mark.parametrize(
    "job",
    [
        "static 4", "kit 8", "decode merged", "decode beside", "decode spectr", "gate 50 4",
        "merge ours embedded 8", "merge peft embedded 8", "library_prototypes 5",
    ],
)  # fmt: skip
def test_measurements_are_numbers_above_zero(tiny, job):
    found = measures.run(job.split())
    assert found and all(value > 0 for value in found.values())
    if job.startswith("decode"):
        assert found["tokens"] == 16 * 4  # nothing ends early


def test_the_probe_is_measured_against_a_pass_of_the_same_prompts(tiny):
    found = measures.run(["probing", "9"])
    assert found["tokens"] > 9 and len(found["ratios"]) == 3
    assert min(found["ratios"]) > 0 and found["seconds"] > 0 and found["read"] > 0


def test_answers_that_differ_between_the_ways_to_apply_are_counted(tiny, monkeypatch):
    adapters = measures.library(3)
    monkeypatch.setattr(measures, "library", lambda size: [replace(adapters[0], name="chain_sum")])
    found = measures.run(["same", "6"])
    assert found["differ"] == 0 and found["queries"] == 3 and found["merged"] > 0 and found["beside"] > 0


def test_of_a_routed_run_calibration_is_not_counted(tiny, monkeypatch):
    monkeypatch.setattr(measures, "timed", lambda work: (100.0, work()))
    found = measures.run(["routed", "5", "6"])  # two of the adapters are copies
    assert found["seconds"] == 100 - found["stages"]["calibrate"] < 100
    assert found["queries"] == 3 and 1 <= found["variants"] <= 3
