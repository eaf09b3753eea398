"""The command, from flags to files: answers, records, refusals, and a starter kit's method."""

import html
import json
import math
import os
import re
import shutil
import signal
import sys
from importlib.metadata import version
from io import BytesIO, TextIOWrapper
from pathlib import Path
from unittest.mock import ANY, Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import router.methods
from helpers import (
    COLUMNS,
    METHODS,
    NAMES,
    ROWS,
    Killed,
    choice_scores,
    edit_weights,
    files_of,
    killed_after,
    plain_model,
    read_table,
    variants_in,
    weights_in,
    write_queries,
    write_tiny_adapter,
    written,
)
from merge.folders import WEIGHTS_FILE
from router.cli import main as cli
from router.kit import Merges
from router.main import main
from router.model.answer import FAILED
from router.pipeline.journal import Journal
from router.runs.load import load
from router.system.errors import InputError
from router.system.files import sha256_of

FILES = {"queries.csv", "queries.routing.csv", "report.html", "run.json", "variants"}  # of a run


def answers_of(model, tiny_base, rows):
    """Query by query, with neither batches nor cache sharing: greedy, and the likeliest choice."""
    tokenizer, answers = AutoTokenizer.from_pretrained(tiny_base), []
    for _, text, kind, choices, *_ in rows:
        if kind == "generation":
            answers.append(written(model, tokenizer, text))
        else:
            scores = choice_scores(model, tokenizer, text, json.loads(choices.replace("'", '"')))
            answers.append(str(scores.index(max(scores))))
    return answers


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_answers_routing_record_and_variants(command, capsys, tiny_base, tiny_library, method):
    code, out = command(method)
    assert code == 0 and str(out) in capsys.readouterr().out
    evidence = {"queries.evidence.safetensors"} if method == "proto_route" else set()
    assert {path.name for path in out.iterdir()} == FILES | evidence
    answers = read_table(out / "queries.csv")
    assert [(row["id"], row["dummy_field"]) for row in answers] == [(row[0], "0") for row in ROWS]
    assert all(row["prediction"] for row in answers)

    routing, record = read_table(out / "queries.routing.csv"), json.loads((out / "run.json").read_text())
    assert list(routing[0]) == ["id", "variant", *NAMES, "base"]
    assert [row["id"] for row in routing] == [row[0] for row in ROWS]
    for weights in map(weights_in, routing):
        assert min(weights.values()) >= 0 and sum(weights.values()) == pytest.approx(1, abs=1e-5)

    assert record["method"] == method
    assert record["versions"]["proto-route"] == version("proto-route")
    assert record["flags"]["max_gen_len"] == 6 and record["flags"]["output_folder"] == str(out)
    assert record["seconds"].keys() == record["peak_mib"].keys() >= {"load", "clusters", "predict"}
    assert len(record["base"].pop("configuration")) == 64
    assert record["base"] == {
        "name": str(tiny_base), "revision": None, "dtype": "float32", "device": "cpu",
        "tokens_at_once": 512, "apply": "merged", "sha256": sha256_of(tiny_base / "model.safetensors"),
    }  # fmt: skip
    assert record["adapters"] == {
        name: {
            "revision": None, "content": ANY,
            "sha256": sha256_of(tiny_library / name / "adapter_model.safetensors"),
        }
        for name in NAMES
    }  # fmt: skip

    variants = record["variants"]
    assert len(variants) == record["n_variants"]
    for n, variant in enumerate(variants):
        assert variant["queries"] == sum(row["variant"] == str(n) for row in routing) > 0
        assert sum(variant["weights"].values()) == pytest.approx(1)
    if method == "average":
        assert variants[0]["weights"] == pytest.approx(dict.fromkeys(NAMES, 1 / 3) | {"base": 0})
    folders = [variant["folder"] for variant in variants if variant["folder"]]
    assert sorted(folders) == [f"variants/{name}" for name in variants_in(out)]
    assert bool(folders) == (method != "base")


def test_oracle_answers_with_each_querys_own_adapter(command, tiny_base, tiny_library):
    code, out = command("oracle")
    assert code == 0
    found = {row["id"]: row["prediction"] for row in read_table(out / "queries.csv")}
    for name in (*NAMES, "base"):
        rows = [row for row in ROWS if row[4] == name]
        model = plain_model(tiny_base, None if name == "base" else tiny_library / name)
        assert [found[row[0]] for row in rows] == answers_of(model, tiny_base, rows)
    write_tiny_adapter(tiny_library / "mlp+code", 4)
    labels = {"mlp": ["mlp"], "mlp + attention ": ["mlp", "attention"], "mlp+code": ["mlp+code"]}
    labels["attention+base+mlp"] = ["attention", "base", "mlp"]
    code, out = command("oracle", rows=[(label, "a", "generation", "", label) for label in labels])
    assert code == 0
    for row in read_table(out / "queries.routing.csv"):  # the mean of those that a query needs
        needed = labels[row["id"]]
        expected = {name: (name in needed) / len(needed) for name in (*NAMES, "mlp+code", "base")}
        assert weights_in(row) == pytest.approx(expected, abs=1e-6)


WRONG = """
import numpy as np
from router.pipeline.result import Routing
from router.pipeline.steps import Method

class Wrong(Method):
    def route(self, queries, rows):
        return Routing({})
"""


@pytest.mark.parametrize(
    "weights",
    [
        "np.ones((len(queries), 3))", "np.full((len(queries), 4), np.nan)", "np.eye(7)[:6, :4]", "None",
        "None)\n\nclass Another(Wrong):\n    other = (1",
    ],
)  # fmt: skip
def test_a_method_that_is_none_is_refused_before_an_answer(command, own_method, capsys, weights):
    own_method("wrong", WRONG.format(weights))
    code, out = command("wrong")
    assert code == 2 and "-m wrong: expected" in capsys.readouterr().err
    assert not (out / "queries.csv").exists()


@pytest.mark.parametrize("method", ["proto_route", "average"])
def test_the_same_command_gives_the_same_bytes(command, method):
    first, second = (command(method, out=name)[1] for name in ("one", "two"))
    assert files_of(first) == files_of(second)
    assert len(files_of(first)) >= 2
    records = [json.loads((folder / "run.json").read_text()) for folder in (first, second)]
    for record in records:
        del record["seconds"], record["peak_mib"], record["flags"]["output_folder"]
    assert records[0] == records[1]


def test_a_second_run_replaces_the_first(command, capsys):
    command("proto_route")
    capsys.readouterr()
    _, out = command("base", "--quiet")
    assert capsys.readouterr() == ("", "")
    assert variants_in(out) == [] and {path.name for path in out.iterdir()} == FILES
    assert {row["base"] for row in read_table(out / "queries.routing.csv")} == {"1"}


def test_every_query_file_gets_its_own_answers(command, tmp_path):
    second = write_queries(tmp_path / "more.csv", rows=ROWS[3:5])
    _, alone = command("oracle", out="alone")
    code, out = command("oracle", "--dataset_filepaths", second, tmp_path / "queries.csv")
    assert code == 0
    assert (out / "queries.csv").read_bytes() == (alone / "queries.csv").read_bytes()
    assert read_table(out / "more.csv") == read_table(alone / "queries.csv")[3:5]
    rows = [*read_table(out / "more.routing.csv"), *read_table(out / "queries.routing.csv")]
    assert [row["id"] for row in rows] == ["m2", "g3", *(row[0] for row in ROWS)]
    assert all(float(row[own[4]]) == 1 for row, own in zip(rows, [*ROWS[3:5], *ROWS], strict=True))


def other_file(tmp_path, name="queries.csv", **spec):
    """Another queries.csv."""
    (tmp_path / "other").mkdir()
    return write_queries(tmp_path / "other" / name, **spec)


# What makes the flags from a folder with queries.csv, and what the error names.
REFUSED = {
    "missing CSV": ("base", lambda t: ["--dataset_filepaths", t / "none.csv"], "none.csv: "),
    "a name that is no text": (
        "base", lambda t: ["--dataset_filepaths", t / os.fsdecode(b"q\xff.csv")], r"q\udcff.csv: ",
    ),
    "files of one name": (
        "base", lambda t: ["--dataset_filepaths", t / "queries.csv", other_file(t)], "--dataset_filepaths",
    ),
    "files of one name on a Mac": (
        "base",
        lambda t: ["--dataset_filepaths", t / "queries.csv", other_file(t, "Queries.csv")],
        "--dataset_filepaths",
    ),
    "results over queries": ("base", lambda t: ["--output_folder", t], "--output_folder"),
    "output is a dead link": ("base", lambda t: ["--output_folder", t / "link"], "--output_folder"),
    "output is a file": ("base", lambda t: ["--output_folder", t / "queries.csv"], "--output_folder"),
    "a base with such a name": ("average", lambda t: ["--base_model", "x" * 300], "--base_model xxx"),
    "an adapter with such a name": ("average", lambda t: ["--adapters", "x" * 300], "--adapters xxx"),
    "no base": ("average", lambda t: ["--base_model", t / "no" / "model"], "--base_model"),
    "an adapter that does nothing": (
        "proto_route", lambda t: ["--adapters", write_tiny_adapter(t / "zero", 1, size=0.0)], "adapter zero",
    ),
    "no labels": (
        "oracle", lambda t: ["--dataset_filepaths", other_file(t, columns=COLUMNS[:4])], "adapter",
    ),
    "two labels of a query": (
        "oracle",
        lambda t: ["--dataset_filepaths", *(
            write_queries(t / f"{name}.csv", [("1", "a", "generation", "", name)]) for name in NAMES[:2]
        )],
        f"{NAMES[1]}.csv, line 2, column adapter",
    ),
    "unknown label": (
        "oracle",
        lambda t: ["--dataset_filepaths", other_file(t, rows=[("1", "a", "generation", "", "mlp+lyrics")])],
        "line 2, column adapter: 'lyrics'",
    ),
}  # fmt: skip


def test_bad_adapters_change_nothing_but_what_is_said(command, capsys, tmp_path):
    _, expected = command("proto_route", out="expected")
    write_tiny_adapter(tmp_path / "library" / "dora", 1, use_dora=True)
    # One of a base model of half the width.
    other = write_tiny_adapter(tmp_path / "library" / "foreign", 1, kinds=("self_attn.q_proj",))
    edit_weights(other / WEIGHTS_FILE, lambda key, of: of[:, :16] if "lora_A" in key else of[:16])
    code, out = command("proto_route", "--skip_bad")
    told = capsys.readouterr()
    assert code == 0 and files_of(out) == files_of(expected)
    first, second = json.loads((out / "run.json").read_text())["left_out"]
    assert "use_dora" in first and "foreign" in second
    for reason in (first, second):
        assert reason in told.err and reason in told.out
        assert html.escape(reason) in (out / "report.html").read_text()
    assert command("proto_route", out="other")[0] == 2


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_person_can_mend_is_one_line_and_exit_code_2(command, capsys, tmp_path, kind):
    method, flags, cause = REFUSED[kind]
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    code, out = command(method, *flags(tmp_path))
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    (error,) = [line for line in captured.err.splitlines() if "peak memory" not in line]
    assert error.startswith("error: ") and cause in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "accepted"),
    [
        (["-m", "nope"], METHODS),
        ([], METHODS),
        (["-m", "base", "--max_gen_len", "1" * 5000], ["--max_gen_len", "'1111"]),
        (["-m", "base", "--device", "tpu"], ["--device", "auto", "cpu", "cuda"]),
    ],
)
def test_wrong_flags_are_refused_with_what_is_accepted(capsys, flags, accepted):
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in accepted) and len(error) < 400


KIT_METHOD = """
import torch
from peft import get_peft_model, set_peft_model_state_dict

from router.kit import Merges


class KitAvg(Merges):
    def __init__(self, name):
        super().__init__(name)
        self.list_models = [(FIRST, "of no matter"), (SECOND, "v2")]
        self.base_model_name = BASE
        self.base_model_revision_id = None
        self.is_peft = True
        self.max_seq_len = None
        self.max_gen_len = 6
        self.device = torch.device("cpu")
        self.architecture = "decoder"

    def merge(self):
        super()._load_huggingface_models_and_configs()
        parameters = list(self.loaded_models.values())
        config = list(self.loaded_configs.values())[0]
        for name in sorted(parameters[0]):
            self.merged_model[name] = torch.stack([p[name] for p in parameters]).mean(0)
        self._load_base_model()
        self._load_tokenizer()
        self.base_model = get_peft_model(self.base_model, config)
        set_peft_model_state_dict(self.base_model, self.merged_model)
        self.base_model.eval()
        return self.base_model
"""


@pytest.fixture()
def kit_method(tmp_path, tiny_base, own_method, monkeypatch):
    """A starter kit's method in a new file among the methods; returns its two adapters, one of the hub's."""
    folders = [
        write_tiny_adapter(tmp_path / "kit" / name, seed, base_model_name_or_path=str(tiny_base))
        for seed, name in enumerate("ab")
    ]
    monkeypatch.setattr("router.library.sources.fetch", lambda spec, *_, **__: (folders[1], spec, "0123abc"))
    first, base = str(folders[0]), str(tiny_base)
    own_method("kit_avg", f"FIRST, SECOND, BASE = {first!r}, 'some/adapter', {base!r}\n{KIT_METHOD}")
    return folders


def test_a_starter_kits_method_answers_as_it_stands(command, tmp_path, tiny_base, kit_method):
    _, out = command("average")
    assert (out / "variants" / "0").is_dir()  # which are not the kit's
    argv = ["--dataset_filepaths", str(write_queries(tmp_path / "queries.csv")), "--dtype", "float32"]
    assert main(["-m", "kit_avg", *argv, "--output_folder", str(out)]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["method"] == "kit_avg" and list(record["seconds"]) == ["merge", "predict"]
    assert not (out / "variants").exists()

    first, second = (load_file(folder / "adapter_model.safetensors") for folder in kit_method)
    mean = {key: (value + second[key]) / 2 for key, value in first.items()}
    write_tiny_adapter(tmp_path / "mean", 0)
    save_file(mean, tmp_path / "mean" / "adapter_model.safetensors")
    model = plain_model(tiny_base, tmp_path / "mean")
    found = [row["prediction"] for row in read_table(out / "queries.csv")]
    assert found == answers_of(model, tiny_base, ROWS)
    assert found != answers_of(plain_model(tiny_base), tiny_base, ROWS)


KIT_FULL_METHOD = """
import torch

from router.kit import Merges


class KitFull(Merges):
    def __init__(self, name):
        super().__init__(name)
        self.list_models = [(FIRST, None), (SECOND, None)]
        self.base_model_name = FIRST
        self.max_gen_len = 6

    def merge(self):
        super()._load_huggingface_models_and_configs()
        first, second = self.loaded_models.values()
        self.merged_model = {name: (value + second[name]) / 2 for name, value in first.items()}
        self._load_base_model()
        self.base_model.load_state_dict(self.merged_model)
        return self.base_model

    def generate(self, batch):
        ids, texts = super().generate(batch)
        return [torch.tensor(row) for row in ids], texts
"""


def test_a_starter_kits_method_of_whole_models_answers(command, tmp_path, tiny_base, own_method):
    torch.manual_seed(1)
    shutil.copytree(tiny_base, second := tmp_path / "second")
    edit_weights(second / "model.safetensors", lambda key, of: of + 0.1 * torch.randn_like(of))
    own_method("kit_full", f"FIRST, SECOND = {str(tiny_base)!r}, {str(second)!r}\n{KIT_FULL_METHOD}")
    code, out = command("kit_full")
    shutil.copytree(second, mean := tmp_path / "mean")
    first = load_file(tiny_base / "model.safetensors")
    edit_weights(mean / "model.safetensors", lambda key, of: (of + first[key]) / 2)
    found = [row["prediction"] for row in read_table(out / "queries.csv")]
    assert code == 0 and found == answers_of(plain_model(mean), tiny_base, ROWS)
    assert found != answers_of(plain_model(tiny_base), tiny_base, ROWS)


@pytest.mark.parametrize("call", ["generate", "predict_multiple_choice"])
def test_a_starter_kits_method_that_leaves_queries_out(command, kit_method, monkeypatch, capsys, call):
    plain = getattr(Merges, call)
    monkeypatch.setattr(Merges, call, lambda self, batch: [part[1:] for part in plain(self, batch)])
    code, out = command("kit_avg")
    assert code == 2 and "-m kit_avg: expected" in capsys.readouterr().err
    assert not (out / "queries.csv").exists()


def test_a_run_killed_between_its_files_is_no_finished_run(command, monkeypatch):
    _, out = command("proto_route")
    earlier, replace = (out / "report.html").read_bytes(), Path.replace

    def killed(path, target):
        if path.parent.name.startswith(".results") and path.name == "queries.routing.csv":
            sys.exit("killed")
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "replace", killed)
        command("oracle")
    with pytest.raises(InputError, match=r"run\.json: "):
        load(out)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("router.run.write_report", lambda *_: sys.exit("killed"))
        command("oracle")
    assert load(out).record.method == "oracle" and not (out / "report.html").exists()
    assert command("oracle")[0] == 0 and load(out).record.method == "oracle"
    assert (out / "report.html").read_bytes() != earlier and not list(out.glob(".*"))


def test_files_of_two_runs_do_not_pass_for_one(command):
    _, out = command("proto_route")
    load(out)
    _, other = command("oracle", out="other")
    for name in ("queries.csv", "queries.routing.csv"):
        before = (out / name).read_bytes()
        shutil.copy(other / name, out / name)
        with pytest.raises(InputError, match=name):
            load(out)
        (out / name).write_bytes(before)


def test_answers_to_another_query_file_stay_and_are_known(command, tmp_path, monkeypatch):
    _, out = command("base")
    first = (out / "queries.csv").read_bytes()
    other = ("--dataset_filepaths", write_queries(tmp_path / "other.csv", ROWS[:2]))
    shutil.copy(tmp_path / "queries.csv", tmp_path / "same.csv")
    assert command("base", "--dataset_filepaths", tmp_path / "same.csv")[0] == 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("router.run._place_variants", lambda *_: sys.exit("killed"))
        command("base", *other)
    assert not (out / "run.json").exists()
    assert command("base", *other)[0] == 0
    assert {"queries.csv", "same.csv"} <= load(out).record.earlier.keys()
    assert (out / "queries.csv").read_bytes() == first and set(load(out).stems) == {"other"}
    assert command("base")[0] == 0 and set(load(out).stems) == {"queries"}
    (out / "other.csv").write_text("mine")
    assert command("base", *other)[0] == 2 and (out / "other.csv").read_text() == "mine"


@pytest.fixture()
def unloaded(monkeypatch):
    """Fails where a method is loaded."""
    monkeypatch.setattr("router.run.load_method", lambda name: pytest.fail("loaded"))


def test_a_file_system_that_cannot_be_written_is_refused(command, capsys, unloaded):
    assert command("proto_route", out="/proc/nothing/here")[0] == 2
    assert "--output_folder" in capsys.readouterr().err


def test_a_killed_run_of_a_kits_method_does_not_go_on_with_another_adapter(
    command, kit_method, monkeypatch, capsys, tmp_path
):
    weights = kit_method[0] / "adapter_model.safetensors"
    weights.rename(tmp_path / "theirs.safetensors")
    weights.symlink_to(tmp_path / "theirs.safetensors")  # as in the hub's cache
    with pytest.raises(Killed), killed_after(1, monkeypatch):
        command("kit_avg", "--batch_size", 1)
    edit_weights(tmp_path / "theirs.safetensors", lambda key, of: 2 * of)
    assert command("kit_avg", "--batch_size", 1)[0] == 2 and "differs in files" in capsys.readouterr().err
    assert command("kit_avg", "--batch_size", 1, "--fresh")[0] == 0


LOOP, LONG = "loop", "x" * 300  # a link in a circle, and a name that no file can have


@pytest.mark.parametrize("more", [[], ["--plan"]])
@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--dataset_filepaths", LOOP),
        ("--output_folder", LOOP),
        ("--output_folder", LONG),
        ("--chat_template", LONG),
    ],
)
def test_a_path_that_cannot_be_looked_up_is_refused(command, tmp_path, capsys, flag, name, more):
    (tmp_path / LOOP).symlink_to(tmp_path / LOOP)
    assert command("base", flag, tmp_path / name, *more)[0] == 2
    assert str(tmp_path / name) in capsys.readouterr().err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_no_temporary_folders(command, capsys, monkeypatch, sent):
    from router.pipeline.steps import Method

    predict = Method.predict

    def stopped(self, *args):
        os.kill(os.getpid(), sent)
        return predict(self, *args)

    monkeypatch.setattr(Method, "predict", stopped)
    before = signal.getsignal(signal.SIGTERM)
    # A shell starts what it puts in the background with SIGINT ignored, the tests too.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, out = command("average")
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
    assert code == 130 and [path.name for path in out.iterdir()] == [".journal"]
    assert "Traceback" not in capsys.readouterr().err


def test_where_nothing_finite_comes_out_the_run_ends(command, capsys, monkeypatch, kit_method):
    """As activations that overflow with a variant, when the base model's alone do not."""
    discard = Journal.discard
    with monkeypatch.context() as patch:
        # As on Windows, where nothing is removed that is open.
        still = lambda journal: "_file" in vars(journal) and not journal._file.closed  # noqa: E731
        patch.setattr(Journal, "discard", lambda journal: still(journal) or discard(journal))
        patch.setattr("router.model.answer.generate", lambda _, __, rows, ___: [FAILED] * len(rows))
        patch.setattr("router.model.answer.score_choices", lambda *a: [(math.nan,)] * len(a[2]))
        code, out = command("average")
    assert code == 2 and "--max_seq_len" in capsys.readouterr().err
    assert not (out / "run.json").exists() and not (out / "queries.csv").exists()
    assert command("average", "--max_seq_len", 5)[0] == 0  # no journal stands in its way
    for folder in kit_method:
        edit_weights(folder / "adapter_model.safetensors", lambda key, of: of * math.nan)
    code, out = command("kit_avg", out="kit")
    assert code == 2 and "--max_seq_len" in capsys.readouterr().err
    assert not (out / "queries.csv").exists()
    (kit_method[1] / "adapter_model.safetensors").rename(kit_method[1] / "adapter_model.bin")
    assert command("kit_avg", out="kit")[0] == 2 and "pickles" in capsys.readouterr().err


FULL = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))


@pytest.mark.parametrize("way", [FULL, lambda _, __, rows, ___: [FAILED] * len(rows)])
def test_the_id_of_a_query_does_not_control_the_terminal(command, capsys, monkeypatch, way):
    monkeypatch.setattr("router.model.answer.generate", way)
    rows = [("\x1b[2Jg", "a", "generation", ""), ("m", "b", "multiple_choice", "['x', 'y']")]
    code, _ = command("base", rows=rows)
    told = "".join(capsys.readouterr())
    assert code == 0 and "query \\x1b[2Jg: " in told and "\x1b" not in told


def test_half_a_character_of_a_choice_reaches_the_report(command, tiny_base):
    code, out = command("base", rows=[("half", "Which?", "multiple_choice", r"['\ud83d']", "base"), *ROWS])
    assert code == 0 and not (out / ".journal").exists()
    found = [row["prediction"] for row in read_table(out / "queries.csv")]
    assert found == ["0", *answers_of(plain_model(tiny_base), tiny_base, ROWS)]
    page = (out / "report.html").read_text("utf-8")
    data = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    assert data["predictions"][0] == "0: \ud83d" and data["predictions"][1] == found[1]


@pytest.mark.parametrize("flags", [(), ("--fresh",)])
@pytest.mark.parametrize(
    "name",
    [
        "queries.csv", "queries.routing.csv", "queries.evidence.safetensors", "run.json", "report.html",
        ".commit.json", ".lock", "variants", "variants/mine.txt", ".journal/mine.txt",
        ".journal/identity.json", "queries.csv/mine.txt", "run.json/mine.txt", "report.html/mine.txt",
    ],
)  # fmt: skip
def test_something_else_that_no_run_wrote_is_left_alone(name, flags, command, tmp_path, capsys, unloaded):
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text('{"pace": 5}')
    assert command("proto_route", *flags)[0] == 2
    error = capsys.readouterr().err
    assert name.partition("/")[0] in error or "--output_folder" in error
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == '{"pace": 5}'


@pytest.mark.parametrize(
    "name", ["run.json", "report.html", ".lock", "variants", ".journal", "chat_template.jinja"]
)
def test_a_query_file_of_a_name_that_a_run_needs_is_refused(name, command, tmp_path, capsys, unloaded):
    assert command("base", "--dataset_filepaths", write_queries(tmp_path / name))[0] == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("name", ["variants/mine.txt", "variants/0/README.md", "report.html", "queries.csv"])
def test_a_result_that_somebody_changed_is_left_alone(name, command, capsys):
    _, out = command("average")
    assert command("average")[0] == 0  # over its own
    with (out / name).open("a") as file:
        file.write("mine")
    before = files_of(out)
    assert command("average")[0] == 2 and name.partition("/")[0] in capsys.readouterr().err
    assert files_of(out) == before
    if name == "report.html":
        assert cli(["report", str(out)]) == 2 and files_of(out) == before


@pytest.mark.parametrize(
    "name", [name for name in router.methods.method_names() if name not in ("base", "cards")]
)
def test_weights_that_are_replaced_while_a_run_reads_are_refused(
    name, command, tiny_library, monkeypatch, capsys
):
    """So that no answer of the new ones stands under the hash of the old ones."""
    from router.run import load

    def then_changed(context):
        found = load(context)
        for folder in tiny_library.iterdir():
            file = folder / WEIGHTS_FILE
            save_file({key: 2 * of for key, of in load_file(file).items()}, file)
        return found

    monkeypatch.setattr("router.run.load", then_changed)
    code, out = command(name)
    assert code == 2 and not (out / "run.json").exists() and "adapter " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["queries.csv", "variants"])
def test_a_file_that_is_put_there_meanwhile_is_not_replaced(command, tmp_path, monkeypatch, name):
    from router.run import answer

    def slow(*of):
        (tmp_path / "out" / name).write_text("mine")
        return answer(*of)

    with monkeypatch.context() as patch:
        patch.setattr("router.run.answer", slow)
        code, out = command("base")
    assert code == 2 and (out / name).read_text() == "mine"
    (out / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("router.model.answer.generate", lambda *_: pytest.fail("asked again"))
        assert command("base")[0] == 0


def test_a_token_beyond_the_embeddings_costs_its_prompts_alone(command, tmp_path, tiny_base):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    odd = [
        ("x1", "Say [PAD] to me", "generation", "", "base"),
        ("x2", "Which?", "multiple_choice", "['[PAD]', 'b']", "base"),
    ]
    _, plain = command("proto_route", out="plain")
    code, out = command("proto_route", rows=[*odd, *ROWS], base=base)
    first, second = ([row["prediction"] for row in read_table(of / "queries.csv")] for of in (plain, out))
    assert code == 0 and second == ["unknown", "unknown", *first]


def test_variants_that_are_the_own_adapters_are_not_replaced(
    command, tmp_path, capsys, tiny_base, own_method
):
    _, out = command("oracle")
    (tmp_path / "linked").symlink_to(next(path for path in (out / "variants").iterdir() if path.is_dir()))
    before = files_of(out)
    for adapters in (out / "variants", tmp_path / "linked"):
        assert command("average", "--adapters", adapters)[0] == 2
        assert f"--adapters {adapters}" in capsys.readouterr().err and files_of(out) == before
    assert command("average", "--adapters", out / "variants", out="other")[0] == 0
    one, base = str((tmp_path / "linked").resolve()), str(tiny_base)
    own_method("kit_avg", f"FIRST, SECOND, BASE = {one!r}, {one!r}, {base!r}\n{KIT_METHOD}")
    assert command("kit_avg")[0] == 2 and f"-m kit_avg: {one}" in capsys.readouterr().err
    assert files_of(out) == before and command("kit_avg", out="other")[0] == 0


def test_letters_that_the_output_cannot_spell_are_escaped(command, tmp_path, monkeypatch):
    write_tiny_adapter(tmp_path / "accents/où", 0)
    monkeypatch.setattr("sys.stdout", TextIOWrapper(BytesIO(), "ascii"))
    assert command("average", library=tmp_path / "accents")[0] == 0
    assert command("average", "--json", library=tmp_path / "accents")[0] == 0
    assert cli(["explain", str(tmp_path / "out"), "g1"]) == 0
    sys.stdout.flush()
    text, record, told = re.split(r"\n(?={)|(?<=})\n", sys.stdout.buffer.getvalue().decode("ascii"))
    assert list(json.loads(record)["adapters"]) == ["où"] and all("o\\xf9" in one for one in (text, told))


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_results_have_the_rights_that_the_umask_leaves(command, mask):
    old = os.umask(mask)
    try:
        _, out = command("proto_route")
    finally:
        os.umask(old)
    for path in out.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path
