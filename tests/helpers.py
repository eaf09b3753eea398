"""What test files share and is no fixture: tiny adapters, query files, commands, and runs made by hand."""

import csv
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.factors import Factors
from router.constants import FORMAT
from router.library.adapters import load_library
from router.methods import load_method
from router.model import answer
from router.model.apply import applied
from router.pipeline.context import Context
from router.pipeline.evidence import Evidence
from router.routing.variants import Variant
from router.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def shared(name, what):
    """A folder beside the repository; the test is skipped where it is absent."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{what} are not on this machine")
    return folder


# Adapters of the tiny base model

WIDTHS = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}  # fmt: skip


def write_tiny_adapter(
    folder, seed, rank=4, kinds=tuple(WIDTHS), alpha=None, size=0.3, layers=(0, 1), **config
):
    """A random adapter for tiny_base as a PEFT folder, written without the code under test."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for kind in kinds:
            d_out, d_in = WIDTHS[kind]
            prefix = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) * size
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * size
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": rank,
        "lora_alpha": rank if alpha is None else alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(kind.rsplit(".", 1)[-1] for kind in kinds),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def raw_factors(folder):
    """lora_A and lora_B by module, straight from the file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    return {
        name: tuple(tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB") for name in names
    }


def dense_updates(folder):
    """s B A by module in float64, as the files of an adapter say."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    return {
        module: scale * (b.double() @ a.double()).numpy() for module, (a, b) in raw_factors(folder).items()
    }


def updates_in(library):
    """The dense updates of a library by module and by the adapter's number, in order of names."""
    found = {}
    for number, folder in enumerate(sorted(library.iterdir())):
        for module, update in dense_updates(folder).items():
            found.setdefault(module, {})[number] = update
    return found


def delta(factors):
    """B A in float64, not by the code under test."""
    return factors.b.double().numpy() @ factors.a.double().numpy()


NAMES = ["attention", "everything", "mlp"]


def write_tiny_library(folder):
    """Three adapters of different ranks and targets, one of them rsLoRA, called NAMES."""
    write_tiny_adapter(folder / "attention", 1, 4, tuple(WIDTHS)[:4], alpha=8)
    write_tiny_adapter(folder / "everything", 2, 2, alpha=2)
    write_tiny_adapter(folder / "mlp", 3, 6, tuple(WIDTHS)[4:], alpha=9, use_rslora=True)
    return folder


def method_of(name, base, *folders, **settings):
    """A method with a base model and a library in folders."""
    adapters = load_library([str(folder) for folder in folders])
    return load_method(name)(name, base, adapters, Context(Settings(**settings)))


def random_update(d_out, rank, d_in, seed):
    """Factors of a random update."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, d_in), (d_out, rank)))
    return Factors(a, b)


MIXED = Variant({"mlp": 0.5, "attention": 0.3, "everything": 0.15}, 0.05)  # of the tiny library


def stand_in(monkeypatch, **modules):
    """Puts modules of these contents in place of those that are not installed; `__` stands for a dot."""
    for name, content in modules.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)


class Killed(BaseException):
    """Ends a run as a kill does."""


def before_batches(patch, called):
    """Has `called(batch)` run before each batch is answered."""
    plain = answer.fitting
    patch.setattr(answer, "fitting", lambda batches, way: plain(batches, lambda of: (called(of), way(of))[1]))


@contextmanager
def killed_after(batches, monkeypatch):
    """A run in the block is killed after so many batches; yields those that it answered."""
    done = []

    def limited(batch):
        if len(done) == batches:
            raise Killed
        done.append(batch)

    with monkeypatch.context() as patch:
        before_batches(patch, limited)
        yield done


# Base models of many families


def family(name, vocabulary, **more):
    """A tiny random model of a family, with two tokens that end a text in its generation config."""
    common = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": [1, 7], "initializer_range": 0.3,
        "max_position_embeddings": 512,
    }  # fmt: skip
    special = {
        "mistral": {"sliding_window": 6}, "gemma2": {"sliding_window": 6},
        "gemma3_text": {"sliding_window": 6},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "mixtral": {"num_local_experts": 4},
        "gpt_neo": {"attention_types": [[["global"], 2]]},
        "gptj": {"rotary_dim": 8},
        "qwen2_moe": {
            "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 1,
        },
    }  # fmt: skip
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if name == "gemma3":  # reads pictures, too
        eyes = {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        }  # fmt: skip
        config = AutoConfig.for_model(
            name, text_config=common | {"sliding_window": 6} | more, vision_config=eyes
        )
    else:
        config = AutoConfig.for_model(name, **common | special.get(name, {}) | more)
    return AutoModelForCausalLM.from_config(config).eval()


FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "phi3", "gpt_neox", "opt",
    "mixtral", "qwen2_moe",
)  # fmt: skip


# Query files and results

COLUMNS = ("id", "input", "eval_type", "answer_choices", "adapter")
ROWS = [
    ("g1", "What is two and two?", "generation", "None", "attention"),
    ("m1", "Which is a fruit, stone or pear? ", "multiple_choice", "['stone', 'pear']", "mlp"),
    ("g2", "NA", "generation", "['a', 'b']", "mlp"),
    ("m2", 'Say "x", y\nor z.', "multiple_choice", "['x', 'y', 'z', 'none']", "base"),
    ("g3", "Bonjour, comment allez-vous aujourd'hui ?", "generation", "", "everything"),
    ("g4", "1 + 1 =", "generation", "", "base"),
]
PROMPTS = ["What is two and two?", "Bonjour, comment allez-vous ?", "1 + 1 =", "abc"]
CHAT = [{"role": "user", "content": "Say it again"}]
# A chat template.
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "
QUERIES = [ROWS[0], ROWS[1], ROWS[4]]
METHODS = ["base", "average", "proto_route", "oracle"]


def many_rows(count):
    """So many queries of several lengths, every third with choices."""
    choice, free = ("multiple_choice", "['a', 'bcd']"), ("generation", "")
    return [
        (f"{n:02}", f"{n} is a number" + ", is it" * (n % 7), *(free if n % 3 else choice))
        for n in range(count)
    ]


def write_csv(path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_queries(path, rows=ROWS, columns=COLUMNS):
    """A query file of rows with as many of the columns as they have, or fewer."""
    columns = columns[: len(rows[0])]
    return write_csv(path, columns, [row[: len(columns)] for row in rows])


def read_table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def weights_in(row):
    """The weight of each candidate in a row of a routing table."""
    return {name: float(value) for name, value in row.items() if name not in ("id", "variant")}


def read_by_id(path):
    return {row["id"]: row for row in read_table(path)}


def arguments(method, queries, library, base, out, *flags):
    """The command line of a run on the CPU in float32, with short answers."""
    paths = {"--dataset_filepaths": queries, "--adapters": [library]}  # of which several add up
    words = [
        "-m", method, *(word for flag, of in paths.items() if flag not in flags for word in (flag, *of)),
        "--base_model", base, "--output_folder", out, "--dtype", "float32", "--device", "cpu",
        "--max_gen_len", 6, *flags,
    ]  # fmt: skip
    return [str(word) for word in words]


# Finished runs


def files_of(out, but=("run.json", "report.html")):
    """The bytes of a run's files, but for those that hold times and what only an unfinished run has."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in but and ".journal" not in path.parts
    }


def variants_in(out):
    """The names of the variants in an output folder, beside the mark that says whose they are."""
    names = sorted(path.name for path in (out / "variants").iterdir())
    assert ".proto-route" in names
    return [name for name in names if name != ".proto-route"]


MODULES = [f"model.layers.{n}.{kind}" for n in range(6) for kind in ("self_attn.q_proj", "mlp.up_proj")]
NONE = float("nan")
# Three adapters; two score above the base model's threshold.
DECIDED = {
    "responses": [0.10, 0.20, 0.05],
    "scores": [3.0, 2.4, -1.0],
    "base_score": 0.8,
    "residual": 2.0,
    "votes": np.zeros(len(MODULES)),
    "frame": 0.0,
    "later": 0.0,
}


def write_run(out, weights, evidence=None, inputs=None, names=("one", "two", "three"), labels=None, **more):
    """A finished run by hand, a query and a variant for each row of weights.

    Args:
        evidence: fields of one query's that differ from DECIDED, the same of all; None writes none.
        labels: the variant of each query, if they differ from the rows' numbers.
        more: what else run.json holds.
    """
    out.mkdir(parents=True)
    path, columns = out.parent / f"{out.name}.csv", [*names, "base"]
    ids = [f"q{n}" for n in range(len(weights))]
    inputs = inputs or [f"Question {own}?" for own in ids]
    write_queries(path, [(own, text, "generation", "") for own, text in zip(ids, inputs, strict=True)])
    record = {
        "method": "by_hand", "format": FORMAT, "versions": {"torch": "1"}, "seconds": {"load": 1.5},
        "peak_mib": {"load": 9},
        "flags": {
            "dataset_filepaths": [str(path)], "output_folder": str(out),
            "temperature": 0.5, "false_positive_rate": 0.1,
        },
        "base": {
            "name": "tiny", "revision": None, "sha256": "0" * 64, "dtype": "float32", "device": "cpu",
        },
        "adapters": {name: {"revision": None, "sha256": name} for name in names},
        "n_variants": len(weights),
        "variants": [
            {"folder": f"variants/{n}", "queries": 1, "weights": dict(zip(columns, row, strict=True))}
            for n, row in enumerate(weights)
        ],
    } | more  # fmt: skip
    (out / "run.json").write_text(json.dumps(record))
    write_csv(out / path.name, ("id", "prediction"), [(own, f"answer {own}") for own in ids])
    labels = range(len(ids)) if labels is None else labels
    rows = [(own, label, *row) for own, label, row in zip(ids, labels, weights, strict=True)]
    write_csv(out / f"{out.name}.routing.csv", ("id", "variant", *columns), rows)
    if evidence is not None:
        fields = {key: np.array([value] * len(ids)) for key, value in (DECIDED | evidence).items()}
        Evidence(list(names), MODULES, **fields).save(out / f"{out.name}.evidence.safetensors")
    return out


def edit_json(path, **fields):
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), "utf-8")


def edit_weights(path, change):
    """Has `change(name, tensor)` make each tensor of a file anew; None leaves it out."""
    tensors = {key: change(key, of.clone()) for key, of in load_file(path).items()}
    path.unlink()  # it may be mapped
    tensors = {key: of.contiguous() for key, of in tensors.items() if of is not None}
    save_file(tensors, path, metadata={"format": "pt"})


def spoil(path, old, new):
    """Replaces a text in a file that has it."""
    content = path.read_text("utf-8")
    assert old in content
    path.write_text(content.replace(old, new), "utf-8")


# Answers of a base model


def plain_model(folder, adapter=None, dtype=torch.float32, **how):
    """A base model as transformers loads it, with an adapter as PEFT loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return (PeftModel.from_pretrained(model, adapter, **how) if adapter else model).eval()


def written(model, tokenizer, prompt, length=6):
    """What transformers generates greedily, as a submission has it."""
    ids = tokenizer(prompt, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=length, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True).removeprefix(" ")
    return text if text.strip() else "unknown"


def choice_scores(model, tokenizer, prompt, choices):
    """The log-probability of each choice and the end of the text, one by one, without a cache."""
    read, found = tokenizer(prompt)["input_ids"], []
    for choice in choices:
        tail = [*tokenizer(choice)["input_ids"], tokenizer.eos_token_id]
        with torch.inference_mode():
            logp = model(torch.tensor([[*read, *tail]]), use_cache=False).logits[0].log_softmax(-1)
        found.append(sum(float(logp[len(read) - 1 + n, token]) for n, token in enumerate(tail)))
    return found


IDS = torch.tensor([[5, 60, 7, 91, 12, 200, 33]])


def peft_deltas(model, adapter="default"):
    """The update of each module in float64, by PEFT's own layers."""
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach().double().numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def inputs_of(model, modules, run):
    """The inputs of modules for one prompt while `run()` reads it, by module, (T, d_in) float64."""
    seen = {}
    handles = [
        model.get_submodule(module).register_forward_hook(
            lambda _, args, out, module=module: seen.update({module: args[0][0].double().numpy()})
        )
        for module in modules
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


@contextmanager
def active(base, folder, how="auto"):
    """The base model with one folder active; None leaves it plain."""
    with applied(base, how) as models:
        yield models.activate(folder)


def logits(model):
    """Of one fixed prompt, (7, V)."""
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits[0].clone()
