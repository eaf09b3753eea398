"""The command that serves variants: exact, runnable, and of the rank that was asked for."""

import json
import shlex
import shutil
import subprocess
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import (
    NAMES,
    arguments,
    edit_json,
    plain_model,
    write_queries,
    write_tiny_adapter,
    write_tiny_library,
)
from merge.folders import open_adapter
from router.cli import main as cli
from router.main import main as run
from router.model.base import EMBEDDED_ID
from router.serving.names import read_served
from router.system.files import sha256_of


def main(words):
    return cli(["export", *words])


WARM = ("--false_positive_rate", 0.9, "--temperature", 3.0)  # so that there are variants, and mixed ones


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base):
    """A run that all tests may copy."""
    folder = tmp_path_factory.mktemp("finished")
    queries, library = write_queries(folder / "queries.csv"), write_tiny_library(folder / "library")
    assert run(arguments("proto_route", [queries], library, tiny_base, folder / "out", *WARM)) == 0
    return folder / "out"


@pytest.fixture()
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def words_of(folder):
    text = (folder / "serve.sh").read_text()
    assert text.startswith("#!/bin/sh\n")
    return shlex.split(text.splitlines()[-1])


def folders_in(out):
    return sorted(path for path in (out / "variants").iterdir() if path.is_dir())


def name_of(path):
    """What a server calls the variant in a folder."""
    return f"variant-{path.name}-{hash_of(path)[:8]}"


def hash_of(path):
    return sha256_of(path / "adapter_config.json", path / "adapter_model.safetensors")


def accepted(out, number=0):
    """A stranger's run, whole: its record names what is in a variant's folder now."""
    record = json.loads((out / "run.json").read_text())
    record["variants"][number]["sha256"] = hash_of(out / "variants" / str(number))
    (out / "run.json").write_text(json.dumps(record))


def modules_in(out):
    """Kinds of modules that the weights of the variants are of."""
    return {module.rpartition(".")[2] for path in folders_in(out) for module in open_adapter(path).ranks}


def test_vllm_gets_every_variant_by_name_and_a_slot_more(out, capsys, tiny_base, tmp_path, monkeypatch):
    out = out.rename(tmp_path / "lr=1e-4,seed=3")
    assert cli(["check", str(out)]) == 0
    said = capsys.readouterr().out
    assert "3 adapters" in said and all(name_of(path) in said for path in folders_in(out))
    assert cli(["export", str(out)]) == 0
    words, folders = words_of(out), folders_in(out)
    assert words[:4] == ["exec", "vllm", "serve", str(tiny_base)] and words[-1] == "$@"
    assert words[words.index("--max-loras") + 1] == str(len(folders) + 1)
    ranks = [json.loads((path / "adapter_config.json").read_text())["r"] for path in folders]
    assert words[words.index("--max-lora-rank") + 1] == str(max(ranks))
    assert modules_named(words) == sorted(modules_in(out))
    modules = map(json.loads, words[words.index("--lora-modules") + 1 : -1])
    named = {module["name"]: module["path"] for module in modules}
    assert named == {name_of(path): str(path.resolve()) for path in folders} and folders
    assert f"{len(folders)} variants" in capsys.readouterr().out
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    how = {"capture_output": True, "text": True, "check": True}
    ran = subprocess.run([out / "serve.sh", "--port", "9 9"], **how).stdout.splitlines()
    assert ran[0] == "serve" and ran[-2:] == ["--port", "9 9"]
    copied = shutil.copytree(out, tmp_path / "copied") / "serve.sh"  # its variants stay where they were
    ran = subprocess.run(["sh", copied], capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and not ran.stdout and "export again" in ran.stderr


def test_a_base_model_that_is_elsewhere_now_is_served_from_there(out, tiny_base, tmp_path, capsys):
    moved = shutil.copytree(tiny_base, tmp_path / "a base")
    assert main([str(out), "--base_model", str(moved)]) == 0 and words_of(out)[3] == str(moved)
    assert main([str(out), "--base_model", "a/base@v1"]) == 0 and {"a/base", "v1"} <= set(words_of(out))
    assert main([str(out), "--base_model", "embedded"]) == 0 and EMBEDDED_ID in words_of(out)
    assert main([str(out), "--base_model", "./nowhere"]) == 2
    assert "--base_model ./nowhere" in capsys.readouterr().err


def modules_named(words):
    start = words.index("--lora-target-modules") + 1
    return list(takewhile(lambda word: not word.startswith("--"), words[start:]))


def test_a_module_that_is_called_like_a_flag_is_refused(out, capsys):
    """Modules come from the weights: what the configuration calls them is never a word of the command."""
    config = folders_in(out)[0] / "adapter_config.json"
    targets = json.loads(config.read_text())["target_modules"]
    edit_json(config, target_modules=[*targets, "!x", "@args", "--trust-remote-code"])
    accepted(out)
    assert main([str(out)]) == 0
    assert modules_named(words_of(out)) == sorted(modules_in(out))
    (out / "serve.sh").unlink()
    file = config.with_name("adapter_model.safetensors")
    odd = {
        f"base_model.model.layers.0.--trust-remote-code.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (8, 4)), ("B", (4, 8)))
    }
    save_file(odd, file)
    edit_json(config, target_modules=["--trust-remote-code"], r=8, lora_alpha=8)
    accepted(out)
    assert main([str(out)]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err and not (out / "serve.sh").exists()


@pytest.mark.parametrize(
    "base",
    [
        {"name": "--config=evil.yaml"}, {"name": "a b"}, {"name": "@args"},
        {"revision": "--trust-remote-code"}, {"dtype": "--trust-remote-code"}, {"dtype": "nn"},
    ],
)  # fmt: skip
def test_no_word_of_a_strangers_run_is_a_flag(out, capsys, base):
    plain = json.loads((out / "run.json").read_text())["base"]
    edit_json(out / "run.json", base=plain | base)
    assert main([str(out)]) == 2
    assert "run.json" in capsys.readouterr().err and not (out / "serve.sh").exists()


def test_what_no_export_wrote_is_left_alone(out, llama_cpp, capsys):
    assert main([str(out)]) == main([str(out)]) == 0  # over an earlier export's
    written = (out / "serve.sh").read_text()
    for mine in ("#!/bin/sh\necho mine\n", written.replace("vllm serve", "nice vllm serve")):
        (out / "serve.sh").write_text(mine)
        assert main([str(out)]) == 2 and "serve.sh" in capsys.readouterr().err
        assert (out / "serve.sh").read_text() == mine
    (out / "serve.sh").unlink()
    low = ["--max_rank", "1"]
    for name, words in (("gguf", llama_cpp), ("variants-rank-1", low)):
        (out / name).mkdir()
        (out / name / "mine").write_text("mine")
        assert main([str(out), *map(str, words)]) == 2 and str(out / name) in capsys.readouterr().err
        assert [path.read_text() for path in (out / name).iterdir()] == ["mine"]
        shutil.rmtree(out / name)
    assert main([str(out), *low]) == main([str(out), *low]) == 0
    edit_json(next((out / "variants-rank-1").glob("*/adapter_config.json")), lora_alpha=99)
    assert main([str(out), *low]) == 2


CONVERTER = """
import argparse, pathlib, shutil
p = argparse.ArgumentParser()
p.add_argument("--base", type=pathlib.Path)
p.add_argument("--outfile")
p.add_argument("adapter", type=pathlib.Path)
args = p.parse_args()
assert (args.base / "config.json").is_file()
shutil.copy(args.adapter / "adapter_model.safetensors", args.outfile)
"""


@pytest.fixture()
def llama_cpp(tmp_path):
    """What stands in for llama.cpp: a converter that takes the same words, and a base model."""
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_lora_to_gguf.py").write_text(CONVERTER)
    (tmp_path / "base.gguf").touch()
    return ["--engine", "llamacpp", "--llama_cpp", tmp_path / "llama.cpp", "--gguf", tmp_path / "base.gguf"]


def test_llamacpp_gets_the_adapters_with_scaled_factors(out, llama_cpp, tiny_library, tiny_base, capsys):
    assert main([str(out), *map(str, llama_cpp)]) == 0
    words = words_of(out)
    scaled = [words[n + 1].rpartition(":") for n, word in enumerate(words) if word == "--lora-scaled"]
    assert {scale for *_, scale in scaled} == {"0"}  # a request that names none gets none
    files = [Path(file) for file, *_ in scaled]
    assert [file.name for file in files] == [f"{name}.gguf" for name in NAMES]
    assert words[1] == "llama-server"
    assert "3 adapters" in capsys.readouterr().out
    for file, name in zip(files, NAMES, strict=True):
        peft = plain_model(tiny_base, tiny_library / name)
        kept = load_file(file)
        for key in [key for key in kept if "lora_A" in key]:
            module = peft.get_submodule(key.removesuffix(".lora_A.weight"))
            update = kept[key.replace("lora_A", "lora_B")] @ kept[key]
            torch.testing.assert_close(update, module.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


def test_a_saved_router_has_its_variants_for_llamacpp(router_of, llama_cpp, capsys, tmp_path):
    saved = router_of(false_positive_rate=0.9).fit(["Say 1", "Bonjour 2"]).save(tmp_path / "saved")
    for _ in range(2):  # the second time over the first
        assert main([str(saved), *map(str, llama_cpp)]) == 0
    made = {f"{name_of(path)}.gguf" for path in folders_in(saved)}
    assert {path.name for path in (saved / "gguf").glob("*.gguf")} == made and made
    assert cli(["check", str(saved)]) == 0
    shutil.rmtree(folders_in(saved)[0])
    for command in ("check", "export"):
        assert cli([command, str(saved)]) == 2 and "router.json" in capsys.readouterr().err


def test_what_llamacpp_lacks_is_refused_and_nothing_is_left(command, llama_cpp, tiny_library, capsys):
    _, out = command("proto_route", *WARM)
    capsys.readouterr()

    def refused(*words):
        assert main([str(out), "--engine", "llamacpp", *map(str, words)]) == 2
        assert not list(out.glob("*gguf*")) and not (out / "serve.sh").exists()
        return capsys.readouterr().err

    checkout, gguf = llama_cpp[3], llama_cpp[5]
    assert "--llama_cpp" in refused("--gguf", gguf)
    assert "convert_lora_to_gguf.py" in refused("--gguf", gguf, "--llama_cpp", out)
    assert "GGUF" in refused("--llama_cpp", checkout)
    script = checkout / "convert_lora_to_gguf.py"
    script.write_text("raise ValueError('this architecture is not known')")
    assert "this architecture is not known" in refused(*llama_cpp[2:])
    write_tiny_adapter(tiny_library / "mlp", 9)
    assert "mlp" in refused(*llama_cpp[2:])
    for name in ("lr=1e-4,seed=3", "12:30"):
        out = out.rename(out.with_name(name))
        assert name in refused(*llama_cpp[2:])


def test_a_lower_rank_is_the_best_one_and_its_loss_is_told(out, llama_cpp, capsys):
    before = read_served(out)
    assert main([str(out), "--max_rank", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    for name, path in before.folders.items():
        small = out / "variants-rank-1" / path.name
        lost = total = 0.0
        for (module, update), (_, kept) in zip(
            open_adapter(path).read_all(), open_adapter(small).read_all(), strict=True
        ):
            dense = update.b.double() @ update.a.double()
            values = torch.linalg.svdvals(dense)
            assert torch.linalg.matrix_rank(kept.b @ kept.a) <= 1, module
            difference = (dense - kept.b.double() @ kept.a.double()).square().sum()
            assert float(difference) == pytest.approx(float(values[1:].square().sum()), rel=1e-3, abs=1e-6)
            lost, total = lost + float(values[1:].square().sum()), total + float(values.square().sum())
        assert f"{name}: rank 1, {100 * lost / total:.2f} %" in "\n".join(said)
    assert f"variants-rank-1/{path.name}" in " ".join(words_of(out))
    for words, files in (([], "variants-rank-3/*/*.safetensors"), (llama_cpp, "gguf/*.gguf")):
        assert main([str(out), *map(str, words), "--max_rank", "3"]) == 0
        written = [weights for file in out.glob(files) for weights in load_file(file).values()]
        assert written and {min(weights.shape) for weights in written} == {3}
        text = words_of(out)
        assert words or text[text.index("--max-lora-rank") + 1] == "8"  # the least that it accepts for 3


def test_a_rank_that_vllm_lacks_is_refused(out, capsys):
    write_tiny_adapter(folders_in(out)[0], 9, rank=600)
    accepted(out, int(folders_in(out)[0].name))
    assert main([str(out)]) == 2
    assert "--max_rank 512" in capsys.readouterr().err and not (out / "serve.sh").exists()
    assert main([str(out), "--max_rank", "512"]) == 0
    (out / "variants").rename(out / "variants-rank-1")  # made of an earlier export's
    (out / "variants").symlink_to(out / "variants-rank-1")
    assert main([str(out), "--max_rank", "1"]) == 2 and "not replaced" in capsys.readouterr().err


def exchanged(out):
    first, second, *_ = (path / "adapter_model.safetensors" for path in folders_in(out))
    first.write_bytes(second.read_bytes())


def rescaled(out):
    edit_json(folders_in(out)[0] / "adapter_config.json", lora_alpha=400)


def without_variants(out):
    shutil.rmtree(out / "variants")
    edit_json(out / "run.json", variants=[{"folder": None, "queries": 1, "weights": {"base": 1.0}}])


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (shutil.rmtree, ""), (without_variants, ""), (exchanged, "variants/"), (rescaled, "variants/"),
        (lambda out: (out / "run.json").write_text("{"), "run.json"),
        (lambda out: shutil.rmtree(folders_in(out)[-1]), "variants/"),
    ],
)  # fmt: skip
def test_what_has_no_variants_is_refused(out, capsys, harm, named):
    harm(out)
    assert cli(["check", str(out)]) == main([str(out)]) == 2
    assert capsys.readouterr().err.count(str(out / named)) >= 2 and not (out / "serve.sh").exists()


def test_names_of_an_earlier_run_do_not_stay(command, router_of, tmp_path):
    """A server that is started again would give them to other weights."""
    flags = "proto_route", "--false_positive_rate"
    _, out = command(*flags, 0.9)
    saved = router_of().fit(["a", "b"]).save(tmp_path / "saved")
    for folder, again in (
        (out, lambda: command(*flags, 0.5)),
        (saved, lambda: router_of().fit(["a"]).save(saved)),
    ):
        assert main([str(folder)]) == 0 and (folder / "serve.sh").exists()
        again()
        assert not (folder / "serve.sh").exists()
    assert main([str(out)]) == 0
    (out / "serve.sh").write_text("mine")
    command(*flags, 0.9)
    assert (out / "serve.sh").read_text() == "mine"


def test_variants_of_an_earlier_run_are_not_served(command, monkeypatch, capsys):
    """They are still there if a run cannot replace them, which costs it no answer."""
    warm = ("proto_route", "--false_positive_rate", 0.9)
    command(*warm)
    with monkeypatch.context() as patch:
        patch.setattr("router.run.remove_ours", lambda folder: None)
        for words in ((*warm, "--variant_rank", 1), ("base",), ("arrow",)):  # the last mixes for each token
            code, out = command(*words)
            assert code == 0 and folders_in(out)
            assert main([str(out)]) == 2 and str(out) in capsys.readouterr().err
