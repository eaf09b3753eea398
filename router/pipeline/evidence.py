"""Why the gate decided as it did, query by query: what a report, an explanation or a notebook shows.

Kept beside the routing table as safetensors, so that looking at a run needs no model. Knows no models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from router.system.files import for_others, record_of

Array = NDArray[np.float32]

LOW_MARGIN = 0.5  # standard deviations of generic text


# The arrays, a letter an axis: queries, adapters, modules.
_ARRAYS = {
    "responses": "qa", "scores": "qa", "base_score": "q", "residual": "q", "votes": "qm", "frame": "q",
    "later": "q",
}  # fmt: skip


@dataclass(frozen=True)
class Names:
    """The names of an evidence's columns, and what is known of these adapters and frames."""

    adapters: list[str]  # names, in the order of the columns
    modules: list[str]  # names, in the order of the columns of `votes`
    # Adapters that are another one in another size, with the representative of each.
    duplicates: dict[str, str] = field(default_factory=dict)
    # Adapters that read what another one reads and write something else, with that one.
    lookalikes: dict[str, str] = field(default_factory=dict)
    # Adapters that read directions which text hardly has, at most of their modules.
    silent: list[str] = field(default_factory=list)
    # Adapters that were trained in a certain form, with its name; scores are less elsewhere.
    homes: dict[str, str] = field(default_factory=dict)
    # The texts before and after a query in each frame.
    frames: list[list[str]] = field(default_factory=lambda: [["", ""]])
    # By frame, what each of several false positive rates, written as a number, would add to the base model's
    # scores.
    thresholds: list[dict[str, float]] = field(default_factory=lambda: [{}])


@dataclass(frozen=True, kw_only=True)
class Evidence(Names):
    """The measurements of each query, and the gate's judgement; NaN where there is none.

    Attributes:
        responses: (queries, adapters) mean response of the whole prompt, over the modules that count; a
            root mean square cosine in [0, 1].
        scores: (queries, adapters) calibrated, in standard deviations of generic text; NaN for one that
            another adapter represents, or that is in `silent`, and in a large library for one that is
            not on the query's shortlist; its response is NaN then, too.
        base_score: (queries,) score of the base model, which an adapter's has to exceed; see equation 6.
            A brief first message of a chat may raise it.
        residual: (queries,) what generic text does not explain of the highest score, in standard deviations.
        votes: (queries, modules) what each module says for the adapter with the highest score. Their mean is
            the score before what it loses away from home. NaN where the adapter has no prototype.
        frame: (queries,) the number of the frame that each query was compared in. Under a shared system
            message it is the message's frame, whose lead counts half; scores and votes are of the one around.
        later: (queries,) how many of the user's messages follow the one that all this is of.
    """

    responses: Array
    scores: Array
    base_score: Array
    residual: Array
    votes: Array
    frame: Array
    later: Array

    @property
    def candidates(self) -> Array:
        """(queries, adapters + 1) what the choice was made by: scores that compare, the base model's last."""
        return np.column_stack([self.scores, self.base_score])

    @property
    def margin(self) -> Array:
        """(queries,) the best candidate's score less the next one's, as they compare."""
        best = np.sort(np.nan_to_num(self.candidates, nan=-np.inf, posinf=np.inf, neginf=-np.inf), 1)
        return np.asarray(best[:, -1] - best[:, -2])

    @property
    def best(self) -> NDArray[np.int64]:
        """(queries,) the adapter with the highest score."""
        return np.asarray(np.nan_to_num(self.scores, nan=-np.inf).argmax(1))

    @property
    def lead(self) -> Array:
        """(queries,) how far the best adapter leads the base model."""
        return np.asarray(np.nan_to_num(self.scores, nan=-np.inf).max(1, initial=-np.inf) - self.base_score)

    @property
    def sent(self) -> dict[str, int]:
        """How many queries would go to an adapter, by false positive rate."""
        shares = self.thresholds[0] if self.thresholds else {}
        return {
            share: int(
                (self.lead > np.array([row[share] for row in self.thresholds])[self.frame.astype(int)]).sum()
            )
            for share in shares
        }

    @property
    def low_margin(self) -> NDArray[np.bool_]:
        """(queries,) where the margin is so low that another choice might be as good."""
        return self.margin < LOW_MARGIN

    def rows(self, part: slice | NDArray[np.int64]) -> Evidence:
        """The evidence of some of the queries."""
        arrays = {name: getattr(self, name)[part] for name in _ARRAYS}
        return replace(self, **arrays)

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        arrays = {name: np.ascontiguousarray(getattr(self, name), dtype=np.float32) for name in _ARRAYS}
        # One key, since safetensors writes several in any order.
        names = json.dumps({name.name: getattr(self, name.name) for name in fields(Names)})
        save_file(arrays, path, metadata={"names": names})
        for_others(path)

    @staticmethod
    def load(path: Path) -> Evidence:
        """Reads what `save` wrote.

        Raises:
            OSError, SafetensorError, ValueError: the file is missing, damaged, or of another kind.
        """
        with safe_open(path, framework="numpy") as file:
            names = record_of(Names, (file.metadata() or {}).get("names", "null"))
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        evidence = Evidence(**vars(names), **arrays)
        sizes = {"q": len(evidence.base_score), "a": len(evidence.adapters), "m": len(evidence.modules)}
        for name, axes in _ARRAYS.items():
            array, shape = arrays[name], tuple(sizes[axis] for axis in axes)
            if array.dtype != np.float32 or array.shape != shape:
                raise ValueError(f"{name}: expected float32 of {shape}, got {array.dtype} of {array.shape}")
            if np.isinf(array).any():
                raise ValueError(f"{name}: expected finite numbers, or none, got endless ones")
        scored = np.isfinite(evidence.scores).any(1) & np.isfinite(evidence.base_score)
        if not (evidence.later >= 0).all():
            raise ValueError("later: expected numbers from 0")
        if not scored.all():
            raise ValueError("expected an adapter's score for each query, got none")
        if not np.isin(evidence.frame, range(len(evidence.frames))).all() or len(evidence.thresholds) != len(
            evidence.frames
        ):
            raise ValueError("expected a frame, and its thresholds, for each query")
        return evidence


def joined(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of several parts of a run, such as its query files, as one."""
    frames = {
        tuple(frame): thresholds
        for part in parts
        for frame, thresholds in zip(part.frames, part.thresholds, strict=True)
    }
    number = {frame: n for n, frame in enumerate(frames)}
    places = [np.array([number[tuple(frame)] for frame in part.frames], np.float32) for part in parts]
    numbers = [place[part.frame.astype(int)] for place, part in zip(places, parts, strict=True)]
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS
    }
    arrays |= {"frame": np.concatenate(numbers), "frames": [list(frame) for frame in frames]}
    return replace(parts[0], **arrays, thresholds=list(frames.values()))
