"""Answers: batches, padding and the shared cache change nothing about them."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3NextConfig

from helpers import FAMILIES, family
from router.model.answer import answers, continuation, encode, endings, generate, score_choices
from router.model.base import check_sound
from router.model.cache import new_cache
from router.pipeline import answering
from router.pipeline.context import Context
from router.queries.submission import Query
from router.settings import Settings
from router.system.errors import InputError

EOS = 1
LONG = "The quick brown fox jumps over the lazy dog, and then it rests in the sun for a while. "
PROMPTS = ["Hi", LONG * 3, "What is two and two?", "x", LONG, "a list: one, two"]
CHOICES = [
    ("yes", "no"),
    ("a rather long choice", "b", "", "of two"),
    ("only one",),
    ("A", "B", "C", "D", "E", "F", "G"),
    ("", "something"),
    ("pear", "plum", "apple pie"),
]


def letters(base, text):
    """Ids of ASCII text, one per character, without the tokenizer's own splitting."""
    return base.tokenizer.convert_tokens_to_ids(list(text.replace(" ", "Ġ")))


def next_logits(base, ids):
    with torch.inference_mode():
        return base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()


def greedy(base, ids, count):
    """Argmax, one whole forward pass a token: no cache, no padding, no batch."""
    new = []
    while len(new) < count and EOS not in new:
        new.append(int(next_logits(base, [*ids, *new])[-1].argmax()))
    return tuple(new)


def log_probability(base, prompt, choice, skip=0):
    """Of a choice and the end-of-sequence token, in one forward pass over prompt and choice."""
    tail = [*letters(base, choice), EOS]
    logp = next_logits(base, [*prompt, *tail]).log_softmax(-1)
    return sum(float(logp[len(prompt) - 1 + n, tail[n]]) for n in range(skip, len(tail)))


def rows(base, prompts=PROMPTS):
    return [letters(base, prompt) for prompt in prompts]


def answered(base, queries, max_new_tokens=64, bar=lambda tokens: None, deadline=None, **settings):
    """Answers of queries whose prompts are tokenised here."""
    settings = Settings(max_gen_len=max_new_tokens, **settings)
    ids = encode(base.tokenizer, [query.input for query in queries], settings.max_seq_len)
    context = Context(settings, deadline=deadline)
    return answering.answered(base.model, base.tokenizer, queries, ids, context, bar)


def generation(*prompts):
    return [Query(str(n), prompt, "generation") for n, prompt in enumerate(prompts)]


@pytest.mark.parametrize(("told", "kept"), [(" two", "two"), ("   two ", "  two "), ("two", "two"), ("", "")])
def test_generated_text_loses_a_blank_and_special_tokens(base, told, kept):
    assert continuation(base.tokenizer, (*letters(base, told), EOS)) == kept


def test_the_kits_scores_leave_out_the_first_token(base):
    tails = [endings(base.tokenizer, choices) for choices in CHOICES]
    found = score_choices(base.model, base.tokenizer, rows(base), tails, "kit")
    for prompt, choices, scores in zip(rows(base), CHOICES, found, strict=True):
        expected = [log_probability(base, prompt, choice, skip=1) for choice in choices]
        assert scores == pytest.approx(expected, rel=0, abs=1e-3)
    assert found[1][2] == found[4][0] == 0.0  # an empty choice has no token left to score
    tie = [Query("0", "Hi", "multiple_choice", ("zz", "", "qq", ""))]
    assert answered(base, tie, scoring="kit")[0].text == "1"  # the lowest index


@pytest.mark.parametrize(("prompt", "ids", "limit"), [("", [0], None), (LONG, 7, 7)])
def test_prompts_that_are_empty_or_cut(base, prompt, ids, limit):
    """A padding token stands in for an empty prompt, and of a long one the first tokens are kept."""
    queries = [*generation(prompt), Query("2", prompt, "multiple_choice", ("yes", "no"))]
    free, chosen = answered(base, queries, max_new_tokens=6, max_seq_len=limit)
    read = ids if prompt == "" else letters(base, prompt[:ids])
    assert free.ids == greedy(base, read, 6)
    expected = [log_probability(base, read, text) for text in ("yes", "no")]
    assert chosen.scores == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_mixed_kinds_are_answered_in_order(base, batch_size):
    queries, expected = [], []
    for n, (prompt, choices) in enumerate(zip(PROMPTS, CHOICES, strict=True)):
        ids = letters(base, prompt)
        queries.append(Query(f"c{n}", prompt, "multiple_choice", choices))
        expected.append([log_probability(base, ids, choice) for choice in choices])
        if n % 2:  # choices do not make it multiple choice
            queries.append(Query(f"g{n}", prompt, "generation", choices))
            expected.append(greedy(base, ids, 4))
    done = []
    found = answered(base, queries, max_new_tokens=4, batch_size=batch_size, bar=done.append)
    for query, one, wanted in zip(queries, found, expected, strict=True):
        if query.eval_type == "generation":
            assert one.ids == wanted and one.scores == ()
        else:
            assert one.scores == pytest.approx(wanted, rel=0, abs=1e-3)
            assert one.text == str(wanted.index(max(wanted))) and one.ids == ()
    tokens = [len(letters(base, query.input)) for query in queries]
    assert sum(done) == sum(tokens)
    assert batch_size is None or max(done) <= batch_size * max(tokens)


OUT_OF_MEMORY = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory."),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
}


@contextmanager
def refusing(base, error, which):
    """Makes passes over some ids fail; yields the numbers of rows that came."""
    seen = []

    def refuse(model, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if which(kwargs["input_ids"]):
            raise error

    handle = base.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("device", OUT_OF_MEMORY)
def test_a_batch_that_does_not_fit_is_halved(base, device, caplog):
    queries = generation(*(f"number {n}" for n in range(9)))
    expected = answered(base, queries, max_new_tokens=3)
    done = []
    with refusing(base, OUT_OF_MEMORY[device], lambda ids: len(ids) > 3) as seen:
        assert answered(base, queries, max_new_tokens=3, bar=done.append) == expected
    size = len(letters(base, "number 0"))
    assert sum(done) == 9 * size and max(done) <= 3 * size
    assert [size for size in seen if size > 3] == [9, 4]  # what failed; the other half was not tried whole
    queries[4] = Query("4", "a longer one", "generation")
    longer = len(letters(base, "a longer one"))
    with refusing(base, OUT_OF_MEMORY[device], lambda ids: ids.shape[1] == longer):
        found = answered(base, queries, max_new_tokens=3)
    assert found[4].failed and found[4].text == "unknown" and "query 4: " in caplog.text
    assert found[:4] + found[5:] == expected[:4] + expected[5:]
    with refusing(base, RuntimeError("x"), lambda ids: True), pytest.raises(RuntimeError, match="x"):
        answered(base, generation("Hi", "Ho"))


def test_a_query_whose_output_is_not_finite_has_no_answer(base, caplog):
    queries = [*generation("a\ud800b", "Ho, you!"), Query("2", "Ho?", "multiple_choice", ("\udc00", "b"))]
    expected = answered(base, queries, max_new_tokens=3)
    assert not any(answer.failed for answer in expected)  # half a character is no reason
    letter, table = letters(base, ",")[0], base.model.get_input_embeddings().weight
    before = table[letter].clone()
    with torch.no_grad():
        table[letter] = torch.inf
    try:
        found = answered(base, [*queries, Query("3", "Hm,", "multiple_choice", ("a",))], max_new_tokens=3)
    finally:
        with torch.no_grad():
            table[letter] = before
    assert [answer.failed for answer in found] == [False, True, False, True]
    assert found[0] == expected[0] and found[1].text == "unknown" and "query 1: " in caplog.text
    assert found[2].scores == pytest.approx(expected[2].scores, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_stops_where_transformers_does_in_a_family(base, name, monkeypatch):
    monkeypatch.setattr("router.model.cache.STEP", 3)  # so that the cache grows
    model = family(name, base.model.config.vocab_size)
    prompts = rows(base)
    plain = [found.ids for found in generate(model, base.tokenizer, prompts, 10)]
    # Whatever it writes third ends a text from now on, beside the tokenizer's own.
    model.generation_config.eos_token_id = [EOS, *sorted({ids[2] for ids in plain if len(ids) > 2})]
    found = generate(model, base.tokenizer, prompts, 10)
    for ids, own in zip(prompts, found, strict=True):
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=10,
            do_sample=False, pad_token_id=0,
        )[0, len(ids) :]  # fmt: skip
        assert list(own.ids) == out.tolist()
    assert min(len(own.ids) for own in found) < 10


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neo", "gptj"])
def test_where_positions_end_so_does_an_answer(base, name, caplog):
    """Llama computes its positions, and goes on beyond the 32 tokens that it was made for."""
    model = family(name, base.model.config.vocab_size, max_position_embeddings=32)
    model.config.eos_token_id = model.generation_config.eos_token_id = EOS
    other, end = replace(base, model=model), 99 if name == "llama" else 32
    queries = generation(*(LONG[:n] for n in (10, 26, 27, 28, 30, 32, 33, 50)))
    long = "a long choice"
    queries += [
        Query(f"c{n}", LONG[:n], "multiple_choice", (choice, "b"))
        for n, choice in ((10, long), (18, long), (28, "abc"), (20, long), (50, "abc"))
    ]
    found = answered(other, queries, max_new_tokens=6)
    for query, one in zip(queries, found, strict=True):
        ids = letters(base, query.input)
        tails = [letters(base, choice) for choice in query.choices]
        if one.failed:
            assert len(ids) + max(map(len, tails), default=0) > end
            assert one.text == "unknown" and f"query {query.id}: does not fit into a context" in caplog.text
        elif query.choices:
            expected = [log_probability(other, ids, choice) for choice in query.choices]
            assert one.scores == pytest.approx(expected, abs=1e-3)
        else:
            assert one.ids == greedy(other, ids, min(6, end + 1 - len(ids)))
    failed = [query.id for query, one in zip(queries, found, strict=True) if one.failed]
    assert failed == ([] if name == "llama" else ["6", "7", "c20", "c50"])


@pytest.mark.parametrize("sliding_window", [None, 8])
def test_prompts_in_parts_and_rows_that_leave_change_nothing(base, tmp_path, monkeypatch, sliding_window):
    config = MistralConfig(
        vocab_size=base.model.config.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=sliding_window, eos_token_id=EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 3
    other = replace(base, model=model)
    expected = [greedy(other, ids, 12) for ids in rows(base)]
    sizes = []
    handle = model.register_forward_pre_hook(
        lambda model, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr("router.model.device.CPU_TOKENS", 600)
    found = generate(model, base.tokenizer, rows(base), 12)
    handle.remove()
    assert [one.ids for one in found] == expected
    assert sizes[:3] == [2, 2, 2] and min(sizes[3:]) < max(sizes[3:])


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_prompts_beyond_a_stretch_change_no_shorter_ones(base, kind):
    """LongRoPE and dynamic NTK choose by the longest row of a batch."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    if kind == "phi3":
        factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 16.0, 40.0]}
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": 32, **factors}
    size = {"max_position_embeddings": 32} if kind == "llama" else {"original_max_position_embeddings": 32}
    model = family(kind, base.model.config.vocab_size, rope_parameters=rope, **size)
    prompts = [letters(base, text) for text in ("abc", "What is two?", LONG)]
    for choices in ((), ("stone", "a")):
        found = answers(model, base.tokenizer, prompts, [choices] * 3, max_new_tokens=8)
        for ids, one in zip(prompts[:2], found, strict=False):
            [alone] = answers(model, base.tokenizer, [ids], [choices], max_new_tokens=8)
            assert alone.text == one.text and alone.scores == pytest.approx(one.scores, abs=1e-4)


def test_a_model_whose_layers_keep_something_else_is_refused(base):
    """Of a recurrent state, rows could neither be joined nor leave."""
    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(InputError, match="qwen3_next"):
        new_cache(SimpleNamespace(config=config))
    with pytest.raises(InputError, match=r"--base_model here: .*Rwkv"):
        check_sound(family("rwkv", 64, attention_hidden_size=32), "here")
    endless, tokenizer = family("llama", base.model.config.vocab_size), copy.deepcopy(base.tokenizer)
    endless.config.eos_token_id = endless.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.pad_token = None  # with no token that ends a text, all are written
    assert {len(answer.ids) for answer in generate(endless, tokenizer, rows(base), 5)} == {5}
    assert all(
        np.isfinite(
            score_choices(endless, tokenizer, rows(base)[:1], [endings(tokenizer, ("a", "bc", ""))])[0]
        )
    )
    endless.generation_config.eos_token_id = "x"
    with pytest.raises(InputError, match="eos_token_id"):
        generate(endless, tokenizer, rows(base), 5)
