"""The summary of a run says what its record holds; `run.json` itself is checked in test_main.py."""

from router.pipeline.record import SHOWN, Record, summary
from router.system.files import typed

RECORD = {
    "method": "proto_route", "versions": {}, "peak_mib": {},
    "base": {"name": "some/base", "sha256": "0", "dtype": "float32"},
    "adapters": {"one": {"sha256": "1"}, "two": {"sha256": "2"}},
    "seconds": {"load": 1.25, "predict": 60.0}, "low_margin": 1,
    "flags": {"dataset_filepaths": ["data/a.csv", "b.csv"], "output_folder": "out"},
    "variants": [
        {"folder": None, "queries": 1, "weights": {"base": 1.0}},
        {"folder": "variants/1", "queries": 4, "weights": {"one": 0.2, "two": 0.75, "base": 0.05}},
    ],
}  # fmt: skip


def test_a_summary_has_the_largest_variant_first():
    lines = summary(typed(Record, RECORD)).splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["1", "4", "two", "0.75,", "one", "0.20,", "base", "0.05"], ["0", "1", "base", "1.00"],
    ]  # fmt: skip
    assert lines[4].startswith("1 query") and "61 seconds" in lines[5] and "a.csv, b.csv" in lines[6]
    many = [{"folder": None, "queries": 20 - n, "weights": {"base": 1.0}} for n in range(SHOWN + 3)]
    lines = summary(typed(Record, RECORD | {"variants": many})).splitlines()
    assert f" {sum(variant['queries'] for variant in many[SHOWN:])} " in lines[2 + SHOWN]
    bare = {key: RECORD[key] for key in ("method", "versions", "peak_mib", "seconds", "flags")}
    assert len(summary(typed(Record, bare)).splitlines()) == 2  # of a method that does not route


def test_a_summary_names_adapters_by_the_form_they_were_trained_in():
    homes = {"one": "the chat template", "two": "Alpaca's frame", "three": "the chat template"}
    lines = summary(typed(Record, RECORD | {"homes": homes})).splitlines()
    told = [line for line in lines if line.startswith("trained in")]
    assert [line.rpartition(": ")[2] for line in told] == ["one, three", "two"]
    assert "the chat template" in told[0] and "Alpaca's frame" in told[1]
