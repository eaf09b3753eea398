"""What the ablations' tables are made of, on a library whose right choices are plain."""

import numpy as np

from scripts.bench.responses import Measured
from scripts.docs.ablate import NOW, false_positives, figures

NAMES = ["one", "two", "three"]


def library(stronger):
    """20 queries of each adapter, which respond so much more strongly, and 400 that none fits."""
    rng = np.random.default_rng(0)
    labels = np.array([*np.repeat(NAMES, 20), *["base"] * 400])
    responses = rng.uniform(0.1, 0.2, (460, 3, 5, 2)).astype(np.float32)
    for k, name in enumerate(NAMES):
        responses[labels == name, k] *= stronger
    reference, sure = rng.uniform(0.1, 0.2, (400, 3, 5, 2)).astype(np.float32), rng.normal(size=860)
    splits = np.where(labels == "base", "foreign", "own")
    return Measured(
        f"{stronger}", [*NAMES, "base"], reference, sure[:400], responses, sure[400:], labels, splits
    )


def test_shares_are_of_queries_that_go_to_the_right_adapter():
    assert figures(library(2), NOW) == {"own": 1.0}
    assert figures(library(1), NOW)["own"] < 0.2


def test_generic_text_that_is_as_near_as_foreign_queries_sends_what_is_promised():
    # Both are drawn alike, so the odds are 1: each library chooses that for the other.
    for line in false_positives([library(2), library(1)])[2:]:
        _, odds, sent, _ = (cell.strip() for cell in line.strip("|").split("|"))
        assert 0.5 < float(odds) < 2 and 0.02 < float(sent) < 0.1
