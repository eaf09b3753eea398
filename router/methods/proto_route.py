"""`proto_route`: prototypes of the adapters' subspaces, gated softly by calibrated cosine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files

from router.clusters import Array
from router.errors import InputError
from router.gate import PrototypeGate
from router.merges import Routed
from router.predict import encode
from router.probe import input_means, responses
from router.prototypes import prototypes
from router.submission import Query


def generic_prompts() -> list[str]:
    """The prompts that ship with the package, against which responses are calibrated."""
    prompts: list[str] = json.loads(files("router").joinpath("generic.json").read_text("utf-8"))
    return prompts


class ProtoRoute(Routed):
    """Routes by how strongly the base model's activations set each adapter's update free."""

    def route(self, queries: Sequence[Query]) -> Array:
        """Probe, prototypes, gate; no labels, no training, no data of the adapters."""
        model, tokenizer, limit = self.base.model, self.tokenizer, self.settings.max_seq_len
        pad, n = tokenizer.pad_token_id, len(self.adapters)
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
            generic = encode(tokenizer, generic_prompts(), limit)
            means = input_means(model, generic, pad, list(protos))
            reference = responses(model, generic, pad, protos, means, n, "calibrate")
        with self.stages("probe"):
            rows = encode(tokenizer, [query.input for query in queries], limit)
            measured = responses(model, rows, pad, protos, means, n)
        with self.stages("gate"):
            gate = PrototypeGate(self.settings.temperature, self.settings.top_k).fit(reference)
            return gate.predict_proba(measured)
