"""The summary of a run says what its record holds; `run.json` itself is checked in test_main.py."""

import re

from router.pipeline.record import SHOWN, Record, summary
from router.system.files import typed

RECORD = {
    "method": "proto_route", "versions": {}, "peak_mib": {},
    "seconds": {"load": 1.25, "predict": 60.0},
    "flags": {"dataset_filepaths": ["data/a.csv", "b.jsonl"], "output_folder": "out"},
}  # fmt: skip


def test_a_summary_has_the_largest_variants_first_and_names_homes():
    few = [
        {"folder": None, "queries": 1, "weights": {"base": 1.0}},
        {"folder": "variants/1", "queries": 4, "weights": {"one": 0.2, "two": 0.75, "base": 0.05}},
    ]
    more = {
        "low_margin": 1,
        "base": {"name": "some/base", "sha256": "0", "dtype": "float32"},
        "adapters": {"one": {"sha256": "1"}, "two": {"sha256": "2"}},
        "homes": {"one": "the chat template", "two": "Alpaca's frame", "three": "the chat template"},
    }
    lines = summary(typed(Record, RECORD | more | {"variants": few})).splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["1", "4", "two", "0.75,", "one", "0.20,", "base", "0.05"], ["0", "1", "base", "1.00"],
    ]  # fmt: skip
    told = "\n".join(lines)
    assert re.search("chat template.*: one, three$", told, re.M) and re.search("Alpaca.*: two$", told, re.M)
    many = [{"folder": None, "queries": 20 - n, "weights": {"base": 1.0}} for n in range(SHOWN + 3)]
    lines = summary(typed(Record, RECORD | more | {"variants": many})).splitlines()
    assert f" {sum(variant['queries'] for variant in many[SHOWN:])} " in lines[2 + SHOWN]
    _, last = summary(typed(Record, RECORD)).splitlines()  # of a method that does not route
    assert "a.csv, b.csv;" in last
