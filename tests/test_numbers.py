"""Properties of the numbers, for whatever comes: against float64, in any order, size and batch."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from helpers import NAMES, edit_json, method_of, write_tiny_library
from helpers import delta as dense
from merge.factors import Factors, recompress, weighted_sum
from router.queries.submission import Query
from router.routing.gate import PrototypeGate

# Updates.


@st.composite
def modules(draw):
    """One to five random updates of one module, of any ranks and sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    d_out, d_in = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    ranks = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))

    def factor(*shape):
        return torch.tensor(rng.standard_normal(shape) * 10 ** rng.uniform(-3, 3), dtype=torch.float32)

    return [Factors(factor(rank, d_in), factor(d_out, rank)) for rank in ranks]


@settings(max_examples=60)
@given(st.data(), modules())
def test_the_sum_of_updates_is_the_dense_sum(data, updates):
    weights = [data.draw(st.floats(-8, 8, width=32)) for _ in updates]
    found = weighted_sum(updates, weights)
    parts = [weight * dense(update) for weight, update in zip(weights, updates, strict=True)]
    assert found.rank == sum(update.rank for update in updates)
    assert np.linalg.norm(dense(found) - sum(parts)) <= 1e-6 * sum(map(np.linalg.norm, parts))


@settings(max_examples=60)
@given(modules(), st.integers(1, 40))
def test_recompression_loses_the_discarded_values_alone(updates, rank):
    full = sum(map(dense, updates))
    s = np.linalg.svd(full, compute_uv=False)
    found = recompress(weighted_sum(updates, [1.0] * len(updates)), rank)
    assert found.rank <= rank
    lost = np.linalg.norm(dense(found) - full)
    # float32 factors are exact to a share of the largest value that is summed, not of the sum.
    rounding = 1e-5 * sum(np.linalg.norm(dense(update)) for update in updates)
    assert lost == pytest.approx(np.linalg.norm(s[rank:]), abs=rounding)  # nothing, at full rank


# The gate.


@settings(max_examples=15)
@given(st.data(), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32))
def test_permuted_queries_and_adapters_permute_the_weights(data, n_adapters, n_modules, seed):
    rng = np.random.default_rng(seed)
    generic, X = (rng.lognormal(-2, 0.3, (count, n_adapters, n_modules, 2)) for count in (40, 12))
    absent = rng.random((n_adapters, n_modules)) < 0.3
    absent[np.arange(n_adapters), rng.integers(n_modules, size=n_adapters)] = False
    generic[:, absent] = X[:, absent] = np.nan
    sure, surer = rng.normal(size=40), rng.normal(size=12)
    queries, adapters = (data.draw(st.permutations(range(n))) for n in (12, n_adapters))
    plain = PrototypeGate().fit(generic, confidence=sure).predict_proba(X, surer)
    moved = PrototypeGate().fit(generic[:, adapters], confidence=sure)
    found = moved.predict_proba(X[queries][:, adapters], surer[queries])
    np.testing.assert_allclose(found, plain[queries][:, [*adapters, n_adapters]], atol=1e-6)


# The whole of routing, on a tiny model.

TEXTS = [
    "What is two and two?", "Bonjour, comment allez-vous ?", "1 + 1 =", "word " * 40, "a", "Sort: c, a, b",
    "Translate to German: the house is red.", "def f(x):", "Is it so? yes or no:", "(A) one (B) two\nAnswer:",
]  # fmt: skip
QUERIES = [Query(f"g{n}", text, "generation") for n, text in enumerate(TEXTS)]
QUERIES += [Query(f"m{n}", text, "multiple_choice", ("yes", "no", "A")) for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return write_tiny_library(tmp_path_factory.mktemp("library"))


def method(base, folders, **flags):
    return method_of("proto_route", base, *folders, max_gen_len=3, **flags)


def weights_of(found):
    return found.route(QUERIES, found.encoded(QUERIES)).weights


@pytest.fixture(scope="module")
def plain(base, library):
    """Weights of the library as it is, (queries, adapters + 1)."""
    found = weights_of(method(base, [library]))
    assert len(set(found.argmax(1))) > 2
    return found


def resized(folder, to, size):
    """A copy of an adapter, `size` times as large."""
    shutil.copytree(folder, to)
    alpha = json.loads((to / "adapter_config.json").read_text())["lora_alpha"]
    edit_json(to / "adapter_config.json", lora_alpha=size * alpha)


SIZES = st.floats(-3, 3).map(lambda exponent: 10**exponent)


@settings(max_examples=6)
@given(st.tuples(*[SIZES] * 3), st.lists(st.tuples(st.sampled_from(NAMES), SIZES), max_size=5))
def test_neither_sizes_nor_copies_of_adapters_change_a_choice(
    base, library, plain, tmp_path_factory, sizes, copies
):
    """The weights of an adapter and its copies together are what it has alone."""
    folder = tmp_path_factory.mktemp("resized")
    of = [*zip(NAMES, sizes, strict=True), *copies]
    folders = [folder / f"{n}" for n in range(len(of))]
    for to, (name, size) in zip(folders, of, strict=True):
        resized(library / name, to, size)
    found = weights_of(method(base, folders))
    summed = [found[:, [n for n, (own, _) in enumerate(of) if own == name]].sum(1) for name in NAMES]
    summed = np.column_stack([*summed, found[:, -1]])
    assert (summed.argmax(1) == plain.argmax(1)).all()
    np.testing.assert_allclose(summed, plain, atol=1e-3)


def predicted(base, library, out, queries, **flags):
    result = method(base, [library], temperature=3.0, **flags).answer(queries, out)  # warm, so many mixes
    return {query.id: answer.text for query, answer in zip(queries, result.answers, strict=True)}


@pytest.fixture(scope="module")
def predictions(base, library, tmp_path_factory):
    return predicted(base, library, tmp_path_factory.mktemp("out"), QUERIES)


@settings(max_examples=6)
@given(st.permutations(range(len(QUERIES))), st.integers(1, len(QUERIES)), st.integers(1, 600))
def test_neither_order_nor_batches_change_a_prediction(
    base, library, predictions, tmp_path_factory, order, batch_size, tokens
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.model.device.CPU_TOKENS", tokens)
        moved, out = [QUERIES[n] for n in order], tmp_path_factory.mktemp("out")
        assert predicted(base, library, out, moved, batch_size=batch_size) == predictions


def test_threads_change_no_choice(base, library, tmp_path, monkeypatch):
    before, found = torch.get_num_threads(), []
    for threads in (before, 2 * os.cpu_count() + 1):  # with no core each, none waits busily
        monkeypatch.setattr("router.library.store.cache_folder", lambda n=threads: tmp_path / f"{n}")  # anew
        torch.set_num_threads(threads)
        try:
            with threadpool_limits(threads):
                found.append(weights_of(method(base, [library])))
        finally:
            torch.set_num_threads(before)
    assert len(list(tmp_path.rglob("*.responses.safetensors"))) == 2 * len(NAMES)
    assert (found[0].argmax(1) == found[1].argmax(1)).all()
    np.testing.assert_allclose(*found, atol=1e-4)
