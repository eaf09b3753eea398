"""`proto_route`: prototypes of the adapters' subspaces, gated softly by calibrated cosine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router.errors import InputError
from router.library.duplicates import representatives
from router.model.passes import truncated
from router.pipeline import Routed
from router.result import Routing
from router.routing.calibration import Calibration
from router.routing.evidence import Evidence
from router.routing.gate import PrototypeGate
from router.routing.probe import probe, unreadable
from router.routing.prototypes import prototypes
from router.submission import Query


class ProtoRoute(Routed):
    """Routes by how strongly the base model's activations align with each adapter's input subspace.

    A query that stands out no more than generic text goes to the base model; docs/method.md has the
    equations.
    """

    def route(self, queries: Sequence[Query], rows: Sequence[Sequence[int]]) -> Routing:
        """Prototypes, probe and gate; no labels, no training, no pass with an adapter."""
        model, pad = self.base.model, self.tokenizer.pad_token_id
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
            calibration = Calibration(self.base, self.max_seq_len or self.settings.max_seq_len)
            means = calibration.means(list(protos))
            reference = calibration.responses(self.adapters, protos, means)
            representative = representatives(self.adapters, reference[..., 0])
            kept = np.unique(representative).tolist()
            gate = PrototypeGate(
                self.settings.temperature, self.settings.top_k, self.settings.false_alarm
            ).fit(reference[:, kept], confidence=calibration.confidence())
        with self.stages("probe"):
            every = list(map(tuple, truncated(rows)))
            distinct = {
                row: n for n, row in enumerate(dict.fromkeys(every))
            }  # the same prompt is probed once
            probed = probe(model, list(distinct), pad, protos, means, len(self.adapters))
            unread = unreadable(probed, np.isnan(reference[0]))  # such a query goes to the base model
            responses, confidence = probed
            responses[unread], confidence[unread] = reference.mean(0), calibration.confidence().mean()
            own = responses if len(kept) == len(self.adapters) else responses[:, kept]
        with self.stages("gate"):
            scores = gate.decision_function(own)
            candidates = gate.candidate_scores(scores, confidence)
            weights = np.zeros((len(distinct), len(self.adapters) + 1))
            weights[:, [*kept, -1]] = gate.weights(candidates)
            weights[unread] = np.eye(len(self.adapters) + 1)[-1]
            names = [adapter.name for adapter in self.adapters]
            all_scores = np.full((len(distinct), len(names)), np.nan)
            all_scores[:, kept] = scores
            evidence = Evidence(
                names,
                list(protos),
                responses=np.nanmean(responses[..., 0], 2),
                scores=all_scores.astype(np.float32),
                base_score=candidates[:, -1].astype(np.float32),
                votes=gate.votes(own, scores).astype(np.float32),
                duplicates={names[n]: names[k] for n, k in enumerate(representative) if n != k},
            )
            place = np.array([distinct[row] for row in every])
        return Routing(weights[place], evidence.rows(place))
