"""A whole run on tiny models of many families: answers as transformers and PEFT give them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import FAMILIES, PROMPTS, choice_scores, family, plain_model, read_by_id, read_table, written
from router.model.answer import likeliest

CHOICES = ["stone", "pear", "a", "two and two"]


def saved(tmp_path, tiny_base, kind, **config):
    """The folders of a base model and of two adapters of all its linear layers, as PEFT saves them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    base = tmp_path / "base"
    family(kind, len(tokenizer), **config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        # Mixtral's experts are no linear layers, and PEFT warns of the pattern that it makes for them.
        targets = ["q_proj", "v_proj"] if kind == "mixtral" else "all-linear"
        lora = LoraConfig(r=3, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(model, lora).save_pretrained(tmp_path / "adapters" / name)
    return base, tmp_path / "adapters"


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_run_answers_as_peft_and_transformers_do(kind, command, tmp_path, tiny_base, monkeypatch):
    base, library = saved(tmp_path, tiny_base, kind)
    rows = [(f"g{n}", text, "generation", "") for n, text in enumerate(PROMPTS)]
    rows.append(("m", PROMPTS[0], "multiple_choice", str(CHOICES)))
    scored = []
    monkeypatch.setattr("router.model.answer.likeliest", lambda row: scored.append(row) or likeliest(row))
    flags = ("--false_positive_rate", 0.9, "--temperature", 3.0)  # most queries get a mix
    code, out = command("proto_route", *flags, rows=rows, library=library, base=base)
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers, mixed = read_by_id(out / "queries.csv"), 0
    for row, (_, prompt, kind, _) in zip(read_table(out / "queries.routing.csv"), rows, strict=True):
        folder = out / "variants" / row["variant"]
        model = plain_model(base, folder if folder.is_dir() else None)
        mixed += folder.is_dir()
        model.generation_config.eos_token_id = [1, 7]
        answer = answers[row["id"]]["prediction"]
        if kind == "generation":
            assert answer == written(model, tokenizer, prompt)
        else:
            expected = choice_scores(model, tokenizer, prompt, CHOICES)
            assert scored == [pytest.approx(expected, abs=1e-4)]
            assert answer == str(expected.index(max(expected)))
    assert mixed


@pytest.mark.parametrize("kind", ["gemma3", "opt", "qwen2_moe"])  # pictures; tokens in a row; experts
def test_published_methods_take_unusual_families(kind, command, tmp_path, tiny_base, capsys):
    base, library = saved(tmp_path, tiny_base, kind)
    rows = [(text, text, "generation", "") for text in PROMPTS]
    for method in ("arrow", "spectr", "lag", "logo", "mass", "average", "ties"):
        code, out = command(method, out=method, rows=rows, library=library, base=base)
        assert code == 0, (method, capsys.readouterr().err)
        for row in read_table(out / "queries.routing.csv"):
            assert float(row["one"]) + float(row["two"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method", ["proto_route", "logo"])  # which read some of a prompt, and all of it
def test_a_query_beyond_the_table_of_positions_fails_alone(method, command, tmp_path, tiny_base, capsys):
    base, library = saved(tmp_path, tiny_base, "opt", max_position_embeddings=140)
    rows = [(f"q{length}", (PROMPTS[0] * 8)[:length], "generation", "") for length in (20, 138, 150)]
    for flags, failed in (((), ["q150"]), (("--max_seq_len", 135), [])):
        code, out = command(method, *flags, rows=rows, library=library, base=base)
        told, answers = capsys.readouterr().err, read_by_id(out / "queries.csv")
        assert code == 0
        assert [name for name, row in answers.items() if row["prediction"] == "unknown"] == failed
        assert ("query q150" in told) == bool(failed) and "query q138" not in told
        assert "2 of 3 prompts" in told and "--max_seq_len 135" in told
