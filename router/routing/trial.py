"""A second look: what the adapters in question do at the end of a prompt, just before the answer.

Adapters may read much the same input and do different things with it. What tells them apart is what
each of them does with the prompt: its own adapter changes where the model is heading more than it changes
other prompts, and is surer of how the answer starts. One pass for each adapter, over those prompts
alone for which it is in question. Knows no labels; the gate compares.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from router.library.adapters import Adapter
from router.model.base import Base, linear_shapes
from router.model.passes import Last, batches, forward
from router.routing.gate import Trials
from router.routing.variants import Hotswap, Variant, write_variant


def trial(
    base: Base,
    adapters: Sequence[Adapter],
    rows: Sequence[Sequence[int]],
    last: Last,
    shortlist: NDArray[np.bool_],
    title: str = "trial",
) -> Trials:
    """Runs each adapter on the prompts for which it is shortlist.

    Args:
        rows: token ids of each prompt.
        last: the base model at the end of each prompt.
        shortlist: (prompts, adapters).
    """
    effect, confidence = np.full((2, *shortlist.shape), np.nan)
    shapes, pad = linear_shapes(base.model), base.tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as folder, Hotswap(base) as swap:
        for n in sorted(np.flatnonzero(shortlist.any(0)).tolist(), key=lambda n: _turn(adapters[n])):
            mine, path = np.flatnonzero(shortlist[:, n]), Path(folder) / str(n)
            # In the form in which a variant of it alone would answer.
            write_variant(path, Variant({adapters[n].name: 1.0}, 0.0), [adapters[n]], base, shapes)
            model, part = swap.activate(path), [rows[k] for k in mine.tolist()]
            shutil.rmtree(path, ignore_errors=True)
            with torch.inference_mode():
                for numbers, ids, mask in batches(model, part, pad, f"{title} {adapters[n].name}"):
                    found, where = forward(model, ids, mask), mine[numbers]
                    before = last.hidden[torch.from_numpy(where).to(ids.device)].float()  # (B, d)
                    change = (found.hidden.float() - before).norm(dim=1) / before.norm(dim=1)  # (B,)
                    effect[where, n] = change.cpu().numpy()
                    confidence[where, n] = found.confidence.cpu().numpy()
    return Trials(effect, confidence, last.confidence.double().cpu().numpy())


def _turn(adapter: Adapter) -> tuple[list[str], int]:
    """What `swap_order` would go by: the kinds of modules that an adapter changes, and its rank."""
    kinds = {module.rsplit(".", 1)[-1] for module in adapter.folder.shapes}
    return sorted(kinds), max(adapter.folder.ranks.values())
