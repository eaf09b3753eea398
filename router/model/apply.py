"""Answers with one adapter folder after the other on one base model, which is left as it was.

Either the update is added to the weights (`merged`), or it is computed beside them (`beside`). Merged, the
model reads and writes as fast as the plain base model, but the weights that are changed are in memory twice,
and in half precision the sum is rounded: by 0.16 to 0.34 of the update's own norm for adapters of
data/library in bfloat16.
"""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from merge.factors import Factors
from merge.folders import CONFIG_FILE, open_adapter
from router.constants import Apply
from router.model.base import Base, linear_shapes
from router.model.device import ROOM, memory_bytes, spread
from router.model.hooks import Change, changing_outputs
from router.system.errors import InputError, out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Way = Literal["merged", "beside"]


class Applied(ABC):
    """Activates folders one after the other. As a context manager, it leaves the base model as it was."""

    def __init__(self, base: Base) -> None:
        self.base = base

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.activate(None)

    @abstractmethod
    def activate(self, folder: Path | None) -> PreTrainedModel:
        """The model with a folder's update active, until the next call; None is the base model alone."""


def applied(base: Base, how: Apply = "auto") -> Applied:
    """A way to activate folders on a base model; `picked` says what `auto` is."""
    model = base.model
    if picked(model, model.device, how) == "merged":
        return Merged(base)
    return Hooked(base) if spread(model) else Beside(base)


def picked(model: PreTrainedModel, device: torch.device, how: Apply) -> Way:
    """The way that `auto` takes: `merged` in float32 where a copy of the linear layers fits, else `beside`.

    The model and the copy may take ROOM of the device's memory. What else is in memory does not count, so the
    same machine always takes the same way. A model that is spread over several devices is never copied.

    Raises:
        InputError: `merged` is asked for, and accelerate holds the weights of a module elsewhere.
    """
    if how == "merged" and spread(model):
        weights = ((name, weight) for name, weight in model.named_parameters() if weight.is_meta)
        if away := next(weights, None):
            raise InputError(
                "--apply merged: expected all weights on devices, but --device_map left "
                f"{away[0]} elsewhere; pass --apply beside"
            )
    if how != "auto":
        return how
    if spread(model):
        return "beside"
    held = sum(weight.numel() for weight in model.parameters())
    copied = sum(d_out * d_in for d_out, d_in in linear_shapes(model).values())
    fits = (held + copied) * model.dtype.itemsize <= ROOM * memory_bytes(device)
    return "merged" if fits and model.dtype == torch.float32 else "beside"


class Merged(Applied):
    """Adds a folder's update to the base model's weights: `W + s B A`, computed in float32, rounded once.

    The weights are restored from copies. Subtracting the update would leave its rounding behind.
    """

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self._plain: dict[str, Tensor] = {}  # copies of what was ever changed, (d_out, d_in) by module
        self._changed: set[str] = set()

    def activate(self, folder: Path | None) -> PreTrainedModel:
        """As in `Applied`."""
        updates = dict(open_adapter(folder).read_all()) if folder else {}
        updates = {module: update for module, update in updates.items() if update.b.any()}
        model: Any = self.base.model
        with torch.no_grad():
            for module in self._changed - updates.keys():
                model.get_submodule(module).weight.copy_(self._plain[module])
            self._changed &= updates.keys()
            for module, update in updates.items():
                weight = model.get_submodule(module).weight
                if module not in self._plain:
                    self._plain[module] = _copied(weight, module)
                plain = self._plain[module].float()
                self._changed.add(module)
                weight.copy_(torch.addmm(plain, update.b.to(plain.device), update.a.to(plain.device)))
        return self.base.model


def _copied(weight: Tensor, module: str) -> Tensor:
    """A copy of a weight that an update can be added to, so not of a quantised one."""
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.ndim != 2:
        raise InputError(
            f"--apply merged: expected weights of 16 or 32 bits, got {weight.dtype} in {module}; pass "
            "--apply beside"
        )
    try:
        return weight.clone()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryError("no memory for a copy of the base model's weights; pass --apply beside") from error


class Beside(Applied):
    """Has PEFT compute a folder's update beside the base model's weights, which are never written to.

    A folder that changes the same modules as the one before it, at no lower rank, is put into the layers
    that are there (PEFT's hot swap). For any other, layers are wrapped anew, which takes longer;
    `swap_order` gives an order in which that is rare. A folder that PEFT reads otherwise is `Hooked`. Folders
    are as `write_adapter` leaves them, in the base model's dtype.
    """

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self._model: Any = base.model
        self._hooked = Hooked(base)
        self._targets: list[str] = []
        self._rank = 0

    def activate(self, folder: Path | None) -> Any:
        """As in `Applied`."""
        self._hooked.activate(None)
        targets, rank = _changed(folder)
        if targets != self._targets or rank < self._rank:  # PEFT pads a lower rank, which costs at every step
            self._deactivate()
        if folder is None:
            return self.base.model
        if self._targets:
            from peft.utils.hotswap import hotswap_adapter

            hotswap_adapter(self._model, str(folder), "variant", "cpu")  # it moves tensor by tensor
        elif (wrapped := _wrapped(self.base.model, folder)) is None:
            return self._hooked.activate(folder)
        else:
            self._model = wrapped
        self._targets, self._rank = targets, rank
        return self._model

    def _deactivate(self) -> None:
        if self._targets:
            self._model.unload()
        self._model, self._targets, self._rank = self.base.model, [], 0


class Hooked(Applied):
    """Adds a folder's update to what modules put out, `W x + s B (A x)`, wherever accelerate keeps W.

    PEFT would spread a model anew whose weights are not all on devices.
    """

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self._active = ExitStack()

    def activate(self, folder: Path | None) -> PreTrainedModel:
        """As in `Applied`."""
        self._active.close()
        updates = open_adapter(folder).read_all() if folder else ()
        changes = {module: self._adding(module, update) for module, update in updates}
        self._active.enter_context(changing_outputs(self.base.model, changes))
        return self.base.model

    def _adding(self, module: str, update: Factors) -> Change:
        model: Any = self.base.model
        weight = model.get_submodule(module).weight
        device = model.device if weight.is_meta else weight.device  # what is elsewhere comes to the first
        a, b = (factor.to(device, model.dtype) for factor in (update.a, update.b))
        return lambda x, out: out + linear(linear(x, a), b)


def _changed(folder: Path | None) -> tuple[list[str], int]:
    """Which modules a folder's variant changes, as its configuration names them, and its rank."""
    if folder is None:
        return [], 0
    config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    return config["target_modules"], config["r"]


def _wrapped(model: PreTrainedModel, folder: Path) -> Any:
    """Adds a folder's variant to a model, by PEFT; if that fails, the model is as it was.

    None if PEFT takes its tensors for others: of some mixtures of experts it looks for `down_proj` in the
    fused experts alone, though a shared expert and dense layers have one, too.
    """
    from peft import PeftConfig, PeftModelForCausalLM

    how: dict[str, Any] = {
        "adapter_name": "variant",
        "autocast_adapter_dtype": False,  # in the base model's dtype, not float32
        "low_cpu_mem_usage": True,  # no random initialisation first
    }
    with warnings.catch_warnings():  # a user cannot act on them; what PEFT does not take shows below
        warnings.simplefilter("ignore")
        wrapped = PeftModelForCausalLM(model, PeftConfig.from_pretrained(str(folder)), **how)
        try:
            keys = wrapped.load_adapter(str(folder), torch_device=str(model.device), **how)
        except BaseException:
            wrapped.unload()
            raise
    if keys.missing_keys or keys.unexpected_keys:
        wrapped.unload()
        return None
    return wrapped.eval()


def swap_order(folders: Sequence[Path | None]) -> list[int]:
    """The numbers of folders in the order in which to activate them: by modules, then by rank."""
    return sorted(range(len(folders)), key=lambda n: _changed(folders[n]))
