"""A library as routing sees it in one frame, whatever the queries: prototypes, means and a fitted gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from router.library.adapters import Adapter
from router.library.duplicates import representatives
from router.model.answer import Rows
from router.model.passes import truncated
from router.pipeline.evidence import Evidence
from router.routing.calibration import Measured, silent
from router.routing.clusters import Array
from router.routing.gate import PrototypeGate
from router.routing.homes import EVERY, FORMS, handicaps, trained_in
from router.routing.large import gate_for
from router.routing.probe import Framing, Probed, probe, unreadable
from router.routing.prototypes import ModulePrototypes
from router.system.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AT_ONCE = 256  # prompts whose responses are in memory together, and that a killed run may have to probe again
RESPONSES = 1 << 25  # at once: of a large library, fewer prompts are probed at once


@dataclass(frozen=True)
class Fitted:
    """A library as routing needs it: prototypes, and a gate that is calibrated in one frame.

    Attributes:
        names: of the adapters.
        prototypes: by module, on the base model's device and in its dtype.
        means: what inputs are centred with, (d_in,) by module.
        gate: fitted to the adapters that stand for others, see `representative`.
        representative: for each adapter, the number of the one that stands for all that read alike.
        lookalikes: numbers of those that are no duplicates of their representative.
        silent: numbers of those that are silent at most of their modules.
        framing: what the generic text stood in, and what of a prompt counts.
        reference: (adapters, modules, 2) mean response to generic text; NaN without a prototype, where an
            adapter is silent, and everywhere for one that is silent at most of its modules.
        homes: (adapters,) the form that each was trained in, from 1 on; 0 is none that is known.
    """

    names: list[str]
    prototypes: Mapping[str, ModulePrototypes]
    means: Mapping[str, Tensor]
    gate: PrototypeGate
    representative: list[int]
    lookalikes: list[int]
    silent: list[int]
    framing: Framing
    reference: NDArray[np.float32]
    homes: NDArray[np.int64]

    @classmethod
    def learn(
        cls,
        adapters: Sequence[Adapter],
        prototypes: Mapping[str, ModulePrototypes],
        generic: Measured,
        forms: Sequence[NDArray[np.float32]] = (),
        **settings: Any,
    ) -> Fitted:
        """Fits a gate to a library: to one adapter of each group that reads alike, at modules that are heard.

        Args:
            generic: what generic text does to these adapters.
            forms: of each form, (some generic prompts, adapters, modules, 2) what text in it does.
            settings: of the gate.

        Raises:
            InputError: no adapter is heard anywhere.
        """
        representative, lookalike = representatives(adapters, generic.responses[..., 0])
        quiet = silent(generic.responses, [len(proto.directions) for proto in prototypes.values()])
        first = generic.responses[0]  # (adapters, modules, 2)
        most = np.flatnonzero(2 * quiet.sum(1) > np.isfinite(first[..., 0]).sum(1))
        quiet[most] = True  # the few modules that are left would speak for it all the louder
        library = cls(
            [adapter.name for adapter in adapters],
            prototypes,
            generic.means,
            PrototypeGate(**settings),
            representative.tolist(),
            np.flatnonzero(lookalike).tolist(),
            most.tolist(),
            generic.framing,
            np.where(quiet[..., None], np.float32(np.nan), first),
            np.zeros(len(adapters), np.int64),
        )
        if not library.kept:
            raise InputError(
                "--adapters: expected adapters that read what text has, got none; were they trained for this "
                "base model?"
            )
        absent = library.absent[..., 0]
        stand = np.array(library.kept)
        bare, *framed = (
            np.where(absent, np.float32(np.nan), measured[..., 0])[:, stand]  # (prompts, adapters, modules)
            for measured in (generic.responses[::EVERY], *forms)
        )
        for number, responses in enumerate(framed, 1):
            library.homes[stand[trained_in(responses, bare)]] = number
        return library.in_frame(generic)

    def in_frame(self, generic: Measured, form: int = 0) -> Fitted:
        """The same library in another frame, which is of some form. What is known of adapters stays."""
        responses = generic.responses
        if np.isfinite(responses[0][self.absent]).any():
            responses = np.where(self.absent, np.float32(np.nan), responses)
        gate = gate_for(len(self.kept), **self.gate.get_params())
        handicap = handicaps(self.homes[self.kept], form)
        gate.fit(self._of_kept(responses), confidence=generic.confidence, handicap=handicap)
        reference = responses.mean(0)
        return replace(self, framing=generic.framing, means=generic.means, gate=gate, reference=reference)

    @cached_property
    def kept(self) -> list[int]:
        """The adapters that stand for others or for themselves, and are heard somewhere."""
        return kept(self.representative, self.reference)

    def _of_kept(self, responses: NDArray[np.float32]) -> NDArray[np.float32]:
        return responses if len(self.kept) == len(self.names) else responses[:, self.kept]

    def probe(self, model: PreTrainedModel, rows: Rows, pad_id: int, title: str | None) -> Probed:
        """One pass of the base model over the prompts; a title shows a bar."""
        rows = truncated(rows)
        n_adapters = len(self.names)
        return probe(model, rows, pad_id, self.prototypes, self.means, n_adapters, title, self.framing)

    @property
    def at_once(self) -> int:
        """How many prompts are probed together, at least 1 and at most AT_ONCE."""
        return max(1, min(AT_ONCE, RESPONSES // max(1, self.reference.size)))

    @cached_property
    def absent(self) -> NDArray[np.bool_]:
        """Where no adapter has a prototype, (adapters, modules, 2)."""
        return np.isnan(self.reference)

    def decide(self, probed: Probed) -> tuple[Array, Evidence]:
        """Weights (queries, adapters + 1), the base model last, and why.

        A prompt without finite activations goes to the base model.
        """
        responses, confidence = probed
        unread = unreadable(probed, self.absent)
        # Silent modules are the same for all prompts, so the first tells whether there is anything to blank.
        if unread.any() or np.isfinite(responses[:1, self.absent]).any():
            responses, confidence = responses.copy(), confidence.copy()
            responses[:, self.absent] = np.nan
            responses[unread], confidence[unread] = self.reference, self.gate.confidence_[0]
        judged = self.gate.judge(self._of_kept(responses))
        candidates = self.gate.candidate_scores(judged, confidence)
        weights = np.zeros((len(responses), len(self.names) + 1))
        weights[:, [*self.kept, -1]] = self.gate.weights(candidates)
        weights[unread] = 0.0
        weights[unread, -1] = 1.0
        all_scores = np.full((len(responses), len(self.names)), np.nan)
        all_scores[:, self.kept] = np.where(np.isfinite(judged.scores), judged.scores, np.nan)
        if np.isinf(judged.scores).any():  # a large library, of which few are on a shortlist
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
            residual=judged.residual.astype(np.float32),
            votes=judged.votes.astype(np.float32),
            frame=np.zeros(len(responses), np.float32),
            later=np.zeros(len(responses), np.float32),
            duplicates=duplicates,
            lookalikes=lookalikes,
            silent=[self.names[n] for n in self.silent],
            homes={self.names[n]: FORMS[self.homes[n]] for n in np.flatnonzero(self.homes)},
            frames=[list(self.framing.frame)],
            thresholds=[self.gate.thresholds()],
        )

    @cached_property
    def _aside(self) -> tuple[dict[str, str], dict[str, str]]:
        """Duplicates, and look-alikes, each with the name of the adapter that stands for it."""
        stands = {self.names[n]: self.names[k] for n, k in enumerate(self.representative) if n != k}
        lookalikes = {self.names[n]: stands[self.names[n]] for n in self.lookalikes}
        return {name: k for name, k in stands.items() if name not in lookalikes}, lookalikes


def kept(representative: Sequence[int], reference: NDArray[np.float32]) -> list[int]:
    """The adapters that stand for others or for themselves, and are heard somewhere."""
    heard = np.flatnonzero(np.isfinite(reference).any((1, 2))).tolist()
    return sorted(set(representative) & set(heard))
