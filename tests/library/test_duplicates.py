"""Duplicates of an adapter count once, and only duplicates do."""

from itertools import permutations

import numpy as np
import pytest
import torch

from helpers import edit_weights, write_tiny_adapter
from merge.folders import WEIGHTS_FILE
from router.library.adapters import load_library
from router.library.duplicates import ALIKE, nearby, representatives
from router.model.answer import encode
from router.routing.probe import input_means, probe
from router.routing.prototypes import prototypes

TEXTS = ["a", "two words", "Question: what is 17 + 4?\nAnswer:", "x" * 40, "über 漢字"]
KINDS = ("self_attn.q_proj", "mlp.up_proj")


def adapter(folder, change=lambda key, x: x, seed=1, **config):
    """A tiny adapter, its tensors changed one by one; None leaves a tensor out."""
    write_tiny_adapter(folder, seed, kinds=KINDS, **config)
    edit_weights(folder / WEIGHTS_FILE, change)
    return load_library([str(folder)])[0]


def responses(base, adapters):
    protos, rows = prototypes(adapters), encode(base.tokenizer, TEXTS)
    means, _ = input_means(base.model, rows, 0, list(protos))
    return probe(base.model, rows, 0, protos, means, len(adapters)).responses[..., 0]


def drawn(seed, *shape):
    return torch.linalg.qr(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))[0]


def turned(x, cosine):
    """Orthonormal columns, turned by an angle of this cosine."""
    q = drawn(3, len(x), 8)
    return cosine * q[:, :4] + (1 - cosine**2) ** 0.5 * q[:, 4:]


MIX = 3 * drawn(0, 4, 4)
CHANGES = {
    "none": lambda key, x: x,
    "mixed": lambda key, x: MIX @ x if "_A" in key else x @ MIX.inverse(),  # the same update
    # Orthonormal columns of lora_B: the update reads as its lora_A does.
    **{f"level {n}": lambda key, x, n=n: drawn(n, *x.shape) if "_B" in key else x for n in (1, 2)},
    **{of: lambda key, x, of=of: turned(x, of) if "_B" in key else x for of in (1.0, 0.992, 0.988)},
    "flipped": lambda key, x: -x if "_B" in key else x,
    "nearly without": lambda key, x: x * 1e-3 if "up_proj.lora_B" in key else x,
    "without": lambda key, x: None if "up_proj" in key else x,
    **{
        f"flipped without {left}": lambda key, x, left=left: None if left in key else -x if "_B" in key else x
        for left in ("1.mlp.up_proj", "0.self_attn.q_proj")
    },
}


@pytest.mark.parametrize(
    ("changes", "alphas", "expected", "lookalikes"),
    [
        (["none", "none"], (8, 2), [1, 1], [False, False]),  # of two sizes the smaller
        *(
            (["none"] * 3, sizes, [sizes.index(4)] * 3, [False] * 3)  # the middle one
            for sizes in permutations((16, 4, 1))
        ),
        (["none"] * 5, (4, 4, 4, 8, 2), [0] * 5, [False] * 5),  # of equals the first
        (["none", "mixed"], (4, 4), [0, 0], [False, False]),
        (["level 1", "level 2"], (4, 4), [0, 0], [False, True]),
        (["none", "flipped"], (4, 4), [0, 0], [False, True]),
        (["none", "flipped", "none"], (16, 4, 1), [2, 2, 2], [False, True, False]),  # is none of the sizes
        ([1.0, 0.992], (4, 4), [0, 0], [False, False]),
        ([1.0, 0.988], (4, 4), [0, 0], [False, True]),
        (["nearly without", "without"], (4, 4), [0, 1], [False, False]),
        (["none", "flipped without 1.mlp.up_proj"], (4, 4), [0, 0], [False, True]),
        (["none", "flipped without 0.self_attn.q_proj"], (4, 4), [0, 0], [False, True]),
    ],
)
def test_of_adapters_that_read_alike_one_answers(base, tmp_path, changes, alphas, expected, lookalikes):
    adapters = [
        adapter(tmp_path / f"{n}", CHANGES[change], alpha=alpha)
        for n, (change, alpha) in enumerate(zip(changes, alphas, strict=True))
    ]
    adapters.append(adapter(tmp_path / "other", seed=2))
    numbers, lookalike = representatives(adapters, responses(base, adapters))
    assert numbers.tolist() == [*expected, len(changes)] and lookalike.tolist() == [*lookalikes, False]


def test_no_pair_that_is_alike_is_missed():
    rng = np.random.default_rng(0)
    sizes = rng.normal(-2, 0.5, (100, 1, 12))
    sizes = np.concatenate([sizes, sizes[::2] + rng.normal(0, 0.03, (50, 1, 12))])
    logs = (sizes + rng.normal(0, 0.02, (150, 6, 12))).astype(np.float32)
    there = np.ones((150, 12), bool)
    there[::7, 0] = False  # three patterns of modules
    there[::11, 5:] = False
    logs[~np.broadcast_to(there[:, None], logs.shape)] = 0
    found = list(nearby(logs.reshape(150, -1), there))
    shared = there[:, None] & there
    apart = (np.square(logs[:, None] - logs) * shared[:, :, None]).sum((2, 3)) / (6 * shared.sum(2).clip(1))
    alike = (np.sqrt(apart) < ALIKE) & (2 * shared.sum(2) > np.maximum(there.sum(1)[:, None], there.sum(1)))
    assert alike.sum() > 150 + 40  # each with itself, and copies
    assert all(set(np.flatnonzero(row)) <= set(others) for row, others in zip(alike, found, strict=True))
    assert all(others == sorted(others) for others in found)
    assert sum(map(len, found)) < 150**2 / 20
