"""vLLM in this process: a stub of its classes answers with transformers and PEFT."""

import json
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from helpers import ROWS, WIDTHS, active, read_by_id, stand_in, write_tiny_library
from router.model import vllm
from router.model.answer import answers, encode
from router.model.base import load_base
from router.pipeline.answering import answered_by_vllm
from router.pipeline.context import Context
from router.queries.submission import Query
from router.settings import Settings

LoRARequest = namedtuple("LoRARequest", "name number path")


class LLM:
    """What vLLM's class does, with transformers and PEFT."""

    made = ()  # those of a test
    says = None  # why it does not start

    def __init__(self, model, dtype, max_model_len, skip_tokenizer_init, enforce_eager, **loras):
        if self.says:
            raise ValueError(self.says)
        self.base, self.length, self.loras = load_base(model, "cpu", dtype), max_model_len, loras
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))
        self.asked = []
        LLM.made = (*LLM.made, self)

    def generate(self, prompts, params, *, lora_request, use_tqdm):
        paths = {one.path: one.number for one in lora_request if one}
        assert len(paths) < self.loras.get("max_loras", 1) and 0 not in paths.values()
        lengths = [len(one["prompt_token_ids"]) for one in prompts]
        self.asked.append(list(zip(lengths, lora_request, strict=True)))
        return [self.one(*of) for of in zip(prompts, params, lora_request, strict=True)]

    def one(self, prompt, how, lora):
        ids, model = prompt["prompt_token_ids"], self.base.model
        assert len(ids) + 1 <= self.length and how.temperature == 0
        if lora:
            model = PeftModel.from_pretrained(model, lora.path)
        told, written = None, []
        with torch.inference_mode():
            if vars(how).get("prompt_logprobs") is None:
                most = min(how.max_tokens, self.length - len(ids))
                written = model.generate(
                    torch.tensor([ids]), max_new_tokens=most, do_sample=False, eos_token_id=how.stop_token_ids
                )[0, len(ids) :].tolist()
            else:
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                scores = [{t: SimpleNamespace(logprob=float(logp[k, t]))} for k, t in enumerate(ids[1:])]
                told = [None, *scores]
        if lora:
            model.unload()
        return SimpleNamespace(prompt_logprobs=told, outputs=[SimpleNamespace(token_ids=written)])


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The stub under vLLM's names."""
    package = {"LLM": LLM, "SamplingParams": SimpleNamespace, "__spec__": SimpleNamespace()}  # `find_spec`'s
    stand_in(monkeypatch, vllm=package, vllm__lora={}, vllm__lora__request={"LoRARequest": LoRARequest})
    monkeypatch.setattr(LLM, "made", ())
    monkeypatch.setattr(vllm, "ENVIRONMENT", {})


QUERIES = [
    Query("g", "What is two and two?", "generation"),
    Query("m", "Which is a fruit? ", "multiple_choice", ("stone", "pear", "")),
    Query("h", "Say it again", "generation"),
    Query("n", "Colour? ", "multiple_choice", ("red", "two")),
]


@pytest.mark.parametrize("scoring", ["full", "kit"])
def test_each_prompt_is_answered_by_its_own_variant(base, tmp_path, scoring, monkeypatch):
    monkeypatch.setattr(vllm, "AT_ONCE", 3)
    library = write_tiny_library(tmp_path)
    paths = [library / "mlp", None, library / "attention", library / "mlp"]
    rows = encode(base.tokenizer, [query.input for query in QUERIES])
    done = []
    context = Context(Settings(scoring=scoring, max_gen_len=5))
    found = answered_by_vllm(base, QUERIES, rows, paths, context, done.append)
    assert sum(done) == sum(map(len, rows))
    for query, row, path, one in zip(QUERIES, rows, paths, found, strict=True):
        with active(base, path) as model:
            how = {"scoring": scoring, "max_new_tokens": 5}
            (own,) = answers(model, base.tokenizer, [row], [query.choices], **how)
        assert (one.text, one.ids) == (own.text, own.ids)
        assert one.scores == pytest.approx(own.scores, abs=1e-4)
    (llm,) = LLM.made
    assert llm.loras["max_loras"] == 3 and llm.loras["max_lora_rank"] == 8  # the library's rank is 4
    assert llm.loras["lora_target_modules"] == sorted(kind.partition(".")[2] for kind in WIDTHS)
    assert [len(part) for part in llm.asked] == [5, 2]  # a prompt for each choice


def test_a_run_has_the_same_results_as_in_this_process(command):
    flags = ("--false_positive_rate", 0.9, "--temperature", 3.0)
    _, there = command("proto_route", *flags, "--engine", "vllm")
    _, here = command("proto_route", *flags, out="here")
    answers = read_by_id(here / "queries.csv")
    assert read_by_id(there / "queries.csv") == answers and len(answers) == 6
    assert len({lora and lora.path for _, lora in LLM.made[0].asked[0]}) > 1
    assert json.loads((there / "run.json").read_text())["flags"]["engine"] == "vllm"


def test_what_is_kept_or_cannot_be_read_is_not_asked(base, caplog):
    rows = encode(base.tokenizer, [query.input for query in QUERIES])
    context = base.model.config.max_position_embeddings
    rows[3] = rows[3] * context
    rows[1] = [*rows[1], base.model.config.vocab_size]
    journal = {}
    context = Context(Settings(max_gen_len=5), journal=journal)
    first = answered_by_vllm(base, QUERIES, rows, [None] * 4, context)
    assert [one.failed for one in first] == [False, True, False, True]
    assert "query n: does not fit into a context" in caplog.text
    assert "query m: spells a token beyond" in caplog.text
    del journal[QUERIES[2]]
    assert answered_by_vllm(base, QUERIES, rows, [None] * 4, context) == first
    assert [length for length, _ in LLM.made[1].asked[0]] == [len(rows[2])]
    answered_by_vllm(base, QUERIES, rows, [None] * 4, context)
    assert len(LLM.made) == 2  # not even loaded


def test_a_run_whose_vllm_does_not_start_keeps_its_journal(command, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(LLM, "says", "No available memory for the\ncache blocks.")
        code, out = command("proto_route", "--engine", "vllm", rows=ROWS[:2])
    said = capsys.readouterr().err
    assert code == 2 and "No available memory for the cache blocks" in said
    assert "the same command goes on" in said and (out / ".journal" / "routing.safetensors").is_file()
    assert command("proto_route", "--engine", "vllm")[0] == 0


def test_what_does_not_go_together_is_refused(command, monkeypatch, capsys):
    for method, flags in (("proto_route", ("--device_map", "auto")), ("arrow", ())):
        assert command(method, *flags, "--engine", "vllm")[0] == 2
        assert (flags or ["--engine"])[0] in capsys.readouterr().err
    monkeypatch.setattr("router.methods.find_spec", lambda name: None)  # nor is there vLLM
    assert command("proto_route", "--engine", "vllm")[0] == 2 and "pip install" in capsys.readouterr().err
