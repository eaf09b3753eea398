"""How adapters respond to generic text: what the gate compares with.

The text ships with the package: task-like prompts in many layouts and languages, made for no adapter.
router/pipeline/calibration.py measures it, and keeps on disk what it measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from router.model.frames import BARE, Frame, alike
from router.model.template import is_mark
from router.routing.probe import END, Framing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A module is silent if generic text has less than this share of chance along what the adapter reads. Trained
# adapters have 0.6 and more, random ones 1.
SILENT = 0.4


def generic_prompts(frame: Frame = BARE) -> list[str]:
    """The texts against which responses are calibrated: in a frame, messages to an assistant among them."""
    names = ["generic.json"] if frame == BARE else ["generic.json", "talk.json"]
    folder = files("router.routing")
    return [
        frame.around(text) for name in names for text in json.loads(folder.joinpath(name).read_text("utf-8"))
    ]


def silent(responses: NDArray[np.float32], widths: Sequence[int]) -> NDArray[np.bool_]:
    """Where an adapter reads directions that generic text hardly has, (adapters, modules).

    Whatever is unlike generic text stands out there, by a multiple that no honest adapter reaches. So it says
    nothing of the adapter's skill.

    Args:
        responses: (generic prompts, adapters, modules, 2), NaN without a prototype.
        widths: (modules,) of the inputs. Chance is a squared cosine of 1 / width.
    """
    logs = np.zeros(responses.shape[1:])  # (adapters, modules, 2), summed prompt by prompt to save memory
    for row in responses:
        logs += np.log(row.clip(1e-6))
    energy = np.exp(2 * logs / len(responses)).mean(-1) * np.array(widths)  # (adapters, modules)
    return np.asarray(energy < SILENT)


class Measured(NamedTuple):
    """The measured effect of generic text in a frame on a base model and its adapters.

    Attributes:
        framing: what the text stood in, and what of it counted.
        means: the mean input of each module that text reaches, (d_in,) float32.
        responses: (generic prompts, adapters, modules, 2), NaN without a prototype.
        confidence: the base model's at the end of each prompt, (generic prompts,).
    """

    framing: Framing
    means: Mapping[str, Tensor]
    responses: NDArray[np.float32]
    confidence: NDArray[np.float32]


def framing_of(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], frame: Frame) -> Framing:
    """The tokens that generic prompts have in common in a frame.

    Marks of a chat template follow the message. The end of a prompt is these marks and the END tokens before.
    """
    prefix = rows[0][: alike(rows)] if frame.before else []
    tail = alike([row[::-1] for row in rows]) if frame.after else 0
    marked = is_mark(tokenizer, rows[0][len(rows[0]) - tail :])
    return Framing(frame, prefix, END + (tail if marked else 0))
