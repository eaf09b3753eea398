"""Adapters that were made to attract queries, or to take those of another, do not get them."""

import numpy as np
import pytest
import torch

from helpers import edit_weights, method_of, write_tiny_adapter
from merge.folders import WEIGHTS_FILE
from router.model.answer import encode
from router.model.hooks import reading_inputs
from router.queries.submission import GENERATION, Query
from router.routing import calibration

QUERIES = [
    Query(str(n), text, GENERATION)
    for n, text in enumerate(["a", "two words", "What is 17 + 4?", "x" * 40, "über 漢字"])
]


@pytest.fixture()
def library(tmp_path):
    for seed in range(3):
        write_tiny_adapter(tmp_path / f"good{seed}", seed)
    return tmp_path


def routed(base, library):
    method = method_of("proto_route", base, library)
    return method.route(QUERIES, method.encoded(QUERIES))


@pytest.fixture(scope="module")
def least(base):
    """The four directions that the modules' inputs have least of, (4, d_in) by module."""
    sums = {}
    names = [n for n, m in base.model.named_modules() if n.endswith("_proj")]

    def visit(name, x):
        x = x.flatten(0, -2).double()
        sums.setdefault(name, []).append(x)

    with torch.inference_mode(), reading_inputs(base.model, names, visit):
        for row in encode(base.tokenizer, calibration.generic_prompts()):
            base.model(torch.tensor([row[1:]]))
    return {
        name: torch.linalg.svd(torch.cat(x) - torch.cat(x).mean(0), full_matrices=False)[2][-4:].float()
        for name, x in sums.items()
    }


@pytest.mark.parametrize("mostly", [False, True])  # silent at all of its modules, or at all but one
def test_one_that_reads_what_text_hardly_has_gets_no_query(base, library, least, mostly):
    heard = min(least) if mostly else None

    def quiet(key, value):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        return least[module] if "lora_A" in key and module != heard else value

    without = routed(base, library)
    edit_weights(write_tiny_adapter(library / "quiet", 9) / WEIGHTS_FILE, quiet)
    found = routed(base, library)
    assert found.evidence.silent == ["quiet"] and not found.weights[:, 3].any()
    if not mostly:  # the others' weights are what they would be if it were not there
        np.testing.assert_allclose(found.weights[:, [0, 1, 2, 4]], without.weights, atol=1e-6)


def test_copies_that_write_something_else_get_no_query(base, library):
    without = routed(base, library)
    for n in range(8):
        folder = write_tiny_adapter(library / f"hostile{n}", 0)  # reads as good0 does
        edit_weights(
            folder / WEIGHTS_FILE, lambda key, value, n=n: value.roll(n + 1, 0) if "lora_B" in key else value
        )
    found = routed(base, library)
    assert found.evidence.lookalikes == {f"hostile{n}": "good0" for n in range(8)}
    np.testing.assert_allclose(found.weights[:, [0, 1, 2, -1]], without.weights, atol=1e-6)
    assert not found.weights[:, 3:-1].any()


def test_a_random_direction_is_heard():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 40, 64))  # (prompts, tokens, d_in)
    v = np.linalg.qr(rng.standard_normal((64, 8)))[0]
    squares = ((x @ v) ** 2).mean(-1) / np.square(x).sum(-1)  # (prompts, tokens)
    mean = np.sqrt(squares.mean(1))[:, None, None, None].repeat(2, 3).astype(np.float32)
    assert not calibration.silent(mean, [64]).any() and calibration.silent(mean / 2, [64]).all()
    assert not calibration.silent(np.full_like(mean, np.nan), [64]).any()
