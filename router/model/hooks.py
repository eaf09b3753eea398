"""Hooks on a model's modules: everything that reads or changes activations goes through here.

Where accelerate has spread a model over devices, what is read is handed over on the model's own device, where
prompts go too, and what is changed on the module's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Visit = Callable[[str, Tensor], object]  # (module name, its input (..., d_in))
Change = Callable[[Tensor, Tensor], Tensor]  # (input (..., d_in), output (..., d_out)) -> new output


@contextmanager
def reading_inputs(model: PreTrainedModel, modules: Sequence[str], visit: Visit) -> Iterator[None]:
    """Calls `visit(module name, input)` whenever one of the named modules runs inside the block."""
    here = model.device

    def read(name: str, _: Any, args: tuple[Tensor]) -> None:
        visit(name, args[0].to(here))

    with ExitStack() as hooks:
        for name in modules:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(partial(read, name)))
        yield


@contextmanager
def changing_outputs(model: PreTrainedModel, changes: Mapping[str, Change]) -> Iterator[None]:
    """Replaces the output of each named module by `change(input, output)` inside the block."""

    def changed(change: Change, _: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        return change(args[0].to(out.device), out)

    with ExitStack() as hooks:
        for name, change in changes.items():
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(changed, change)))
        yield


def make_head_input_contiguous(model: PreTrainedModel) -> None:
    """Makes the output layer copy its input first, from now on.

    Reading a prompt gives the layer a strided slice, and a strided 3-D product copies the whole vocabulary
    matrix once per row.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
