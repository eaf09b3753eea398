"""What a lost query costs is what the benchmark's answer to it scored."""

import pandas as pd
import pytest

from scripts.bench import runner
from scripts.bench.development import Labelled
from scripts.docs import hostile


def test_an_answer_that_nobody_scored_counts_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(hostile, "CELLS", tmp_path)
    rows = [("own", "sums", "0"), ("own", "sums", "1"), ("foreign", "chat", "0"), ("own", "tone", "0")]
    of = Labelled("tiny", tmp_path, "base", pd.DataFrame(rows, columns=["split", "task", "id"]))
    assert hostile.worth(of).tolist() == [1, 1, 1, 1]
    scores = [0.25, 0.0, float("nan")]
    lines = [[*key, "a", score, -1.0, "a", 1.0, 0] for key, score in zip(rows, scores, strict=False)]
    runner.keep(tmp_path, ("tiny", "queries", "proto_route", "0"), [{"answers": lines}])
    assert hostile.worth(of) == pytest.approx([0.25, 0, 1, 1])
