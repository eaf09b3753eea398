"""The committed library and queries, and the real base model on a part of them."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard

from helpers import ROOT, read_table, weights_in, write_csv
from router.api import Router
from router.constants import LIBRARY
from router.library.adapters import check_against_base, load_library
from router.main import main
from router.model.base import EMBEDDED, EMBEDDED_ID, embedded_gguf, linear_shapes, load_base
from router.queries.submission import read_queries
from router.routing.homes import FORMS

EVAL = sorted((ROOT / "data" / "eval").glob("*.csv"))


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Nothing is made quicker here."""


def test_the_library_is_small_sound_and_better_than_the_base_model():
    adapters, skills = load_library([str(LIBRARY)]), set()
    sizes = [file.stat().st_size for file in LIBRARY.rglob("*") if file.is_file()]
    assert len(adapters) >= 16 and sum(sizes) <= 64 << 20 and max(sizes) <= 10 << 20
    for adapter in adapters:
        card = ModelCard.load(adapter.folder.path / "README.md")
        assert adapter.folder.base_model == card.data.base_model == EMBEDDED_ID
        assert card.data.license == "apache-2.0"
        skills |= set(card.data.tags)
        score, base = re.search(r"answered exactly \| (\S+) \(base model: (\S+)\)", card.text).groups()
        assert float(score) - float(base) >= 0.15
        assert card.data.eval_results[0].metric_value == pytest.approx(float(score), abs=0.005)
    assert {"reasoning", "maths", "coding", "chat", "tool-use"} <= skills


def test_queries_are_complete_and_kept_apart():
    names = {adapter.name for adapter in load_library([str(LIBRARY)])}
    assert {path.stem for path in EVAL} == names
    seen = set()
    for path in EVAL:
        known, unseen = read_table(path), read_table(ROOT / "data" / "eval_unseen" / path.name)
        assert len(known) >= 25 and len(unseen) >= 25
        assert len({row["phrasing"] for row in unseen}) >= 2
        assert {row["adapter"] for row in known} == {path.stem}
        seen |= {row["input"] for row in known + unseen}
    without = [p for p in (ROOT / "data" / "eval_unseen").glob("*.csv") if p.stem not in names]
    assert len(without) >= 3 and all(row["adapter"] == "base" for p in without for row in read_table(p))
    queries = read_queries(ROOT / "data" / "test.csv")
    assert not seen & {query.input for query in queries}
    assert {query.eval_type for query in queries} == {"generation", "multiple_choice"}


@pytest.mark.slow
def test_the_embedded_model_holds_the_weights_of_its_gguf_file():
    from gguf import GGUFReader, dequantize

    base = load_base(EMBEDDED, "cpu", "float32")
    tensors = {tensor.name: tensor for tensor in GGUFReader(embedded_gguf()).tensors}
    for theirs, ours in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
        tensor = tensors[f"blk.7.{theirs}.weight"]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        torch.testing.assert_close(base.model.model.layers[7].get_submodule(ours).weight.data, expected)
    check_against_base(load_library([str(LIBRARY)]), EMBEDDED_ID, False, linear_shapes(base.model))


@pytest.mark.slow
def test_queries_in_the_experts_phrasing_reach_their_expert(tmp_path):
    part = [{**row, "id": f"{path.stem}-{row['id']}"} for path in EVAL for row in read_table(path)[:4]]
    queries = write_csv(tmp_path / "part.csv", list(part[0]), [row.values() for row in part])
    found = {}
    for method in ("proto_route", "oracle"):
        out = tmp_path / method
        assert main(["-m", method, "--dataset_filepaths", str(queries), "--output_folder", str(out)]) == 0
        answers = read_table(out / "part.csv")
        assert [row["id"] for row in answers] == [row["id"] for row in part]
        assert all(row["prediction"] for row in answers)
        pairs = zip(answers, part, strict=True)
        found[method] = sum(a["prediction"].strip() == b["target"] for a, b in pairs) / len(part)
    routing = read_table(tmp_path / "proto_route" / "part.routing.csv")
    right = 0
    for row, wanted in zip(routing, part, strict=True):
        weights = weights_in(row)
        assert sum(weights.values()) == pytest.approx(1, abs=1e-4)
        right += max(weights, key=weights.get) == wanted["adapter"]
    assert right / len(part) >= 0.95
    assert found["oracle"] >= 0.5
    assert found["proto_route"] >= 0.9 * found["oracle"]
    record = json.loads((tmp_path / "proto_route" / "run.json").read_text())
    assert record["base"]["name"] == EMBEDDED_ID


@pytest.mark.slow
def test_adapters_of_chats_are_told_from_those_of_bare_prompts():
    chats = LIBRARY.with_name("library_chat")
    router = Router.from_library(LIBRARY, chats, device="cpu", dtype="float32")
    fitted = router._method.fitted()
    homes = {name: FORMS[home] for name, home in zip(fitted.names, fitted.homes, strict=True) if home}
    assert homes == {folder.name: "the chat template" for folder in chats.iterdir()}


@pytest.mark.slow
def test_a_file_of_chats_is_answered_by_their_adapters(tmp_path):
    folder = ROOT / "data"
    lines = [json.loads(line) for line in (folder / "eval_chat.jsonl").read_text("utf-8").splitlines()][::6]
    asked = [{"id": f"{n}", "messages": line["messages"]} for n, line in enumerate(lines)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)), "utf-8")
    words = ["--dataset_filepaths", str(tmp_path / "asked.jsonl"), "--adapters", str(folder / "library_chat")]
    words += ["--output_folder", str(tmp_path / "out"), "--max_gen_len", "8"]
    assert main(["-m", "proto_route", *words]) == 0
    right = []
    for row, line in zip(read_table(tmp_path / "out" / "asked.routing.csv"), lines, strict=True):
        weights = weights_in(row)
        right.append(max(weights, key=weights.get) == line["adapter"])
    assert sum(right) / len(right) >= 0.8
    assert all(row["prediction"] for row in read_table(tmp_path / "out" / "asked.csv"))
