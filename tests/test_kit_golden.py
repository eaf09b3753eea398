"""Against what the unedited starter kit answered: tokens, predictions, scores and the exact average."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers import active, method_of, peft_deltas, read_table
from router.library.adapters import load_library
from router.main import main
from router.model.answer import encode
from router.model.base import load_base
from router.queries.submission import read_queries

FILES = ("test", "cosmos_qa", "xsum", "quirks")
PANDAS_NAN = "9017"  # its input is the text NA, which the kit's pandas read as missing and then as "nan"
RUNS = [("base", "full"), ("base", "len256"), ("average", "full"), ("average", "len256")]
LENGTHS = {"full": None, "len256": 256}


def golden_rows(folder, name):
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizer(kit_golden):
    return AutoTokenizer.from_pretrained(kit_golden / "tiny_llama", padding_side="left")


@pytest.mark.parametrize("name", FILES)
def test_tokens_are_the_kits(kit_golden, tokenizer, name):
    queries = read_queries(kit_golden / "inputs" / f"{name}.csv")
    golden = golden_rows(kit_golden / "tokens", name)
    assert [query.id for query in queries] == [str(row["id"]) for row in golden]
    ids = encode(tokenizer, [query.input for query in queries])
    for query, row, found in zip(queries, golden, ids, strict=True):
        if query.id == PANDAS_NAN:
            assert query.input == "NA" and encode(tokenizer, ["nan"]) == [row["input_ids"]]
        else:
            assert found == row["input_ids"], query.id
        if query.eval_type == "multiple_choice":
            choices = tokenizer(list(query.choices), add_special_tokens=False)["input_ids"]
            assert [[*choice, tokenizer.eos_token_id] for choice in choices] == row["choice_ids"], query.id


def expected(row):
    """The kit's prediction of one row, without its two quirks in writing."""
    if row["eval_type"] == "multiple_choice":
        return str(row["argmax"])  # its CSV holds an index's first digit only
    return row["csv_prediction"] or "unknown"  # its CSV has empty predictions


@pytest.mark.parametrize(("method", "length"), RUNS)
def test_predictions_are_the_kits(kit_golden, tmp_path, method, length):
    arguments = [
        "-m", method, "--dataset_filepaths", *(str(kit_golden / "inputs" / f"{name}.csv") for name in FILES),
        "--output_folder", str(tmp_path), "--base_model", str(kit_golden / "tiny_llama"),
        "--adapters", str(kit_golden / "lora_r4_qv"), str(kit_golden / "lora_r8_all"), "--scoring", "kit",
        "--device", "cpu", "--dtype", "float32", "--max_gen_len", "16",
        "--max_seq_len", str(LENGTHS[length] or "none"),
    ]  # fmt: skip
    assert main(arguments) == 0
    for name in FILES:
        folder = kit_golden / "outputs" / f"{method}_{length}"
        ours, kits = read_table(tmp_path / f"{name}.csv"), read_table(folder / f"{name}.csv")
        scores = golden_rows(folder, f"{name}.scores")
        quirky = {
            str(row["id"]) for row in scores if row.get("argmax", 0) > 9 or row["csv_prediction"] == ""
        } | {PANDAS_NAN}
        assert [row["id"] for row in ours] == [row["id"] for row in kits]
        for own, kit, row in zip(ours, kits, scores, strict=True):
            if own["id"] not in quirky:
                assert own == kit
            elif own["id"] != PANDAS_NAN:
                assert own["prediction"] == expected(row), own["id"]


@pytest.mark.parametrize(("name", "length"), RUNS)
def test_scores_and_generated_ids_are_the_kits(kit_golden, tmp_path, name, length):
    base = load_base(str(kit_golden / "tiny_llama"), "cpu", "float32")
    library = load_library([str(kit_golden / folder) for folder in ("lora_r4_qv", "lora_r8_all")])
    how = {"scoring": "kit", "max_gen_len": 16, "max_seq_len": LENGTHS[length]}
    method = method_of(name, base, library, output_folder=tmp_path, **how)
    queries = [query for file in FILES for query in read_queries(kit_golden / "inputs" / f"{file}.csv")]
    asked = [replace(q, input="nan") if q.id == PANDAS_NAN else q for q in queries]
    answers = method.answer(asked).answers
    folder = kit_golden / "outputs" / f"{name}_{length}"
    golden = [row for file in FILES for row in golden_rows(folder, f"{file}.scores")]
    assert len(golden) == 142
    for query, found, row in zip(queries, answers, golden, strict=True):
        if row["eval_type"] == "multiple_choice":
            assert found.scores == pytest.approx(row["scores"], rel=0, abs=1e-3), query.id
            assert found.text == str(row["argmax"]), query.id
        else:
            assert list(found.ids) == row["generated_ids"], query.id
            assert found.text == row["csv_prediction"], query.id
    if name == "base":
        return
    # What PEFT adds to every weight, in all layers, is the exact mean of both updates.
    updates = load_file(kit_golden / "average_delta.safetensors")
    with active(base, tmp_path / "variants" / "0", "beside") as model:
        added = peft_deltas(model, "variant")
    assert len(updates) == 14 and {f"{module}.weight" for module in added} == set(updates)
    for module, update in added.items():
        np.testing.assert_allclose(update, updates[f"{module}.weight"], rtol=0, atol=1e-6)
