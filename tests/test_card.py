"""A whole run on a GPU that the CPU plays: nothing is on the wrong device, and the answers are the CPU's."""

from unittest.mock import patch

import pytest
import torch
from played_card import CARD, card

from helpers import PROMPTS, read_table


def test_a_stray_tensor_is_noticed():
    with card(), pytest.raises(RuntimeError, match="cuda:0"):
        torch.ones(3, device=CARD) + torch.ones(3)


@pytest.mark.parametrize(
    ("method", "apply"),
    [(m, "merged") for m in ("proto_route", "average", "arrow", "spectr", "lag")]
    + [("proto_route", "beside")],
)
def test_a_run_answers_as_on_the_cpu(method, apply, command):
    rows = [(f"g{n}", text, "generation", "") for n, text in enumerate(PROMPTS)]
    rows += [(f"m{n}", text, "multiple_choice", "['yes', 'no', 'perhaps']") for n, text in enumerate(PROMPTS)]
    flags = ("--false_positive_rate", 0.9, "--temperature", 3.0, "--apply", apply)
    code, cpu = command(method, *flags, rows=rows, out="cpu")
    assert code == 0
    with (
        card(),
        patch("router.model.base.pick_device", lambda _: str(CARD)),
        patch("router.model.device.memory_bytes", lambda _: 1 << 34),
    ):
        code, there = command(method, *flags, out="card")
    assert code == 0 and read_table(there / "queries.csv") == read_table(cpu / "queries.csv")
