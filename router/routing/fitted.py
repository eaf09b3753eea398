"""A library as routing sees it, whatever the queries: prototypes, means and a fitted gate. It can travel.

What `save` writes is all that a query needs to be routed, beside the base model: no adapter and no generic
text. Safetensors and JSON only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from router.errors import InputError
from router.model.passes import truncated
from router.routing.clusters import Array
from router.routing.evidence import Evidence
from router.routing.gate import PrototypeGate
from router.routing.probe import Probed, probe, unreadable
from router.routing.prototypes import ModulePrototypes

FILE = "router.safetensors"
AT_ONCE = 256  # prompts whose responses are in memory together, and that a killed run may have to probe again
RESPONSES = 1 << 25  # of a large library fewer prompts, so that there are at most so many responses
FORMAT = 2  # raise it when a reader of the old one could not use the new one
_LEARNED = (
    "mean_", "std_", "loadings_", "filter_", "location_", "scale_", "confidence_", "reference_leads_"
)  # fmt: skip


def at_once(n_adapters: int, n_modules: int) -> int:
    """How many prompts are probed together, at least 1 and at most AT_ONCE."""
    return max(1, min(AT_ONCE, RESPONSES // max(1, 2 * n_adapters * n_modules)))


@dataclass(frozen=True)
class Fitted:
    """What routing needs of a library.

    Attributes:
        names: of the adapters.
        prototypes: by module, on the base model's device and in its dtype.
        means: what inputs are centred with, (d_in,) by module.
        gate: fitted to the adapters that stand for others, see `representative`.
        representative: for each adapter, the number of the one that stands for it and its duplicates.
        reference: (adapters, modules, 2) mean response to generic text; NaN without a prototype.
    """

    names: list[str]
    prototypes: Mapping[str, ModulePrototypes]
    means: Mapping[str, Tensor]
    gate: PrototypeGate
    representative: list[int]
    reference: NDArray[np.float32]

    @property
    def kept(self) -> list[int]:
        """The adapters that stand for others or for themselves."""
        return sorted(set(self.representative))

    def probe(self, model: Any, rows: Sequence[Sequence[int]], pad_id: int, title: str | None) -> Probed:
        """One pass of the base model over the prompts; a title shows a bar."""
        return probe(
            model, truncated(rows), pad_id, self.prototypes, self.means, len(self.names), title
        )  # fmt: skip

    @property
    def at_once(self) -> int:
        """How many prompts are probed together."""
        return at_once(len(self.names), len(self.prototypes))

    @cached_property
    def _absent(self) -> NDArray[np.bool_]:
        """Where no adapter has a prototype, (adapters, modules, 2)."""
        return np.isnan(self.reference)

    def decide(self, probed: Probed) -> tuple[Array, Evidence]:
        """Weights (queries, adapters + 1), the base model last, and why.

        A prompt without finite activations goes to the base model.
        """
        responses, confidence = probed
        unread = unreadable(probed, self._absent)
        if unread.any():
            responses, confidence = responses.copy(), confidence.copy()
            responses[unread], confidence[unread] = self.reference, self.gate.confidence_[0]
        own = responses if len(self.kept) == len(self.names) else responses[:, self.kept]
        scores, votes = self.gate.scores_and_votes(own)
        candidates = self.gate.candidate_scores(scores, confidence)
        weights = np.zeros((len(responses), len(self.names) + 1))
        weights[:, [*self.kept, -1]] = self.gate.weights(candidates)
        weights[unread] = 0.0
        weights[unread, -1] = 1.0
        all_scores = np.full((len(responses), len(self.names)), np.nan)
        all_scores[:, self.kept] = np.where(np.isfinite(scores), scores, np.nan)
        if self.gate.shortlists:
            means = np.full_like(responses[:, :, 0, 0], np.nan)
            listed = np.nonzero(np.isfinite(all_scores))
            means[listed] = np.nanmean(responses[listed][..., 0], 1)
        else:
            means = np.nanmean(responses[..., 0], 2)
        names = self.names
        return weights, Evidence(
            names,
            list(self.prototypes),
            responses=means,
            scores=all_scores.astype(np.float32),
            base_score=candidates[:, -1].astype(np.float32),
            votes=votes.astype(np.float32),
            duplicates={names[n]: names[k] for n, k in enumerate(self.representative) if n != k},
            levels=self.gate.levels(),
        )

    def save(self, folder: Path) -> None:
        """Writes `router.safetensors` into a folder."""
        tensors = {f"mean {module}": mean for module, mean in self.means.items()}
        for module, proto in self.prototypes.items():
            for part in ("directions", "weights", "owners"):
                tensors[f"{part} {module}"] = getattr(proto, part)
        arrays = {f"gate {name}": getattr(self.gate, name) for name in _LEARNED}
        arrays |= {"gate level_": np.array([self.gate.level_]), "reference": self.reference}
        tensors |= {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        about = {
            "names": self.names,
            "modules": list(self.prototypes),
            "representative": self.representative,
            "gate": self.gate.get_params(),
        }
        work = folder / f".{FILE}"
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            work,
            metadata={"format": "pt", "router": json.dumps(about)},
        )
        work.chmod(0o644)  # it is written for its owner alone
        work.replace(folder / FILE)

    @staticmethod
    def load(folder: Path, device: torch.device, dtype: torch.dtype) -> Fitted:
        """Reads what `save` wrote.

        Args:
            device, dtype: of the base model.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            with safe_open(folder / FILE, framework="pt") as file:
                about = json.loads(file.metadata()["router"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            gate = PrototypeGate(**about["gate"])
            for name in _LEARNED:
                setattr(gate, name, tensors[f"gate {name}"].numpy())
            gate.level_ = float(tensors["gate level_"])
            gate.n_adapters_, gate.n_modules_ = gate.mean_.shape[:2]
            modules = about["modules"]
            return Fitted(
                about["names"],
                {
                    m: ModulePrototypes(
                        tensors[f"directions {m}"].to(device, dtype),
                        tensors[f"weights {m}"].to(device),
                        tensors[f"owners {m}"].to(device),
                    )
                    for m in modules
                },
                {m: tensors[f"mean {m}"].to(device) for m in modules},
                gate,
                about["representative"],
                tensors["reference"].numpy(),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder / FILE}: expected what Router.save wrote, got something else ({error}); "
                "save it again"
            ) from error
