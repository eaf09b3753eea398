"""How adapters respond to generic text: what the gate compares with.

The text ships with the package: task-like prompts in many layouts and languages, made for no adapter.
What is measured depends on the base model and on the adapter alone, so it is kept on disk, adapter by
adapter, under a name made from their contents: a library that was seen before costs nothing, and one new
adapter costs one adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.library.adapters import Adapter
from router.library.store import content, load, save
from router.model.answer import encode
from router.model.base import Base
from router.model.frames import BARE, Frame, alike
from router.model.passes import truncated
from router.routing.probe import END, input_means, probe
from router.routing.prototypes import FORMAT as PROTOTYPES
from router.routing.prototypes import ModulePrototypes, of_some

FORMAT = 6  # raise it when what is measured changes
# A module is silent if generic text has less than this share of chance along what the adapter reads. Trained
# adapters have 0.6 and more, random ones 1; see docs/method.md.
SILENT = 0.4
CONFIDENCE = " confidence"  # no module is called so


def generic_prompts(frame: Frame = BARE) -> list[str]:
    """The texts against which responses are calibrated: in a frame, messages to an assistant among them."""
    names = ["generic.json"] if frame == BARE else ["generic.json", "talk.json"]
    folder = files("router.routing")
    return [
        frame.around(text) for name in names for text in json.loads(folder.joinpath(name).read_text("utf-8"))
    ]


def silent(responses: NDArray[np.float32], widths: Sequence[int]) -> NDArray[np.bool_]:
    """Where an adapter reads directions that generic text hardly has, (adapters, modules).

    Whatever is unlike generic text stands out there, by a multiple that no honest adapter reaches. So it says
    nothing of the adapter's skill.

    Args:
        responses: (generic prompts, adapters, modules, 2), NaN without a prototype.
        widths: (modules,) of the inputs. Chance is a squared cosine of 1 / width.
    """
    logs = np.zeros(responses.shape[1:])  # (adapters, modules, 2), summed prompt by prompt to save memory
    for row in responses:
        logs += np.log(row.clip(1e-6))
    energy = np.exp(2 * logs / len(responses)).mean(-1) * np.array(widths)  # (adapters, modules)
    return np.asarray(energy < SILENT)


class Calibration:
    """What generic text does to one base model and its adapters.

    Args:
        base: the base model.
        limit: most tokens of a prompt before it is truncated for routing; None sets no limit.
        frame: what the generic prompts stand in.

    Attributes:
        prefix: the token ids with which all of them begin in a frame.
        end: how many tokens are the end of each. After a chat template's message stand marks that say nothing
            by themselves; they count, and so do the last tokens before them.
    """

    def __init__(self, base: Base, limit: int | None = None, frame: Frame = BARE) -> None:
        self.base = base
        self.rows = truncated(encode(base.tokenizer, generic_prompts(frame), limit))
        self.prefix = self.rows[0][: alike(self.rows)] if frame.before else []
        tail = alike([row[::-1] for row in self.rows]) if frame.after else 0
        marked = tail and self.rows[0][-tail] in base.tokenizer.added_tokens_decoder
        self.end = END + (tail if marked else 0)
        self.pad, model = base.tokenizer.pad_token_id, base.model
        # Each number of threads cuts products otherwise, which in bfloat16 moves what is measured.
        threads = torch.get_num_threads() if model.device.type == "cpu" else None
        what = [
            FORMAT,
            PROTOTYPES,
            base.sha256,
            str(model.dtype),
            model.device.type,
            threads,
            torch.__version__,
            self.rows,
            *([self.end] if self.end != END else []),
        ]
        text = json.dumps(what) + model.config.to_json_string()
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = f"calibration/{name}"

    def _file(self, adapter: Adapter, what: str) -> str:
        return f"{self.folder}/{content(adapter)}.{what}"

    def means(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """The mean input of each module that text reaches, (d_in,) float32; none that sees pictures alone."""
        known = self._read(modules)
        return {module: known[module].to(self.base.model.device) for module in modules if len(known[module])}

    def confidence(self) -> NDArray[np.float32]:
        """The base model's confidence at the end of each generic prompt, (generic prompts,)."""
        confidence: NDArray[np.float32] = self._read([])[CONFIDENCE].numpy()
        return confidence

    def _read(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """One pass over the generic prompts, unless all that it would tell is known."""
        known = load(f"{self.folder}/means") or {}
        missing = [module for module in modules if module not in known]
        if missing or CONFIDENCE not in known:
            known |= dict.fromkeys(missing, torch.empty(0))
            means, known[CONFIDENCE] = input_means(self.base.model, self.rows, self.pad, missing, self.prefix)
            known |= means
            save(f"{self.folder}/means", known)
        return known

    def responses(
        self,
        adapters: Sequence[Adapter],
        protos: Mapping[str, ModulePrototypes],
        means: Mapping[str, Tensor],
        n_adapters: int = 0,
    ) -> NDArray[np.float32]:
        """The adapters' responses, (generic prompts, adapters, modules, 2); NaN without a prototype.

        Args:
            adapters: none of a saved router, of which nothing is kept on disk.
            protos: the adapters' prototypes in the base model's dtype and on its device; their order of
                modules is that of the responses.
            means: what to centre with, by module.
            n_adapters: how many there are, where `adapters` are not at hand.
        """
        if not adapters:
            return probe(
                self.base.model,
                self.rows,
                self.pad,
                protos,
                means,
                n_adapters,
                "calibrate",
                self.prefix,
                self.end,
            ).responses
        out = np.full((len(self.rows), len(adapters), len(protos), 2), np.nan, dtype=np.float32)
        place, new = {module: m for m, module in enumerate(protos)}, []
        for n, adapter in enumerate(adapters):
            known = load(self._file(adapter, "responses"))
            if known is None:
                new.append(n)
            for module, values in (known or {}).items():
                out[:, n, place[module]] = values.numpy()
        if new:
            theirs = of_some(protos, new, len(adapters))
            found = probe(
                self.base.model,
                self.rows,
                self.pad,
                theirs,
                means,
                len(new),
                "calibrate",
                self.prefix,
                self.end,
            ).responses
            for k, n in enumerate(new):
                own = {
                    module: torch.from_numpy(found[:, k, m].copy())
                    for m, module in enumerate(theirs)
                    if not np.isnan(found[0, k, m, 0])
                }
                for module, values in own.items():
                    out[:, n, place[module]] = values.numpy()
                save(self._file(adapters[n], "responses"), own)
        return out
