"""A whole run on a GPU that the CPU plays: nothing is on the wrong device, and the answers are the CPU's."""

from unittest.mock import patch

import pytest
import torch
from played_card import CARD, card

from helpers import arguments, read_table, write_queries
from router.main import main

PROMPTS = ["What is two and two?", "Bonjour, comment allez-vous ?", "1 + 1 =", "abc"]


def test_a_stray_tensor_is_noticed():
    with card(), pytest.raises(RuntimeError, match="cuda:0"):
        torch.ones(3, device=CARD) + torch.ones(3)


@pytest.mark.parametrize(
    ("method", "apply"),
    [(m, "merged") for m in ("proto_route", "average", "arrow", "spectr", "lag")]
    + [("proto_route", "beside")],
)
def test_a_run_answers_as_on_the_cpu(method, apply, tmp_path, tiny_base, tiny_library):
    rows = [(f"g{n}", text, "generation", "") for n, text in enumerate(PROMPTS)]
    rows += [(f"m{n}", text, "multiple_choice", "['yes', 'no', 'perhaps']") for n, text in enumerate(PROMPTS)]
    queries = write_queries(tmp_path / "queries.csv", rows)
    flags = ("--false_positive_rate", 0.9, "--temperature", 3.0, "--dtype", "float32", "--apply", apply)
    cpu = arguments(method, [queries], tiny_library, tiny_base, tmp_path / "cpu", *flags)
    assert main(cpu) == 0
    there = arguments(method, [queries], tiny_library, tiny_base, tmp_path / "card", *flags)
    with (
        card(),
        patch("router.model.base.pick_device", lambda _: str(CARD)),
        patch("router.model.device.memory_bytes", lambda _: 1 << 34),
    ):
        assert main(there) == 0
    assert read_table(tmp_path / "card/queries.csv") == read_table(tmp_path / "cpu/queries.csv")
