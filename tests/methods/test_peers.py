"""The merging peers against dense float64 readings of their papers' formulas, and through the command."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from helpers import ROWS, delta, dense_updates, random_update, read_table, updates_in, variants_in
from merge.factors import Factors
from router.methods import load_method
from router.methods.dare_ties import DROP, thinned
from router.settings import Settings

PEERS = ["task_arithmetic", "ties", "dare_ties", "knots", "tsv", "iso_c"]
D_OUT, D_IN = 12, 8


def update(rank, seed, d_out=D_OUT, d_in=D_IN):
    return random_update(d_out, rank, d_in, seed)


def combine(method, updates, seed=0):
    peer = object.__new__(load_method(method))
    peer.settings = Settings(seed=seed)
    return peer.combine("layers.0.q_proj", updates)


MIXED = [update(rank, seed) for seed, rank in enumerate((2, 3, 4))]  # the sum has full rank 8
THIN = [update(1, 5), update(2, 6), update(1, 7)]  # the sum has rank 4
WIDE = [update(rank, 10 + rank, d_out=6, d_in=20) for rank in (3, 1, 2, 5)]
LIBRARIES = {"mixed": MIXED, "thin": THIN, "wide": WIDE}


# The papers' formulas, read once more: entry by entry, on whole matrices, with other decompositions.


def sum_of_task_vectors(deltas):
    return 0.4 * np.sum(deltas, axis=0)


def ties_by_the_entry(deltas, share=0.2):
    kept = max(1, round(share * deltas[0].size))
    trimmed = []
    for one in deltas:
        flat = np.zeros(one.size)
        largest = np.argsort(-np.abs(one.ravel()), kind="stable")[:kept]
        flat[largest] = one.ravel()[largest]
        trimmed.append(flat.reshape(one.shape))
    merged = np.zeros(deltas[0].shape)
    for place in np.ndindex(merged.shape):
        values = [one[place] for one in trimmed if one[place]]
        positive = sum(value for value in values if value > 0)
        negative = -sum(value for value in values if value < 0)
        agreeing = [value for value in values if (value > 0) == (positive > negative)]
        if agreeing and positive != negative:
            merged[place] = sum(agreeing) / len(agreeing)
    return merged


def ties_in_the_joint_basis(deltas, share=0.2):
    beside = np.concatenate(deltas, axis=1)
    values, vectors = np.linalg.eigh(beside @ beside.T)
    u = vectors[:, values > 1e-8 * values.max()]
    return u @ ties_by_the_entry([u.T @ one for one in deltas], share)


def whitened(columns):
    """U (U^T U)^(-1/2), the paper's other form of the Procrustes solution."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    powers = np.array([value**-0.5 if value > 1e-8 else 0.0 for value in values])
    return columns @ (vectors * powers) @ vectors.T


def task_singular_vectors(deltas):
    us, ss, vs = [], [], []
    for one in deltas:
        u, s, vt = np.linalg.svd(one)
        k = min(min(one.shape) // len(deltas), np.linalg.matrix_rank(one, tol=1e-4))
        us.append(u[:, :k])
        ss.extend(s[:k])
        vs.append(vt[:k].T)
    return whitened(np.hstack(us)) @ np.diag(ss) @ whitened(np.hstack(vs)).T


def flat_spectrum(deltas):
    total = np.sum(deltas, axis=0)
    rank = np.linalg.matrix_rank(total, tol=1e-4)
    polar = total @ np.linalg.pinv(np.real(root(total.T @ total)), rcond=1e-6)  # U V^T
    return np.linalg.norm(total, "nuc") / rank * polar


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.where(values > 1e-10 * values.max(), values, 0))) @ vectors.T


READINGS = {
    "task_arithmetic": sum_of_task_vectors, "ties": ties_by_the_entry, "knots": ties_in_the_joint_basis,
    "tsv": task_singular_vectors, "iso_c": flat_spectrum,
}  # fmt: skip


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("method", READINGS)
def test_combine_is_the_papers_formula(method, library):
    updates = LIBRARIES[library]
    expected = READINGS[method]([delta(one) for one in updates])
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(delta(combine(method, updates)), expected, atol=1e-4)


@pytest.mark.parametrize("library", LIBRARIES)
def test_dare_ties_is_ties_on_thinned_updates(library):
    updates = LIBRARIES[library]
    found = delta(combine("dare_ties", updates, seed=4))
    parts = [thinned("layers.0.q_proj", one, 4).double().numpy() for one in updates]
    np.testing.assert_allclose(found, ties_by_the_entry(parts), atol=1e-4)
    assert not np.allclose(found, ties_by_the_entry([delta(one) for one in updates]), atol=1e-2)


def test_thinning_drops_or_rescales_and_keeps_the_mean():
    one = MIXED[2]
    draws = np.stack([thinned("m", one, seed).double().numpy() for seed in range(2000)])
    assert np.array_equal(draws[0], thinned("m", one, 0)) and (draws[0] != draws[1]).any()
    whole = delta(one) / (1 - DROP)
    dropped = draws == 0
    np.testing.assert_allclose(draws, np.where(dropped, 0, whole), atol=1e-5)
    assert dropped.mean() == pytest.approx(DROP, abs=0.005)
    spread = np.abs(whole) * np.sqrt(DROP * (1 - DROP) / len(draws))
    assert (np.abs(draws.mean(0) - delta(one)) < 5 * spread + 1e-6).all()


def test_tsv_keeps_as_many_components_as_fit():
    many = [update(4, 20 + n) for n in range(10)]  # 8 // 10 components each: at least one
    found = combine("tsv", many)
    assert found.rank == 10 and np.isfinite(delta(found)).all()
    assert combine("tsv", MIXED).rank == 2 + 2 + 2


@pytest.mark.parametrize("method", PEERS)
def test_an_untrained_adapter_is_no_trouble(method):
    zero = Factors(torch.randn(2, D_IN, generator=torch.Generator().manual_seed(0)), torch.zeros(D_OUT, 2))
    alone = combine(method, [zero])
    assert delta(alone).shape == (D_OUT, D_IN) and not delta(alone).any()
    assert np.isfinite(delta(combine(method, [zero, MIXED[0]]))).all()


@pytest.mark.parametrize("method", PEERS)
def test_a_peer_answers_all_queries_with_one_variant(command, method, tiny_library):
    code, out = command(method, "--n_variants", 3, "--max_gen_len", 3)
    rows = read_table(out / "queries.csv")
    assert code == 0 and [row["id"] for row in rows] == [row[0] for row in ROWS]
    assert all(row["prediction"] for row in rows)
    (variant,) = json.loads((out / "run.json").read_text())["variants"]
    assert variant["folder"] == "variants/0" and variant["queries"] == len(ROWS)
    assert variants_in(out) == ["0"]

    found, updates = dense_updates(out / "variants" / "0"), updates_in(tiny_library)
    assert found.keys() == updates.keys()
    assert Counter(map(len, updates.values())) == {2: 14}  # of 3 adapters each module has 2
    for module, parts in updates.items():
        assert np.abs(found[module]).max() > 0.01
        if method in READINGS:
            np.testing.assert_allclose(found[module], READINGS[method]([*parts.values()]), atol=1e-4)


def test_a_peers_variant_is_recompressed_on_demand(command, tiny_library):
    _, out = command("ties", "--variant_rank", 2, "--max_gen_len", 3)
    found = dense_updates(out / "variants" / "0")
    for module, parts in updates_in(tiny_library).items():
        u, s, vt = np.linalg.svd(ties_by_the_entry([*parts.values()]))
        np.testing.assert_allclose(found[module], (u[:, :2] * s[:2]) @ vt[:2], atol=1e-4)
