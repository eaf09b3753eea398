"""Duplicates of an adapter count once, and only duplicates do."""

from itertools import permutations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import write_tiny_adapter
from router.library.adapters import load_library
from router.library.duplicates import ALIKE, nearby, representatives
from router.methods.proto_route import ProtoRoute
from router.model.answer import encode
from router.queries.submission import GENERATION, Query
from router.routing.probe import input_means, probe
from router.routing.prototypes import prototypes

TEXTS = ["a", "two words", "Question: what is 17 + 4?\nAnswer:", "x" * 40, "über 漢字"]
KINDS = ("self_attn.q_proj", "mlp.up_proj")


def adapter(folder, change=lambda key, tensor: tensor, seed=1, kinds=KINDS, **config):
    """A tiny adapter, its tensors changed one by one; None leaves a tensor out."""
    file = write_tiny_adapter(folder, seed, kinds=kinds, **config) / "adapter_model.safetensors"
    changed = {key: change(key, tensor) for key, tensor in load_file(file).items()}
    save_file({key: value.contiguous() for key, value in changed.items() if value is not None}, file)
    return load_library([str(folder)])[0]


def responses(base, adapters):
    protos, rows = prototypes(adapters), encode(base.tokenizer, TEXTS)
    means, _ = input_means(base.model, rows, 0, list(protos))
    return probe(base.model, rows, 0, protos, means, len(adapters)).responses[..., 0]


def test_the_middle_of_three_sizes_represents_all_in_any_order(base, tmp_path):
    other = adapter(tmp_path / "other", seed=2)
    sizes = {alpha: adapter(tmp_path / f"alpha{alpha}", alpha=alpha) for alpha in (16, 4, 1)}
    for order in permutations(sizes):
        adapters = [sizes[order[0]], other, sizes[order[1]], sizes[order[2]]]
        middle = adapters.index(sizes[4])
        assert representatives(adapters, responses(base, adapters))[0].tolist() == [middle, 1, middle, middle]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_first_of_equals_represents_all(base, tmp_path, n):
    adapters = [adapter(tmp_path / "other", seed=2), *(adapter(tmp_path / f"same{k}") for k in range(n))]
    assert representatives(adapters, responses(base, adapters))[0].tolist() == [0] + [1] * n
    adapters[-2:] = [adapter(tmp_path / "large", alpha=8), adapter(tmp_path / "small", alpha=2)]
    found = representatives(adapters, responses(base, adapters))[0].tolist()
    assert found[0] == 0 and set(found[-2:]) == {n if n == 2 else 1}  # of two sizes the smaller


def test_the_same_update_from_other_factors_is_a_duplicate(base, tmp_path):
    mix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0] * 3
    adapters = [
        adapter(tmp_path / "one"),
        adapter(tmp_path / "two", lambda key, x: mix @ x if "lora_A" in key else x @ mix.inverse()),
    ]
    assert len(set(representatives(adapters, responses(base, adapters))[0])) == 1


def level(seed):
    """Gives every lora_B orthonormal columns, so that the update reads as its lora_A does."""
    generator = torch.Generator().manual_seed(seed)
    return lambda key, x: torch.linalg.qr(torch.randn(x.shape, generator=generator))[0] if "_B" in key else x


def flipped(key, tensor):
    return -tensor if "lora_B" in key else tensor


@pytest.mark.parametrize("changes", [(level(1), level(2)), (lambda key, x: x, flipped)], ids=["B", "sign"])
def test_of_adapters_that_read_alike_the_first_answers(base, tmp_path, changes):
    adapters = [adapter(tmp_path / f"{n}", change) for n, change in enumerate(changes)]
    found = responses(base, adapters)
    np.testing.assert_allclose(found[:, 0], found[:, 1], rtol=1e-3)
    numbers, lookalike = representatives(adapters, found)
    assert numbers.tolist() == [0, 0] and lookalike.tolist() == [False, True]


def test_a_lookalike_does_not_count_among_the_sizes_of_a_duplicate(base, tmp_path):
    sizes = [adapter(tmp_path / f"alpha{alpha}", alpha=alpha) for alpha in (16, 1)]
    harmful = adapter(tmp_path / "harmful", flipped, alpha=4)
    adapters = [sizes[0], harmful, sizes[1]]
    numbers, lookalike = representatives(adapters, responses(base, adapters))
    assert numbers.tolist() == [2, 2, 2] and lookalike.tolist() == [False, True, False]


@pytest.mark.parametrize(("cosine", "same"), [(0.992, True), (0.988, False)])
def test_updates_with_a_cosine_above_0_99_are_duplicates(base, tmp_path, cosine, same):
    def turned(of):
        """A lora_B whose columns are orthonormal, turned by an angle of this cosine."""

        def change(key, x):
            if "_B" not in key:
                return x
            q = torch.linalg.qr(torch.randn(len(x), 8, generator=torch.Generator().manual_seed(3)))[0]
            return of * q[:, :4] + (1 - of**2) ** 0.5 * q[:, 4:]

        return change

    adapters = [adapter(tmp_path / "one", turned(1.0)), adapter(tmp_path / "two", turned(cosine))]
    numbers, lookalike = representatives(adapters, responses(base, adapters))
    assert numbers.tolist() == [0, 0] and lookalike.tolist() == [False, not same]


def test_an_adapter_with_another_module_is_no_duplicate(base, tmp_path):
    def nearly(key, x):  # of no weight beside the other modules
        return x * 1e-3 if "up_proj.lora_B" in key else x

    def without(key, x):
        return None if "up_proj" in key else x

    part = adapter(tmp_path / "part", without)
    assert all("q_proj" in module for module in part.folder.shapes)
    adapters = [adapter(tmp_path / "both", nearly), part]
    assert representatives(adapters, responses(base, adapters))[0].tolist() == [0, 1]


@pytest.mark.parametrize("left_out", ["layers.1.mlp.up_proj", "layers.0.self_attn.q_proj"])
def test_a_copy_that_leaves_a_module_out_is_a_lookalike(base, tmp_path, left_out):
    def changed(key, tensor):
        return None if left_out in key else flipped(key, tensor)

    adapters = [
        adapter(tmp_path / "other", seed=2),
        adapter(tmp_path / "one"),
        adapter(tmp_path / "two", changed),
    ]
    numbers, lookalike = representatives(adapters, responses(base, adapters))
    assert numbers.tolist() == [0, 1, 1] and lookalike.tolist() == [False, False, True]


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


def test_duplicates_get_no_weight_and_change_nobody_elses(base, tmp_path):
    alone = [adapter(tmp_path / "one", alpha=4), adapter(tmp_path / "two", seed=2)]
    larger, smaller = (adapter(tmp_path / f"alpha{alpha}", alpha=alpha) for alpha in (16, 1))
    queries = [Query(str(n), text, GENERATION) for n, text in enumerate(TEXTS)]

    def route(adapters):
        method = ProtoRoute("proto_route", base, adapters)
        return method.route(queries, method.encoded(queries)).weights

    found = route([larger, *alone, smaller])
    assert not found[:, [0, 3]].any()
    np.testing.assert_allclose(found[:, [1, 2, 4]], route(alone), atol=1e-5)
