"""Against what the unedited starter kit answered: tokens, predictions, scores and the exact average."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers import arguments, peft_deltas, plain_model, read_table
from router.main import main
from router.model.answer import encode
from router.queries.submission import read_queries
from router.run import answer

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


@pytest.mark.parametrize(("method", "length"), RUNS)
def test_answers_are_the_kits(kit_golden, tmp_path, monkeypatch, method, length):
    """But for its quirks in writing: of a choice's index the first digit, and predictions that are empty."""
    seen, base = [], kit_golden / "tiny_llama"
    monkeypatch.setattr("router.run.answer", lambda *of: seen.append(answer(*of)) or seen[-1])
    inputs = [kit_golden / "inputs" / f"{name}.csv" for name in FILES]
    words = arguments(method, inputs, kit_golden / "lora_r4_qv", base, tmp_path, "--scoring", "kit")
    words.insert(words.index("--base_model"), str(kit_golden / "lora_r8_all"))
    assert main([*words, "--max_gen_len", "16", "--max_seq_len", str(LENGTHS[length] or "none")]) == 0
    folder = kit_golden / "outputs" / f"{method}_{length}"
    golden = [row for name in FILES for row in golden_rows(folder, f"{name}.scores")]
    ours, kits = (
        [row for name in FILES for row in read_table(of / f"{name}.csv")] for of in (tmp_path, folder)
    )
    assert len(golden) == 142
    for own, kit, row, found in zip(ours, kits, golden, seen[0].answers, strict=True):
        assert own["id"] == kit["id"] == str(row["id"])
        if own["id"] == PANDAS_NAN:
            continue
        if row["eval_type"] == "multiple_choice":
            assert found.scores == pytest.approx(row["scores"], rel=0, abs=1e-3), own["id"]
            assert own["prediction"] == str(row["argmax"]), own["id"]
        else:
            assert list(found.ids) == row["generated_ids"], own["id"]
            assert own["prediction"] == (row["csv_prediction"] or "unknown"), own["id"]
        assert own == kit or row.get("argmax", 0) > 9 or row["csv_prediction"] == "", own["id"]
    if method == "base":
        return
    # What PEFT adds to every weight, in all layers, is the exact mean of both updates.
    updates = load_file(kit_golden / "average_delta.safetensors")
    added = peft_deltas(plain_model(base, tmp_path / "variants" / "0"))
    assert len(updates) == 14 and {f"{module}.weight" for module in added} == set(updates)
    for module, update in added.items():
        np.testing.assert_allclose(update, updates[f"{module}.weight"], rtol=0, atol=1e-6)
