"""The rows of the ablations are settings of the package's gate, on responses that are drawn."""

import numpy as np
import pytest
import torch

from router.routing.gate import Trials
from router.routing.prototypes import ModulePrototypes
from scripts.docs import ablate


def test_directions_are_weighted_within_each_adapter():
    owners, shares = torch.tensor([0, 0, 1, 3, 3]), torch.tensor([0.75, 0.25, 1.0, 0.6, 0.4])
    proto = ModulePrototypes(torch.eye(5), shares, owners)
    expected = {
        "first direction": [1, 0, 1, 1, 0],
        "equal": [0.5, 0.5, 1, 0.5, 0.5],
        "S^2": [0.9, 0.1, 1, 0.36 / 0.52, 0.16 / 0.52],
    }
    for name, weights in expected.items():
        changed = ablate.reweighted(proto, ablate.WEIGHTS[name])
        assert changed.weights.tolist() == pytest.approx(weights)
        assert changed.directions is proto.directions


def test_only_the_shortlist_of_the_changed_gate_is_tried():
    rng = np.random.default_rng(0)
    reference = rng.uniform(0.2, 0.4, (50, 3, 8))
    responses = np.tile(np.exp(np.log(reference).mean(0)), (1, 1, 1))
    responses[0, 1] *= 1.25
    responses[0, 0] *= 1.15  # a little less than adapter 1
    scores = ablate.scores(responses, reference)[0]
    behind = scores[1] - scores[0]
    assert behind > 0
    known = Trials(rng.uniform(0.1, 0.2, (20, 3)), rng.normal(-1, 0.1, (20, 3)), rng.normal(-1, 0.1, 20))
    # Adapter 0 is far more confident than usual, adapter 1 as ever; the base model has nothing to say.
    trials = Trials(np.full((1, 3), 0.15), np.array([[5.0, -1.0, -1.0]]), np.array([-9.0]))
    near, far = {"reach": behind / 2}, {"reach": 2 * behind}
    assert ablate.choices(responses, reference, trials, known, **near).tolist() == [1]
    assert ablate.choices(responses, reference, trials, known, **far).tolist() == [0]
    assert ablate.choices(responses, reference, trials, known, **far, max_shortlist=1).tolist() == [1]
