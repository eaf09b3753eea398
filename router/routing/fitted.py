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
from router.files import for_others, parsed
from router.library.adapters import Adapter
from router.library.duplicates import representatives
from router.model.passes import truncated
from router.routing.calibration import silent
from router.routing.clusters import Array
from router.routing.evidence import Evidence
from router.routing.gate import PrototypeGate
from router.routing.probe import AHEAD, Probed, probe, telling, unreadable
from router.routing.prototypes import ModulePrototypes

FILE = "router.safetensors"
AT_ONCE = 256  # prompts whose responses are in memory together, and that a killed run may have to probe again
RESPONSES = 1 << 25  # of a large library fewer prompts, so that there are at most so many responses
FORMAT = 5  # raise it when a reader of the old one could not use the new one
_LEARNED = (
    "mean_", "std_", "loadings_", "filter_", "scale_", "reach_", "confidence_", "reference_leads_"
)  # fmt: skip
_ABOUT = {
    "names": [str], "modules": [str], "representative": [int], "lookalikes": [int], "silent": [int],
    "ahead": int, "gate": {"temperature": float, "top_k?": int, "false_alarm": float},
}  # fmt: skip


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
        representative: for each adapter, the number of the one that stands for all that read alike.
        lookalikes: numbers of those that are no duplicates of their representative.
        silent: numbers of those that are silent at most of their modules.
        reference: (adapters, modules, 2) mean response to generic text; NaN without a prototype, where an
            adapter is silent, and everywhere for one that is silent at most of its modules.
        ahead: how many tokens the base model writes after a prompt, which the gate was fitted with.
    """

    names: list[str]
    prototypes: Mapping[str, ModulePrototypes]
    means: Mapping[str, Tensor]
    gate: PrototypeGate
    representative: list[int]
    lookalikes: list[int]
    silent: list[int]
    reference: NDArray[np.float32]
    ahead: int = AHEAD

    @classmethod
    def learn(
        cls,
        adapters: Sequence[Adapter],
        prototypes: Mapping[str, ModulePrototypes],
        means: Mapping[str, Tensor],
        gate: PrototypeGate,
        reference: NDArray[np.float32],
        confidence: NDArray[np.float32],
        ahead: int = AHEAD,
    ) -> Fitted:
        """Fits a gate to a library: to one adapter of each group that reads alike, at modules that are heard.

        Args:
            gate: not fitted yet.
            reference: (generic prompts, adapters, modules, 2) responses, NaN without a prototype.
            confidence: (generic prompts,) of the base model.

        Raises:
            InputError: no adapter is heard anywhere.
        """
        representative, lookalike = representatives(adapters, reference[..., 0])
        widths = [len(proto.directions) for proto in prototypes.values()]
        quiet: NDArray[np.bool_] = silent(reference, widths)  # (adapters, modules)
        there = np.isfinite(reference[0, ..., 0]).sum(1)  # (adapters,)
        most = np.flatnonzero(2 * quiet.sum(1) > there)
        quiet[most] = True  # the few modules that are left would speak for it all the louder
        if quiet.any():
            reference = reference.copy()
            reference[:, quiet] = np.nan
        found = cls(
            [adapter.name for adapter in adapters],
            prototypes,
            means,
            gate,
            representative.tolist(),
            np.flatnonzero(lookalike).tolist(),
            most.tolist(),
            reference.mean(0),
            ahead,
        )
        if not found.kept:
            raise InputError(
                "--adapters: expected adapters that read what text has, got none; were they trained for this "
                "base model?"
            )
        kept = reference if len(found.kept) == len(adapters) else reference[:, found.kept]
        gate.fit(kept, confidence=confidence)
        return found

    @cached_property
    def kept(self) -> list[int]:
        """The adapters that stand for others or for themselves, and are heard somewhere."""
        heard = np.flatnonzero(np.isfinite(self.reference).any((1, 2))).tolist()
        return sorted(set(self.representative) & set(heard))

    def probe(self, model: Any, rows: Sequence[Sequence[int]], pad_id: int, title: str | None) -> Probed:
        """One pass of the base model over the prompts; a title shows a bar."""
        return probe(
            model, truncated(rows), pad_id, self.prototypes, self.means, len(self.names), title,
            self.ahead,
        )  # fmt: skip

    @property
    def at_once(self) -> int:
        """How many prompts are probed together."""
        return at_once(len(self.names), len(self.prototypes))

    @cached_property
    def _absent(self) -> NDArray[np.bool_]:
        """Where no adapter has a prototype, (adapters, modules, 2)."""
        return np.isnan(self.reference)

    @cached_property
    def _telling(self) -> NDArray[np.int64]:
        """Which adapter's response tells whether a prompt is readable, (modules, 2)."""
        return telling(self._absent)

    @cached_property
    def _expected(self) -> int:
        """How many responses there are to a prompt."""
        return int(np.count_nonzero(~self._absent))

    @cached_property
    def _reach(self) -> dict[str, float]:
        """The reach of each adapter that is kept, by name."""
        return {self.names[n]: reach for n, reach in zip(self.kept, self.gate.reach_.tolist(), strict=True)}

    def decide(self, probed: Probed) -> tuple[Array, Evidence]:
        """Weights (queries, adapters + 1), the base model last, and why.

        A prompt without finite activations goes to the base model.
        """
        responses, confidence = probed
        unread = unreadable(probed, self._telling)
        # One readable prompt tells whether adapters respond where they are silent.
        if unread.any() or np.count_nonzero(np.isfinite(responses[:1])) > self._expected:
            responses, confidence = responses.copy(), confidence.copy()
            responses[:, self._absent] = np.nan
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
            there = np.isfinite(self.reference[..., 0]).sum(1)  # (adapters,)
            means = np.nan_to_num(responses[..., 0]).sum(2) / there.clip(1)
        duplicates, lookalikes = self._aside
        return weights, Evidence(
            self.names,
            list(self.prototypes),
            responses=means,
            scores=all_scores.astype(np.float32),
            base_score=candidates[:, -1].astype(np.float32),
            votes=votes.astype(np.float32),
            duplicates=duplicates,
            lookalikes=lookalikes,
            silent=[self.names[n] for n in self.silent],
            reach=self._reach,
            levels=self.gate.levels(),
        )

    @cached_property
    def _aside(self) -> tuple[dict[str, str], dict[str, str]]:
        """Duplicates, and look-alikes, each with the name of the adapter that stands for it."""
        stands = {self.names[n]: self.names[k] for n, k in enumerate(self.representative) if n != k}
        lookalikes = {self.names[n]: stands[self.names[n]] for n in self.lookalikes}
        return {name: k for name, k in stands.items() if name not in lookalikes}, lookalikes

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
            "lookalikes": self.lookalikes,
            "silent": self.silent,
            "gate": self.gate.get_params(),
            "ahead": self.ahead,
        }
        work = folder / f".{FILE}"
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            work,
            metadata={"router": json.dumps(about)},  # safetensors writes several in no certain order
        )
        for_others(work)
        work.replace(folder / FILE)

    @staticmethod
    def load(folder: Path, device: torch.device, dtype: torch.dtype, widths: Mapping[str, int]) -> Fitted:
        """Reads what `save` wrote.

        Args:
            device, dtype: of the base model.
            widths: d_in of its linear layers by module name.

        Raises:
            InputError: the file is missing or damaged, or made for another base model.
        """
        try:
            with safe_open(folder / FILE, framework="pt") as file:
                about = parsed((file.metadata() or {}).get("router", "null"), _ABOUT)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            _check(about, tensors, widths)
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
                about["lookalikes"],
                about["silent"],
                tensors["reference"].numpy(),
                about["ahead"],
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder / FILE}: expected what Router.save wrote, got something else ({error}); "
                "save it again"
            ) from error


def _check(about: Mapping[str, Any], tensors: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
    """Refuses what does not fit together, or not to the base model.

    Raises:
        ValueError: something does not; the message says what.
        KeyError: a tensor is missing.
    """
    n, representative, modules = len(about["names"]), about["representative"], about["modules"]
    numbers = {*representative, *about["lookalikes"], *about["silent"]}
    if len(representative) != n or not n or not numbers <= set(range(n)):
        raise ValueError(f"expected a representative for each of {n} adapters, got {representative!s:.80}")
    gate = about["gate"]
    if not (gate["temperature"] > 0 and 0 < gate["false_alarm"] < 1 and (gate["top_k"] or 1) >= 1):
        raise ValueError(f"expected settings of a gate in their ranges, got {gate!s:.80}")
    if about["ahead"] < 0:
        raise ValueError(f"ahead: expected a number of tokens from 0, got {about['ahead']}")
    there = np.zeros((n, len(modules)), bool)  # which adapter has a prototype where
    shapes: dict[str, tuple[int, ...]] = {"reference": (n, len(modules), 2), "gate level_": (1,)}
    for m, module in enumerate(modules):
        owners = tensors[f"owners {module}"]
        shapes[f"directions {module}"] = widths.get(module, 0), len(owners)
        shapes |= {f"weights {module}": (len(owners),), f"mean {module}": (widths.get(module, 0),)}
        if owners.dtype != torch.int64 or not torch.equal(owners, owners.sort()[0].clamp(0, n - 1)):
            raise ValueError(f"owners {module}: expected numbers of adapters in ascending order")
        there[owners.numpy(), m] = True
    heard = tensors["reference"].isfinite().numpy()  # (adapters, modules, 2)
    if heard.shape != (n, len(modules), 2) or (heard != heard[..., :1] & there[..., None]).any():
        raise ValueError("reference: expected numbers where an adapter has a prototype, and nowhere else")
    kept = sorted(set(representative) & set(np.flatnonzero(heard.any((1, 2))).tolist()))
    if not kept:
        raise ValueError("reference: expected a number wherever an adapter is heard, got none")
    for name in _LEARNED:
        one = {"confidence_": 2, "reference_leads_": len(tensors["gate reference_leads_"])}.get(
            name, len(kept)
        )
        wide = name in ("mean_", "std_", "loadings_", "filter_")
        shapes[f"gate {name}"] = (len(kept), len(modules), 2) if wide else (one,)
    for name, shape in shapes.items():
        if tensors[name].shape != shape or not tensors[name].is_floating_point():
            raise ValueError(f"{name}: expected numbers of shape {shape}, got {tuple(tensors[name].shape)}")
        if len(shape) == 1 and not tensors[name].isfinite().all():
            raise ValueError(f"{name}: expected finite numbers")
    if not (tensors["gate reach_"] > 0).all():
        raise ValueError("gate reach_: expected numbers above 0")
    if (tensors["gate mean_"].isfinite().numpy() != heard[kept]).any():
        raise ValueError("gate mean_: expected a number wherever an adapter is heard, and nowhere else")
