"""A base model of which accelerate keeps a part on the disk routes and answers as the whole one does."""

import pytest
import torch

from helpers import active, files_of, logits
from router.kit import Merges
from router.model.apply import Hooked
from router.model.base import load_base
from router.model.device import spread
from router.system.errors import InputError

MAP = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


@pytest.fixture()
def little_memory(monkeypatch):
    """Memory for the embeddings and one layer, and how often a part had to go to the disk."""
    seen = []
    monkeypatch.setattr("router.model.base.memory_bytes", lambda _: 120_000)
    monkeypatch.setattr("router.model.base.spread", lambda model: seen.append(spread(model)) or seen[-1])
    return seen


@pytest.mark.parametrize("method", ["proto_route", "arrow", "logo", "mass"])
def test_a_run_leaves_the_files_of_one_with_the_whole_model(
    command, monkeypatch, little_memory, tmp_path, method
):
    monkeypatch.setattr("router.library.store.cache_folder", lambda: tmp_path / "one")
    _, whole = command(method, "--apply", "beside", out="whole")
    monkeypatch.setattr("router.library.store.cache_folder", lambda: tmp_path / "other")
    code, out = command(method, "--device_map", "auto")
    assert little_memory == [False, True]
    assert code == 0 and files_of(out) == files_of(whole)


def test_a_folder_changes_the_model_as_in_peft(base, tiny_base, tiny_library):
    part = load_base(str(tiny_base), "cpu", "float32", MAP)
    assert spread(part.model) and any(weight.is_meta for weight in part.model.parameters())
    assert torch.equal(logits(part.model), logits(base.model))
    with Hooked(part) as models:
        for name in ("everything", "mlp", "attention", "mlp"):
            with active(base, tiny_library / name, "beside") as expected:
                torch.testing.assert_close(logits(models.activate(tiny_library / name)), logits(expected))
        assert not torch.equal(logits(part.model), logits(base.model))
        assert torch.equal(logits(models.activate(None)), logits(base.model))
    assert torch.equal(logits(part.model), logits(base.model))


def test_what_does_not_go_with_a_spread_model_is_refused(
    command, capsys, little_memory, tiny_base, monkeypatch
):
    code, out = command("proto_route", "--device_map", "auto", "--apply", "merged")
    assert code == 2 and not out.exists()
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--device_map" in error and "--apply beside" in error
    with pytest.raises(InputError, match="embeddings"):
        load_base(str(tiny_base), "cpu", "float32", MAP | {"model.embed_tokens": "disk"})
    monkeypatch.setattr("router.run.load_method", lambda name: Merges)  # a starter-kit method
    assert command("base", "--device_map", "auto")[0] == 2 and "--device_map" in capsys.readouterr().err
