"""A GPU that a CPU plays: tensors that say they are on `cuda:0` and refuse to meet tensors that are not.

Every operation is computed on the CPU, so that the answers can be compared. What is on the wrong device fails
as it would on a card. Kernels, memory and speed of a real card are not played.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda", 0)
# Methods that ask the device's driver before they dispatch, so that no dispatcher sees them.
NEED_A_DRIVER = {
    getattr(torch.Tensor, name) for name in (
        "__getitem__", "__setitem__", "__invert__", "__int__", "__float__", "__bool__", "__index__",
        "contiguous", "item", "tolist", "nonzero", "cpu", "copy_",
    )
}  # fmt: skip


class OnCard(torch.Tensor):
    """A tensor on the card, whose values the CPU holds."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=CARD
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"OnCard({self.held})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in NEED_A_DRIVER:
            return _compute(func.__name__, func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func._schema.name, func, args, kwargs or {})


def _held(x):
    """What the CPU computes with."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.held if isinstance(x, OnCard) else x


def _compute(name, func, args, kwargs):
    name, leaves = name.removeprefix("aten::"), tree_leaves((args, kwargs))
    asked = [x for x in leaves if isinstance(x, torch.device)]
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    there = {id(x.held): x for x in tensors if isinstance(x, OnCard)}
    # A card takes numbers of the CPU, and indices.
    stray = [x for x in tensors if not isinstance(x, OnCard) and x.dim()]
    if (
        there
        and stray
        and not name.startswith(("_to_copy", "to", "copy_", "index", "__getitem", "__setitem"))
    ):
        raise RuntimeError(f"{name}: expected all tensors on {CARD}, got {tuple(stray[0].shape)} on the CPU")
    if asked:
        on = asked[0].type == CARD.type
    else:
        on = isinstance(args[0], OnCard) if name == "copy_" else bool(there) and name != "cpu"

    def wrapped(x):
        if not isinstance(x, torch.Tensor):
            return x
        if not on:
            return x.clone() if id(x) in there else x  # the card keeps its own
        return there[id(x)] if id(x) in there else OnCard(x)

    if "pin_memory" in kwargs:  # there is no driver to pin it
        kwargs = kwargs | {"pin_memory": None}
    return tree_map(wrapped, func(*tree_map(_held, args), **tree_map(_held, kwargs)))


class _Card(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func._schema.name, func, args, kwargs or {})


@contextmanager
def card():
    """Inside the block the CPU plays a card, `cuda:0`."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) moves where it can be seen
    try:
        with patch("torch.cuda._lazy_init", lambda: None), _Card():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(before)
