"""`proto_route`: prototypes of the adapters' subspaces, gated softly by calibrated cosine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.calibration import Calibration
from router.clusters import Array
from router.copies import stand_ins
from router.errors import InputError
from router.evidence import Evidence
from router.gate import PrototypeGate, weights_of
from router.merges import Routed
from router.passes import look
from router.predict import encode
from router.probe import probe
from router.prototypes import prototypes
from router.submission import Query
from router.trial import trial


class ProtoRoute(Routed):
    """Routes by how strongly the base model's activations set each adapter's update free.

    Adapters that are close are tried on the query: docs/method.md has the equations.
    """

    def route(self, queries: Sequence[Query]) -> Array:
        """Prototypes, probe, gate, and a trial of what is in question; no labels, no training."""
        model, tokenizer, limit = self.base.model, self.tokenizer, self.settings.max_seq_len
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
            stand_in = stand_ins(self.adapters, reference)
            kept = np.unique(stand_in).tolist()
            gate = PrototypeGate(self.settings.temperature, self.settings.top_k).fit(reference[:, kept])
        with self.stages("probe"):
            every = look(encode(tokenizer, [query.input for query in queries], limit))
            numbers = {row: n for n, row in enumerate(dict.fromkeys(map(tuple, every)))}
            rows = list(numbers)  # the same prompt is routed once
            probed = probe(model, rows, tokenizer.pad_token_id, protos, means, len(self.adapters))
        responses, adapters = probed.responses[:, kept], [self.adapters[n] for n in kept]
        with self.stages("gate"):
            raw = gate.decision_function(responses)
            wanted = gate.in_question(raw)
        with self.stages("calibrate"):
            gate.fit_trials(calibration.trials(adapters, wanted))
        with self.stages("trial"):
            trials = trial(self.base, adapters, rows, probed.last, wanted)
        with self.stages("gate"):
            scores = gate.candidate_scores(raw, trials)
            weights = np.zeros((len(rows), len(self.adapters) + 1))
            weights[:, [*kept, -1]] = weights_of(scores, gate.temperature, gate.top_k)
            standard = gate.standard_trials(trials)
            names = [adapter.name for adapter in self.adapters]
            evidence = Evidence(
                names,
                list(protos),
                np.nanmean(probed.responses, 2),
                self._spread(raw, kept),
                self._spread(scores, [*kept, -1], 1),
                self._spread(standard.effect, kept),
                self._spread(standard.confidence, kept),
                standard.base_confidence.astype(np.float32),
                gate.votes(responses, raw).astype(np.float32),
                {names[n]: names[k] for n, k in enumerate(stand_in) if n != k},
            )
            place = np.array([numbers[tuple(row)] for row in every])
            self.evidence = evidence.rows(place)
        return np.asarray(weights[place])

    def _spread(self, values: Array, columns: Sequence[int], more: int = 0) -> NDArray[np.float32]:
        """Columns of the adapters that stand for themselves, among those of all; NaN for the others."""
        out = np.full((len(values), len(self.adapters) + more), np.nan, dtype=np.float32)
        out[:, columns] = values
        return out
