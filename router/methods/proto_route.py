"""`proto_route`: prototypes of the adapters' subspaces, gated softly by calibrated cosine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.errors import InputError
from router.library.duplicates import representatives
from router.model.passes import truncated
from router.pipeline import Routed
from router.result import Routing
from router.routing.calibration import Calibration
from router.routing.clusters import Array
from router.routing.evidence import Evidence
from router.routing.gate import PrototypeGate
from router.routing.probe import probe
from router.routing.prototypes import prototypes
from router.routing.trial import trial
from router.submission import Query


class ProtoRoute(Routed):
    """Routes by how strongly the base model's activations set each adapter's update free.

    Adapters that are close are tried on the query: docs/method.md has the equations.
    """

    def route(self, queries: Sequence[Query], rows: Sequence[Sequence[int]]) -> Routing:
        """Prototypes, probe, gate, and trials of the shortlist; no labels, no training."""
        model, pad = self.base.model, self.tokenizer.pad_token_id
        limit = self.max_seq_len or self.settings.max_seq_len
        with self.stages("prototypes"):
            protos = prototypes(self.adapters, str(model.device), model.dtype)
            present = {owner for proto in protos.values() for owner in proto.owners.tolist()}
        for number, adapter in enumerate(self.adapters):
            if number not in present:
                raise InputError(
                    f"adapter {adapter.name} ({adapter.folder.path}): expected an update, got zero at every "
                    "module; was it trained? Leave it out of --adapters"
                )
        with self.stages("calibrate"):
            calibration = Calibration(self.base, limit)
            means = calibration.means(list(protos))
            reference = calibration.responses(self.adapters, protos, means)
            representative = representatives(self.adapters, reference)
            kept = np.unique(representative).tolist()
            gate = PrototypeGate(self.settings.temperature, self.settings.top_k).fit(reference[:, kept])
        with self.stages("probe"):
            every = truncated(rows)
            numbers = {row: n for n, row in enumerate(dict.fromkeys(map(tuple, every)))}
            distinct = list(numbers)  # the same prompt is routed once
            probed = probe(model, distinct, pad, protos, means, len(self.adapters))
        responses, adapters = probed.responses[:, kept], [self.adapters[n] for n in kept]
        with self.stages("gate"):
            scores = gate.decision_function(responses)
            shortlist = gate.shortlist(scores)
        with self.stages("calibrate"):
            gate.fit_trials(calibration.trials(adapters, shortlist))
        with self.stages("trial"):
            trials = trial(self.base, adapters, distinct, probed.last, shortlist)
        with self.stages("gate"):
            candidates = gate.candidate_scores(scores, trials)
            weights = np.zeros((len(distinct), len(self.adapters) + 1))
            weights[:, [*kept, -1]] = gate.weights(candidates)
            standard = gate.standard_trials(trials)
            names = [adapter.name for adapter in self.adapters]
            evidence = Evidence(
                names,
                list(protos),
                np.nanmean(probed.responses, 2),
                self._spread(scores, kept),
                self._spread(candidates, [*kept, -1], 1),
                self._spread(standard.effect, kept),
                self._spread(standard.confidence, kept),
                standard.base_confidence.astype(np.float32),
                gate.votes(responses, scores).astype(np.float32),
                {names[n]: names[k] for n, k in enumerate(representative) if n != k},
            )
            place = np.array([numbers[tuple(row)] for row in every])
        return Routing(weights[place], evidence.rows(place))

    def _spread(self, values: Array, columns: Sequence[int], more: int = 0) -> NDArray[np.float32]:
        """Columns of the adapters that stand for themselves, among those of all; NaN for the others."""
        out = np.full((len(values), len(self.adapters) + more), np.nan, dtype=np.float32)
        out[:, columns] = values
        return out
