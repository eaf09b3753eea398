"""The plan of a run: what it tells of files that a test can weigh itself, and what limits do."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import NAMES, ROWS, write_tiny_adapter
from router.main import main


def planned(capsys, command, *flags):
    capsys.readouterr()
    code, out = command("proto_route", "--plan", *flags)
    return code, out, capsys.readouterr()


def test_a_plan_tells_of_adapters_queries_and_stages(capsys, command, tiny_base, tiny_library):
    code, out, told = planned(capsys, command, "--json")
    found = json.loads(told.out)
    assert code == 0 and [path.name for path in out.iterdir()] == ["plan.json"]
    assert json.loads((out / "plan.json").read_text()) == found
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    assert found["prompt_tokens"] == sum(len(tokenizer(row[1])["input_ids"]) for row in ROWS)
    assert {name: (own["rank"], own["modules"]) for name, own in found["adapters"].items()} == {
        "attention": (4, 8), "everything": (2, 14), "mlp": (6, 6),
    }  # fmt: skip
    assert list(found["adapters"]) == NAMES and found["download"] == {"adapters": [], "base": []}
    stages = ["load", "prototypes", "calibrate", "probe", "variants", "predict"]
    assert list(found["seconds"]) == stages and all(value >= 0 for value in found["seconds"].values())
    low, likely, high = found["total_seconds"]
    assert low <= likely <= high and likely == pytest.approx(sum(found["seconds"].values()), abs=0.5)
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_base).parameters()) * 4 / 2**20
    assert weights < found["peak_mib"]["load"] <= found["peak_mib"]["predict"]


def test_a_run_keeps_its_plan_beside_what_it_took(capsys, command):
    _, out, _ = planned(capsys, command)
    command("proto_route")
    record = json.loads((out / "run.json").read_text())
    assert record["plan"]["seconds"] == json.loads((out / "plan.json").read_text())["seconds"]
    assert set(record["plan"]["seconds"]) <= set(record["seconds"])
    again = json.loads(planned(capsys, command, "--json")[2].out)
    assert again["n_variants"] == record["n_variants"] and again["known_from_an_earlier_run"]
    assert again["seconds"]["calibrate"] == 0
    command("base", "--plan")  # another method's
    command("proto_route")
    assert "plan" not in json.loads((out / "run.json").read_text())
    planned(capsys, command)
    command("proto_route", "--temperature", 2.0)  # another run: the plan was not made for it
    assert "plan" not in json.loads((out / "run.json").read_text())
    planned(capsys, command)
    command("proto_route", "--false_alarm", 0.3)
    assert "plan" not in json.loads((out / "run.json").read_text())


@pytest.mark.parametrize(
    ("flags", "code", "verdict"),
    [
        (("--time_limit", 1000, "--memory_limit", 1000), 0, "fits"),
        (("--time_limit", 0.001), 1, "does not fit"),
        (("--memory_limit", 0.001), 1, "does not fit"),
    ],
)
def test_limits_decide_the_exit_code(capsys, command, flags, code, verdict):
    found, _, told = planned(capsys, command, *flags)
    lines = [line for line in told.out.splitlines() if line.startswith("--")]
    assert found == code and len(lines) == len(flags) / 2
    assert all(f": {verdict}, about" in line for line in lines)


def test_limits_without_a_plan_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["-m", "base", "--memory_limit", "5"])
    assert caught.value.code == 2 and "--plan" in capsys.readouterr().err


def test_what_is_not_here_would_be_downloaded(capsys, command, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    _, _, told = planned(capsys, command, "--adapters", "nobody/such-adapter@0000000")
    assert "to download: nobody/such-adapter@0000000" in told.out
    flags = ("--adapters", "nobody/such-adapter@0000000", "--time_limit", "1000")
    code, _, told = planned(capsys, command, *flags)
    assert code == 1 and "unknown until the adapters are here" in told.out
    code, _, told = planned(capsys, command, "--base_model", "nobody/such-model")
    assert code == 2 and "nobody/such-model is not here" in told.err


def test_a_broken_adapter_is_refused_as_by_the_run(capsys, command, tiny_library):
    (tiny_library / "mlp" / "adapter_model.safetensors").write_bytes(b"broken")
    code, out, told = planned(capsys, command)
    assert code == 2 and "mlp" in told.err and not out.exists()


def test_flags_change_the_plan(capsys, command):
    found = json.loads(planned(capsys, command, "--json", "--n_variants", 1, "--max_seq_len", 5)[2].out)
    assert found["n_variants"] == 1 and found["prompt_tokens"] <= 5 * len(ROWS)


@pytest.mark.parametrize("method", ["base", "average"])
def test_static_methods_have_no_routing_to_plan(capsys, command, method):
    code, out = command(method, "--plan")
    found = json.loads((out / "plan.json").read_text())
    assert code == 0 and list(found["seconds"]) == ["load", "variants", "predict"]


def test_a_method_of_unknown_cost_is_refused(capsys, command):
    code, out = command("ties", "--plan")
    assert code == 2 and "expected -m proto_route, base, average" in capsys.readouterr().err
    assert not out.exists()


def test_adapters_of_upper_layers_alone_can_be_planned(tmp_path, capsys, tiny_base, command):
    write_tiny_adapter(tmp_path / "upper" / "one", 0, layers=(1,), layers_to_transform=[1])
    code, _, _ = planned(capsys, command, "--adapters", tmp_path / "upper")
    assert code == 0


def test_the_copy_of_the_weights_counts_where_variants_are_merged_or_vllm_loads_one(
    capsys, command, monkeypatch
):
    from router.plan import estimate

    seen = {}
    real = estimate._memory

    def watched(base, dtype, n_parameters, copied, *rest):
        # As if every weight were a MiB, so that the tiny model shows in whole MiB.
        found = real(base, dtype, n_parameters, copied * 2**18, *rest)
        return {
            stage: value - real(base, dtype, n_parameters, 0, *rest)[stage] for stage, value in found.items()
        }

    monkeypatch.setattr(estimate, "_memory", watched)
    monkeypatch.setattr("router.run.find_spec", lambda name: name)  # as if vLLM were here
    for name, flag in (("merged", "--apply"), ("beside", "--apply"), ("vllm", "--engine")):
        _, _, told = planned(capsys, command, "--json", flag, name)
        seen[name] = json.loads(told.out)["peak_mib"]
    # q, k, v, o, gate, up and down of both layers: all of them are changed by some adapter.
    weights = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32)
    assert seen["beside"]["predict"] == 0 and seen["merged"]["load"] == 0
    assert 0 < seen["merged"]["predict"] <= weights and seen["merged"]["predict"] > 0.9 * weights
    assert seen["vllm"]["load"] == 0 and seen["vllm"]["predict"] > weights  # it loads the embeddings, too
