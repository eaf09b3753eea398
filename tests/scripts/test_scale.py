"""The benchmark of scale: resampled libraries keep real statistics, and its tables hold what was measured."""

import numpy as np
import pytest

from scripts.bench import runner, scale


@pytest.fixture()
def drawn(monkeypatch):
    rng = np.random.default_rng(0)
    level, spread = rng.normal(-2, 0.5, (1, 4, 6, 1)), rng.uniform(0.1, 0.3, (1, 4, 6, 1))
    reference, queries = (level + spread * rng.normal(size=(n, 4, 6, 2)) for n in (60, 50))
    reference[:, 1, 2] = queries[:, 1, 2] = np.nan
    monkeypatch.setattr(scale, "real", lambda: (reference, queries))
    return reference


def test_a_resampled_adapter_is_like_its_parent(drawn):
    library = scale.Library(12)
    logs = np.log(library.reference())
    np.testing.assert_allclose(logs[:, :4], drawn, atol=1e-4)  # the first ones are real
    for n in range(4, 12):
        mine, parent = logs[:, n], drawn[:, n % 4]
        assert (np.isnan(mine) == np.isnan(parent)).all()
        np.testing.assert_allclose(mine.mean(0), parent.mean(0), atol=0.15)
        assert 0.5 < np.nanmin(mine.std(0) / parent.std(0)) <= np.nanmax(mine.std(0) / parent.std(0)) < 1.6
        assert 0.1 < np.corrcoef(mine[:, 0, 0], parent[:, 0, 0])[0, 1] < 0.999
    assert np.array_equal(library.queries(9, 1), library.queries(9, 1), equal_nan=True)
    assert not np.array_equal(library.queries(9, 1), library.queries(9, 2), equal_nan=True)


def test_a_small_gate_keeps_every_adapter_on_its_shortlist(drawn, monkeypatch):
    monkeypatch.setattr(scale, "JUDGED", 20)
    found = scale.gate(8)
    assert found["recall"] == 1 and found["ms"] > 0


def test_tables_have_a_column_for_each_size(tmp_path, monkeypatch, capsys):
    page = tmp_path / "scale.md"
    page.write_text("<!-- gate -->\n<!-- /gate -->\n<!-- queries -->\n<!-- /queries -->\n")
    monkeypatch.setattr(scale, "FOLDER", tmp_path / "cells")
    monkeypatch.setattr(scale, "PAGE", page)
    for what, *numbers in scale.cells():
        size = int(numbers[0])
        found = {
            "ms": size**0.5,
            "fit": 2.0 * size,
            "peak_mib": 9,
            "recall": 1.0,
            "seconds": 1.0,
            "variants": 3,
        }
        if what != "library":
            runner.keep(tmp_path / "cells", (what, *numbers), found)
    scale.write()
    text = page.read_text()
    assert "| gate, ms a query | 4.00 | 8.00 | 16.00 | 31.62 | 100.00 | 0.50 |" in text
    assert "1.0 s, 9 MiB, 3 groups" in text and "no table library yet" in capsys.readouterr().out
