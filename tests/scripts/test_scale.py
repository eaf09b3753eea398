"""The benchmark of scale: resampled libraries keep real statistics, and tables say what was measured."""

import json

import numpy as np
import pytest

from scripts.bench import runner
from scripts.bench.scale import measures, resampled, tables


@pytest.fixture()
def drawn(monkeypatch):
    rng = np.random.default_rng(0)
    level, spread = rng.normal(-2, 0.5, (1, 4, 6, 1)), rng.uniform(0.1, 0.3, (1, 4, 6, 1))
    reference, queries = (level + spread * rng.normal(size=(n, 4, 6, 2)) for n in (60, 50))
    reference[:, 1, 2] = queries[:, 1, 2] = np.nan
    monkeypatch.setattr(resampled, "real", lambda: (reference, queries))
    return reference


def test_the_first_of_a_resampled_library_are_the_real_ones(drawn):
    found = resampled.Library(12).reference()
    assert found.shape == (60, 12, 6, 2) and found.dtype == np.float32
    np.testing.assert_allclose(np.log(found[:, :4]), drawn, atol=1e-4)


def test_a_resampled_adapter_has_its_parents_means_deviations_and_modules(drawn):
    library = resampled.Library(12)
    logs = np.log(library.reference())
    for n in range(4, 12):
        own, parent = logs[:, n], drawn[:, n % 4]
        assert (np.isnan(own) == np.isnan(parent)).all()
        np.testing.assert_allclose(own.mean(0), parent.mean(0), atol=0.15)
        ratio = own.std(0) / parent.std(0)
        assert np.nanmin(ratio) > 0.5 and np.nanmax(ratio) < 1.6
        close = np.corrcoef(own[:, 0, 0], parent[:, 0, 0])[0, 1]
        assert 0.1 < close < 0.999
    assert np.array_equal(library.queries(9, 1), library.queries(9, 1), equal_nan=True)
    assert not np.array_equal(library.queries(9, 1), library.queries(9, 2), equal_nan=True)


def test_the_exponent_is_that_of_a_power():
    sizes = [16, 64, 256, 1000]
    assert tables.growth(sizes, [3 * n**0.5 for n in sizes]) == pytest.approx(0.5)


def test_what_does_not_fit_is_skipped_with_its_reason():
    cells = list(tables.cells())
    assert len(cells) == len(set(cells))
    assert "160 GB" in tables.skipped(("clusters", "10000", "1000000"))
    assert tables.skipped(("report", "1000", "100000")) == "100 million cells"
    assert not tables.skipped(("gate", "10000")) and not tables.skipped(("clusters", "16", "1000000"))


def test_a_target_that_is_missed_is_called_so(tmp_path, monkeypatch):
    cells = {
        ("gate", "16"): {"ms": 0.1}, ("gate", "1000"): {"ms": 0.5},
        ("gate", "10000"): {"ms": 3.0, "recall": 0.9995},
        ("planned", "10000"): {"peak_mib": 5000}, ("library", "10000"): {"peak_mib": 4000},
    }  # fmt: skip
    for cell, found in cells.items():
        runner.keep(tmp_path, cell, found)
    lines = tables._targets(dict(runner.kept(tmp_path)))
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["missed", "met", "met", "met", "met"]


def test_clusters_and_report_of_made_up_runs(monkeypatch, tmp_path):
    found = measures.run(("clusters", "5", "300"))
    assert found["worst"] <= 0.5 and found["variants"] <= 1.5 * 6
    assert json.dumps(measures.run(("report", "5", "60")))  # a page is made of it
