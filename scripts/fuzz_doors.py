"""The doors of scripts/fuzz.py: sound files of each kind a stranger may send, and what opens them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import numpy as np
import torch

from merge.factors import Factors
from merge.folders import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from router.api import ABOUT, Router
from router.cli import main as command
from router.constants import LIBRARY
from router.errors import InputError
from router.hub import HubError
from router.journal import Journal
from router.library.adapters import card as text_of
from router.library.adapters import load_library
from router.library.command import check
from router.library.sources import CARD_FILE
from router.methods.cards import card_of
from router.model.answer import Answer
from router.model.base import Base
from router.result import Routing
from router.routing.evidence import Evidence
from router.routing.fitted import FORMAT, Fitted
from router.routing.gate import PrototypeGate
from router.routing.prototypes import ModulePrototypes, prototypes
from router.routing.variants import VARIANTS
from router.runs.compare import compare
from router.runs.explain import explain, open_console, show
from router.runs.load import load
from router.runs.report.page import write_report
from router.serving.names import read_served
from router.submission import COLUMNS, GENERATION, MULTIPLE_CHOICE, Query, read_queries, write_table

REAL = Path(__file__).parents[1] / LIBRARY / "chain_sum"  # its configuration and card
IDENTITY = {"method": "proto_route", "seed": 0, "adapters": [["one", "0"]]}
WIDTH = 16  # of the tiny model
MODULES = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qv"]
NAMES = ["one", "two"]
QUERIES = [Query("1", "Two and two?", GENERATION), Query("2", "a\nb", MULTIPLE_CHOICE, ("x", "y"))]


def queries() -> None:
    """A query file."""
    rows = [(q.id, q.input, q.eval_type, list(q.choices) or "") for q in QUERIES]
    write_table(Path("queries.csv"), COLUMNS, rows)


def adapters() -> None:
    """A library of two, each with the configuration and the card of a committed adapter."""
    for n, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(n)
        a, b = torch.randn(2, 8, WIDTH, generator=generator)
        folder = Path("library", name)
        write_adapter(folder, dict.fromkeys(MODULES, Factors(a, b.T.contiguous())), "tiny")
        config = json.loads((REAL / CONFIG_FILE).read_text("utf-8")) | {"r": 8, "lora_alpha": 8}
        (folder / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
        shutil.copy(REAL / CARD_FILE, folder)


def open_library(_: Path) -> None:
    """Reads every value, and computes what routing and `library check` do."""
    try:
        prototypes(load_library(["library"]))
    finally:
        json.dumps(check(["library"]))


def open_cards(path: Path) -> None:
    """Reads a model card in both places that do."""
    for name in NAMES:
        folder = Path("library", name)
        text_of(folder)
        card_of(cast(Any, SimpleNamespace(name="x", folder=SimpleNamespace(path=folder))))


COMMANDS = [
    "run\n-m\nproto_route\n--dataset_filepaths\nqueries.csv\n--output_folder\nout\n--top_k\n2\n--dtype\nfloat32",
    "run\n-m\nbase\n--temperature\n0.5\n--false_alarm\n0.1\n--n_variants\nauto\n--time_limit\n5\n--quiet",
    "run\n-m\nties\n--plan\n--memory_limit\n4\n--time_limit\n5\n--adapters\nlibrary\none\n--base_model\ntiny@1",
    "explain\nout\n7\n--json", "compare\nout\nother\n--labels\nlabels\n--show\n3", "report\nout",
    "library\ncheck\nlibrary\n--json", "--version",
    "export\nout\n--engine\nsglang\n--max_rank\n8",
    "serve\n--router\nout\n--upstream\nhttp://localhost:8000/v1\n--port\n80\n--timeout\n2.5\n--queue\n9",
]  # fmt: skip


def commands() -> None:
    """Command lines, a word a line, and the queries that they ask for."""
    queries()
    for n, words in enumerate(COMMANDS):
        Path(f"{n}.words").write_text(words, "utf-8")


def run_command(path: Path) -> None:
    """A command up to where it would load a model, ask the hub or serve."""
    words = path.read_bytes().replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")
    heavy = "router.run._run", "router.plan.plan", "router.serving.command._serve"
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ))
        stack.enter_context(patch("router.library.sources.fetch", side_effect=HubError("offline")))
        for name in heavy:
            stack.enter_context(patch(name, side_effect=InputError("loaded")))
        try:
            code = command([word.lstrip("/") for word in words])  # no folder of this machine
        except SystemExit as end:  # argparse's
            code = cast(int, end.code)
    assert code in (0, 2), f"exit code {code}"


def run_files() -> None:
    """A finished run on two queries, with its evidence and a variant's configuration."""
    queries()
    Path("out").mkdir()
    write_table(Path("out/queries.csv"), ("id", "prediction", "dummy_field"), [(1, "four", 0), (2, "1", 0)])
    rows = [(1, 0, 0.7, 0.29, 0.01), (2, 1, 0, 0, 1)]
    write_table(Path("out/queries.routing.csv"), ("id", "variant", *NAMES, "base"), rows)
    scores = np.array([[2.5, 1.0], [0.1, -0.5]], np.float32)
    Evidence(NAMES, MODULES, scores, scores, scores[0], scores).save(Path("out/queries.evidence.safetensors"))
    record = {
        "method": "proto_route", "versions": {"torch": "2.6"}, "seconds": {"load": 1.5},
        "peak_mib": {"load": 900}, "n_variants": 2, "low_margin": 1,
        "flags": {"dataset_filepaths": ["queries.csv"], "output_folder": "out", "temperature": 0.7,
                  "false_alarm": 0.2, "adapters": ["library"], "base_model": None, "seed": 0},
        "base": {"name": "tiny", "revision": None, "sha256": "0" * 64, "dtype": "float32", "device": "cpu"},
        "adapters": {name: {"revision": None, "sha256": "0" * 64} for name in NAMES},
        "variants": [
            {"folder": "variants/0", "queries": 1, "weights": {"one": 0.7, "two": 0.3, "base": 0}},
            {"folder": None, "queries": 1, "weights": {"base": 1}},
        ],
    }  # fmt: skip
    Path("out/run.json").write_text(json.dumps(record), "utf-8")
    variant(Path("out"))


def variant(out: Path) -> None:
    """What a server reads of the first variant in a folder."""
    path = out / VARIANTS / "0" / CONFIG_FILE
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"r": 8, "target_modules": ["q_proj", "v_proj"]}), "utf-8")


def open_run(_: Path) -> None:
    """Reads a finished run in every way that needs no model."""
    out = Path("out")
    show(explain(out, load(out).keys[0]), open_console())
    json.dumps(compare(out, out))
    read_served(out)
    write_report(out)


def journals() -> None:
    """The journal of a run that was killed."""
    journal = Journal(Path(), IDENTITY)
    journal[QUERIES[0]] = Answer("four", (3, 1))
    journal[QUERIES[1]] = Answer("1", scores=(-0.5, -0.25))
    scores = np.ones((2, 2), np.float32)
    journal.keep(
        "routing",
        Routing(np.full((2, 3), 1 / 3), Evidence(NAMES, MODULES, scores, scores, scores[0], scores)),
    )
    journal.close()


def open_journal(_: Path) -> None:
    """Goes on with a run, as `router.run` does."""
    journal = Journal(Path(), IDENTITY)
    try:
        assert all(isinstance(journal[query].text, str) for query in QUERIES if query in journal)
        if kept := journal.kept("routing", 2):
            assert kept.weights.shape == (2, 3) and np.isfinite(kept.weights).all()
    finally:
        journal.close()


@cache
def tiny() -> Any:
    """A random base model of one layer; its rows are token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    return Base(
        model.eval(),
        cast(Any, SimpleNamespace(pad_token_id=0, eos_token_id=None, get_vocab=dict)),
        "tiny",
        None,
        "0" * 64,
    )


def saved_router() -> None:
    """A saved router, with its variant's configuration."""
    tiny()
    rng = np.random.default_rng(0)
    responses = rng.uniform(0.1, 0.2, (20, 2, 2, 2)).astype(np.float32)
    owners = torch.tensor([0, 0, 1, 1])
    protos = {
        m: ModulePrototypes(torch.eye(WIDTH, 4), torch.full((4,), 0.5), owners.clone()) for m in MODULES
    }
    gate = PrototypeGate().fit(responses, confidence=rng.normal(size=20))
    means = {m: torch.zeros(WIDTH) for m in MODULES}
    Fitted(NAMES, protos, means, gate, [0, 1], [], [], responses.mean(0)).save(Path())
    about = {
        "format": FORMAT, "proto-route": "0", "base_model": "tiny", "revision": None, "embedded": False,
        "base_sha256": "0" * 64, "dtype": "float32", "candidates": [*NAMES, "base"],
        "settings": {"max_seq_len": None, "max_gen_len": 64, "scoring": "full", "seed": 0},
        "variants": [{"weights": {"one": 1.0}, "base": 0.0}, {"weights": {}, "base": 1.0}],
        "centres": [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
    }  # fmt: skip
    Path(ABOUT).write_text(json.dumps(about), "utf-8")
    variant(Path())


def open_router(_: Path) -> None:
    """Loads a router and decides two prompts with it, which are token ids."""
    with patch("router.api.load_base", return_value=tiny()), patch("router.model.answer.encode"):
        router = Router.load(Path(), device="cpu")
        with patch.object(router._method, "encoded", return_value=[[3, 4, 5], [6]]):
            for choice in router.choose(["a", "b"]):
                assert choice.variant in range(len(router.variants)) and set(choice.weights) <= set(
                    router.candidates
                )
    read_served(Path())


class Door(NamedTuple):
    """What a stranger's file comes in by."""

    make: Callable[[], None]
    damaged: str  # pattern of the files of which one is damaged
    open: Callable[[Path], object]
    part: str = ""  # of a safetensors file that is damaged alone


DOORS = {
    "queries": Door(queries, "queries.csv", read_queries),
    "config": Door(adapters, f"library/one/{CONFIG_FILE}", open_library),
    "header": Door(adapters, f"library/one/{WEIGHTS_FILE}", open_library, "header"),
    "body": Door(adapters, f"library/one/{WEIGHTS_FILE}", open_library, "body"),
    "card": Door(adapters, f"library/one/{CARD_FILE}", open_cards),
    "command": Door(commands, "*.words", run_command),
    "run": Door(run_files, "out/*.*", open_run),
    "journal": Door(journals, ".journal/[!.]*", open_journal),
    "router": Door(saved_router, "router.*", open_router),
}
