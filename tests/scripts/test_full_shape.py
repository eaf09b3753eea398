"""The benchmark of a whole run at the competition's size, on a tiny configuration."""

import json

import pytest

from router.model.base import embedded_folder
from scripts.bench import full_shape

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 1000,
}  # fmt: skip


@pytest.mark.slow
def test_a_whole_run_is_made_measured_and_told(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- full -->\n<!-- /full -->\n")
    monkeypatch.setattr(full_shape, "FOLDER", tmp_path / "made" / "full")
    monkeypatch.setattr(full_shape, "PAGE", page)
    full_shape.main(["--layers", "2", "--every", "100", "--adapters", "3"], **TINY)
    (kept,) = (path for path in (tmp_path / "made").rglob("*") if path.is_file())  # the model is gone
    found = json.loads(kept.read_text())
    assert sum(found["stages"].values()) <= found["seconds"]
    assert found["queries"] == 9 and found["variants"] >= 1
    assert "| 2 | 9 |" in page.read_text()


@pytest.mark.slow
def test_a_cut_tokenizer_reads_all_text_with_fewer_tokens(tmp_path):
    from transformers import AutoTokenizer

    full_shape.write_tokenizer(tmp_path, 1000)
    cut, whole = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(embedded_folder())
    for text in ("Which of these is a fruit?", "def f(x):\n    return x ** 2", "naïve 漢字 🙂"):
        ids = cut(text)["input_ids"]
        assert max(ids) < 1000 and len(ids) >= len(whole(text)["input_ids"])
        assert cut.decode(ids) == text
    assert (len(cut), cut.eos_token_id) == (1000, whole.eos_token_id)


def test_only_a_whole_run_is_held_against_the_limits():
    run = {
        "device": "a card", "dtype": "bfloat16", "queries": 807, "seconds": 3599.0, "peak": 40e9,
        "stages": {"load": 1.0, "predict": 2.0}, "layers": 32, "every": 1,
    }  # fmt: skip
    others = [run, run | {"seconds": 3601.0}, run | {"peak": 49e9}, run | {"every": 2}, run | {"layers": 1}]
    lines = full_shape.table(others)[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["met", "missed", "missed", "", ""]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(full_shape.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 1000}))
    with pytest.raises(OSError, match="GB for a model"):
        full_shape.make(tmp_path, 1, 2, **TINY)
    assert not list(tmp_path.iterdir())
