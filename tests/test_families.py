"""A whole run on tiny models of many families: answers as transformers and PEFT give them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import FAMILIES, arguments, family, read_by_id, read_table, write_queries
from router.main import main
from router.model.answer import likeliest

LENGTH = 6  # new tokens, as `arguments` asks for
PROMPTS = ["What is two and two?", "Bonjour, comment allez-vous ?", "1 + 1 =", "abc"]
CHOICES = ["stone", "pear", "a", "two and two"]


@pytest.fixture(params=FAMILIES)
def folders(request, tmp_path, tiny_base):
    """A base model and two adapters of all its linear layers, as PEFT saves them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    base = tmp_path / "base"
    family(request.param, len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        # Mixtral's experts are no linear layers, and PEFT warns of the pattern that it makes for them.
        targets = ["q_proj", "v_proj"] if request.param == "mixtral" else "all-linear"
        config = LoraConfig(r=3, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(tmp_path / "library" / name)
    return base, tmp_path / "library"


def written(model, tokenizer, prompt):
    """What transformers generates."""
    model.generation_config.eos_token_id = [1, 7]
    ids = tokenizer(prompt, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=LENGTH, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True).removeprefix(" ")
    return text if text.strip() else "unknown"


def scores(model, tokenizer, prompt, choices):
    """The log-probability of each choice and the end of the text, one by one, without a cache."""
    read, found = tokenizer(prompt)["input_ids"], []
    for choice in choices:
        tail = [*tokenizer(choice)["input_ids"], tokenizer.eos_token_id]
        with torch.inference_mode():
            logp = model(torch.tensor([[*read, *tail]]), use_cache=False).logits[0].log_softmax(-1)
        found.append(sum(float(logp[len(read) - 1 + n, token]) for n, token in enumerate(tail)))
    return found


def test_a_run_answers_as_peft_and_transformers_do(folders, tmp_path, monkeypatch):
    base, library = folders
    rows = [(f"g{n}", text, "generation", "") for n, text in enumerate(PROMPTS)]
    rows.append(("m", PROMPTS[0], "multiple_choice", str(CHOICES)))
    queries, out, scored = write_queries(tmp_path / "queries.csv", rows), tmp_path / "out", []
    monkeypatch.setattr("router.model.answer.likeliest", lambda row: scored.append(row) or likeliest(row))
    flags = ("--false_alarm", 0.9, "--temperature", 3.0)  # most queries get a mix
    assert main(arguments("proto_route", [queries], library, base, out, *flags)) == 0
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers, mixed = read_by_id(out / "queries.csv"), 0
    for row, (_, prompt, kind, _) in zip(read_table(out / "queries.routing.csv"), rows, strict=True):
        model = AutoModelForCausalLM.from_pretrained(base)
        if (folder := out / "variants" / row["variant"]).is_dir():
            model, mixed = PeftModel.from_pretrained(model, folder), mixed + 1
        model.eval()
        answer = answers[row["id"]]["prediction"]
        if kind == "generation":
            assert answer == written(model, tokenizer, prompt)
        else:
            expected = scores(model, tokenizer, prompt, CHOICES)
            assert scored == [pytest.approx(expected, abs=1e-4)]
            assert answer == str(expected.index(max(expected)))
    assert mixed
