"""The queries by which docs/method.md tells whether a mix or one adapter answers better."""

import numpy as np
import pandas as pd

from router.library.adapters import load_library
from router.model.base import load_base
from router.result import Routing
from scripts.bench.development import Labelled
from scripts.docs import mixes


def test_queries_are_those_that_no_adapter_has_much_of_and_the_base_model_does_not_lead():
    weights = np.array([
        [0.50, 0.30, 0.20],
        [0.80, 0.05, 0.15],  # 0.94 of the adapters' weight
        [0.30, 0.30, 0.40],  # the base model's
        [0.80, 0.10, 0.10],
    ])  # fmt: skip
    assert mixes.between(weights).tolist() == [0, 3]
    many = np.tile(weights[:1], (1000, 1))
    chosen = mixes.between(many)
    assert len(set(chosen.tolist())) == mixes.SAMPLE and (chosen[0], chosen[-1]) == (0, 999)
    assert not len(mixes.between(weights[1:3]))


def test_a_rule_changes_only_who_answers_alone(tiny_base, tiny_library, monkeypatch):
    weights = np.array([[0.5, 0.3, 0.2, 0.0]])
    route = lambda _, queries, rows: Routing(np.tile(weights, (len(queries), 1)))  # noqa: E731
    monkeypatch.setattr("router.methods.proto_route.ProtoRoute.route", route)
    rows = [(f"q{n}", f"What is {n}?", "attention", "own", "attention", "0 1", "exact", "generation", "")
            for n in range(3)]  # fmt: skip
    columns = ["id", "input", "adapter", "split", "task", "target", "metric", "eval_type", "answer_choices"]
    of = Labelled("tiny", tiny_library, str(tiny_base), pd.DataFrame(rows, columns=columns))
    monkeypatch.setattr(mixes, "RULES", {"alone": 0.0, "again": 0.0, "mix": 1.0})
    name, count, alone, again, mixed, oracle = (cell.strip() for cell in mixes.line(of).strip("|").split("|"))
    assert (name, count) == ("tiny", "3") and alone == again != mixed
    nats = [float(cell.split(", ")[1]) for cell in (alone, mixed, oracle)]
    # The best one is the task's own; half precision adds them in different ways.
    assert abs(nats[0] - nats[2]) < 0.1 < abs(nats[1] - nats[2])
    base, adapters = load_base(str(tiny_base)), load_library([str(tiny_library)])
    assert mixes.unsure(of, base, adapters).rows["id"].tolist() == ["q0", "q1", "q2"]
