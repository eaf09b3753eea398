"""`proto_route`: prototypes of the adapters' subspaces, gated softly by calibrated cosine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from router.errors import InputError
from router.model.answer import by_length
from router.model.device import tokens_at_once
from router.model.passes import truncated
from router.pipeline import Routed
from router.result import Routing
from router.routing.calibration import Calibration
from router.routing.evidence import joined
from router.routing.fitted import Fitted
from router.routing.probe import Probed
from router.routing.prototypes import prototypes
from router.submission import Query


class ProtoRoute(Routed):
    """Routes by how strongly the base model's activations align with each adapter's input subspace.

    A query that stands out no more than generic text goes to the base model; docs/method.md has the
    equations.
    """

    @cached_property
    def fitted(self) -> Fitted:
        """Prototypes, and a gate that is calibrated on generic text; made on first use."""
        model = self.base.model
        with self.stages("prototypes"):
            protos = prototypes(self.adapters, str(model.device), model.dtype)
        with self.stages("calibrate"):
            calibration = Calibration(self.base, self.settings.max_seq_len)
            means = calibration.means(list(protos))
            protos = {module: protos[module] for module in means}
            present = {owner for proto in protos.values() for owner in proto.owners.tolist()}
            for number, adapter in enumerate(self.adapters):
                if number not in present:
                    raise InputError(
                        f"adapter {adapter.name} ({adapter.folder.path}): expected an update of what reads "
                        "text, got zero at every such module; was it trained? Leave it out of --adapters"
                    )
            reference = calibration.responses(self.adapters, protos, means)
            how = {key: getattr(self.settings, key) for key in ("temperature", "top_k", "false_alarm")}
            confidence = calibration.confidence()
            return Fitted.learn(self.adapters, protos, means, reference, confidence, **how)

    def route(self, queries: Sequence[Query], rows: Sequence[Sequence[int]]) -> Routing:
        """Prototypes, probe and gate; no labels, no training, no pass with an adapter."""
        every = list(map(tuple, rows))
        distinct = {row: n for n, row in enumerate(dict.fromkeys(every))}  # the same prompt is probed once
        prompts = list(distinct)
        with self.context.processes.first():  # the others find prototypes and calibration on disk
            some = self.fitted.at_once
        starts = range(0, len(prompts), some)
        parts = [self._part(prompts[start : start + some], n, len(starts)) for n, start in enumerate(starts)]
        place = np.array([distinct[row] for row in every])
        weights = np.concatenate([part.weights for part in parts])
        evidence = joined([part.evidence for part in parts if part.evidence])
        if len(prompts) == len(rows):  # as they are, without a copy
            return Routing(weights, evidence)
        return Routing(weights[place], evidence.rows(place))

    def _part(self, prompts: Sequence[Sequence[int]], number: int, of: int) -> Routing:
        """The routing of some prompts; their responses, which are large, go with it."""
        if kept := self.kept(f"part-{number}", len(prompts)):
            return kept
        title = f"probe {number + 1}/{of}" if of > 1 else "probe"
        with self.stages("probe"):
            probed = self._probed(prompts, title)
        with self.stages("gate"):
            routing = Routing(*self.fitted.decide(probed))
        if of > 1:
            self.keep(f"part-{number}", routing)
        return routing

    def _probed(self, prompts: Sequence[Sequence[int]], title: str) -> Probed:
        """Probes the prompts. Each process takes whole batches, which are the same as in one process."""
        model, pad = self.base.model, self.tokenizer.pad_token_id
        lengths = [len(row) for row in truncated(prompts)]
        mine = sorted(
            n
            for batch in by_length(lengths, tokens_at_once(model.device, model.dtype))
            if self.context.processes.takes(sum(lengths[n] for n in batch))
            for n in batch
        )
        own = self.fitted.probe(model, [prompts[n] for n in mine], pad, title)
        numbers, parts = zip(*self.context.processes.gathered((mine, own)), strict=True)
        place = np.argsort(np.concatenate(numbers))
        return Probed(*(np.concatenate(arrays)[place] for arrays in zip(*parts, strict=True)))
