"""Measures the effect of generic text on a base model and its adapters, or reads it from disk.

It depends on the base model and on the adapter alone, so it is kept adapter by adapter, under a name made
from their contents: a library that was seen before costs nothing, and one new adapter costs one adapter.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.library.adapters import Adapter
from router.library.store import content, each_kept, load, save
from router.model.answer import cut, encode
from router.model.base import Base
from router.model.frames import BARE, Frame
from router.model.passes import ENDS, ends_of, headed, truncated
from router.routing.calibration import Measured, framing_of, generic_prompts
from router.routing.probe import END, input_means, probe
from router.routing.prototypes import FORMAT as PROTOTYPES
from router.routing.prototypes import ModulePrototypes, of_some
from router.system.errors import InputError

FORMAT = 6  # raise it when what is measured changes
CONFIDENCE = " confidence"  # no module is called so


class Calibration:
    """Measures what generic text does to one base model and its adapters, or finds it on disk.

    Args:
        base: the base model.
        limit: most tokens of a prompt before it is truncated for routing; None sets no limit.
        frame: what the generic prompts stand in.
        texts: prompts that stand in the frame already; None takes the generic ones.
    """

    def __init__(
        self, base: Base, limit: int | None = None, frame: Frame = BARE, texts: Sequence[str] | None = None
    ) -> None:
        self.base = base
        short = frame if limit else frame._replace(before=ends_of(frame.before, ENDS // 4))
        head, *whole = encode(base.tokenizer, [short.before, *(texts or generic_prompts(short))])
        rows = (cut(row, limit, ends=frame != BARE) for row in whole)  # as queries are
        self.rows = truncated([row if len(row) == limit else headed(row, len(head), True) for row in rows])
        self.framing = framing_of(base.tokenizer, self.rows, frame)
        self.pad = base.tokenizer.pad_token_id
        model = base.model
        self.probe = partial(probe, model, self.rows, self.pad, title="calibrate", framing=self.framing)
        # Each number of threads cuts products otherwise, which in bfloat16 moves what is measured.
        threads = torch.get_num_threads() if model.device.type == "cpu" else None
        what = [
            FORMAT, PROTOTYPES, base.sha256, str(model.dtype), model.device.type, threads, torch.__version__,
            self.rows, *([self.framing.end] if self.framing.end != END else []),
        ]  # fmt: skip
        text = json.dumps(what) + model.config.to_json_string()
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = f"calibration/{name}"

    def means(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """The mean input of each module that text reaches, (d_in,) float32; none that sees pictures alone."""
        known = self._read(modules)
        return {module: known[module].to(self.base.model.device) for module in modules if len(known[module])}

    def _read(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """One pass over the generic prompts, unless all that it would tell is known."""
        known = load(f"{self.folder}/means") or {}
        missing = [module for module in modules if module not in known]
        if missing or CONFIDENCE not in known:
            known |= dict.fromkeys(missing, torch.empty(0))
            prefix = self.framing.prefix
            means, known[CONFIDENCE] = input_means(self.base.model, self.rows, self.pad, missing, prefix)
            if not all(tensor.isfinite().all() for tensor in (known[CONFIDENCE], *means.values())):
                dtype = str(self.base.model.dtype).removeprefix("torch.")
                raise InputError(
                    f"--dtype {dtype}: expected finite activations on generic text, got others; pass float32"
                )
            known |= means
            save(f"{self.folder}/means", known)
        return known

    def measured(
        self,
        adapters: Sequence[Adapter],
        protos: Mapping[str, ModulePrototypes],
        means: Mapping[str, Tensor],
        n_adapters: int = 0,
    ) -> Measured:
        """All that the gate learns from.

        Args:
            adapters: none of a saved router, of which nothing is kept on disk.
            protos: the adapters' prototypes in the base model's dtype and on its device; their order of
                modules is that of the responses.
            means: what to centre with, by module.
            n_adapters: how many there are, where `adapters` are not at hand.
        """
        if adapters:
            responses = self.responses(adapters, protos, means)
        else:
            responses = self.probe(protos, means, n_adapters).responses
        return Measured(self.framing, means, responses, self._read([])[CONFIDENCE].numpy())

    def responses(
        self, adapters: Sequence[Adapter], protos: Mapping[str, ModulePrototypes], means: Mapping[str, Tensor]
    ) -> NDArray[np.float32]:
        """The adapters' responses, (generic prompts, adapters, modules, 2); NaN without a prototype."""

        def measure(new: list[int]) -> Iterator[dict[str, Tensor]]:
            theirs = of_some(protos, new, len(adapters))
            responses = self.probe(theirs, means, len(new)).responses
            for k in range(len(new)):
                there = {module: m for m, module in enumerate(theirs) if not np.isnan(responses[0, k, m, 0])}
                yield {module: torch.from_numpy(responses[:, k, m].copy()) for module, m in there.items()}

        out = np.full((len(self.rows), len(adapters), len(protos), 2), np.nan, dtype=np.float32)
        place = {module: m for m, module in enumerate(protos)}
        names = [f"{self.folder}/{content(adapter)}.responses" for adapter in adapters]
        for n, known in each_kept(names, measure):
            for module, values in known.items():
                out[:, n, place[module]] = values.numpy()
        return out
