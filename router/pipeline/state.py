"""A fitted library as a file: all that a query needs to be routed, beside the base model.

No adapter and no generic text is in it. Safetensors and JSON only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from router.model.frames import Frame
from router.pipeline.fitted import Fitted, kept
from router.routing.gate import FACTORS, PrototypeGate
from router.routing.large import gate_for
from router.routing.probe import Framing
from router.routing.prototypes import ModulePrototypes
from router.settings import Count, Positive
from router.system.errors import InputError
from router.system.files import for_others, record_of

FILE = "router.safetensors"
# The gate's arrays, a letter an axis: adapters, modules, views, factors, landmarks, generic prompts.
_LEARNED = {
    "mean_": "amv", "std_": "amv", "filter_": "amv", "landmarks_": "l", "axes_": "lmvf", "loadings_": "amvf",
    "reference_": "glmv", "coefficients_": "ga", "residual_scale_": "a", "confidence_": "v",
    "reference_leads_": "g", "handicap_": "a",
}  # fmt: skip


@dataclass(frozen=True)
class _Framed:
    """A frame as the file has it, see `Fitted`."""

    before: str
    after: str
    prefix: list[int]
    end: int


@dataclass(frozen=True)
class _About:
    """A library as the file has it, see `Fitted`; its gate has these settings in each frame."""

    names: list[str]
    modules: list[str]
    representative: list[int]
    lookalikes: list[int]
    silent: list[int]
    frames: list[_Framed]
    temperature: Positive
    top_k: Count | None
    false_positive_rate: Annotated[float, Field(gt=0, lt=1)]


def save(fits: Sequence[Fitted], folder: Path) -> None:
    """Writes `router.safetensors` into a folder.

    Args:
        fits: the library in each of its frames.
    """
    one = fits[0]
    tensors = dict[str, Tensor]()
    tensors["homes"] = torch.from_numpy(one.homes)
    for module, proto in one.prototypes.items():
        for part in ("directions", "weights", "owners"):
            tensors[f"{part} {module}"] = getattr(proto, part)
    for n, fitted in enumerate(fits):
        arrays = {f"gate {name}": getattr(fitted.gate, name) for name in _LEARNED}
        arrays |= {"gate threshold_": np.array([fitted.gate.threshold_]), "reference": fitted.reference}
        named = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        named |= {f"mean {module}": mean for module, mean in fitted.means.items()}
        tensors |= {f"{n} {name}": tensor for name, tensor in named.items()}
    framings = (fitted.framing for fitted in fits)
    frames = [_Framed(*framing.frame, list(framing.prefix), framing.end) for framing in framings]
    about = _About(
        one.names, list(one.prototypes), one.representative, one.lookalikes, one.silent, frames,
        **one.gate.get_params(),
    )  # fmt: skip
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        folder / FILE,
        metadata={"router": json.dumps(asdict(about))},  # safetensors writes several in no certain order
    )
    for_others(folder / FILE)


def load(folder: Path, device: torch.device, dtype: torch.dtype, widths: Mapping[str, int]) -> list[Fitted]:
    """Reads what `save` wrote.

    Args:
        device, dtype: of the base model.
        widths: d_in of its linear layers by module name.

    Raises:
        InputError: the file is missing or damaged, or made for another base model.
    """
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            about = record_of(_About, (file.metadata() or {}).get("router", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not about.frames:
            raise ValueError("expected a frame, got none")
        modules = about.modules
        protos = {
            m: ModulePrototypes(
                tensors[f"directions {m}"].to(device, dtype),
                tensors[f"weights {m}"].to(device),
                tensors[f"owners {m}"].to(device),
            )
            for m in modules
        }
        fits = []
        for n, framed in enumerate(about.frames):
            start = f"{n} "
            arrays = {
                name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)
            }
            _check(about, tensors | arrays, widths)
            how = {key: getattr(about, key) for key in PrototypeGate().get_params()}
            gate = gate_for(len(arrays["gate mean_"]), **how)
            for name in _LEARNED:
                setattr(gate, name, arrays[f"gate {name}"].numpy())
            gate.threshold_ = float(arrays["gate threshold_"])
            gate.n_adapters_, gate.n_modules_ = gate.mean_.shape[:2]
            fits.append(
                Fitted(
                    about.names,
                    protos,
                    {m: arrays[f"mean {m}"].to(device) for m in modules},
                    gate,
                    about.representative,
                    about.lookalikes,
                    about.silent,
                    Framing(Frame(framed.before, framed.after), framed.prefix, framed.end),
                    arrays["reference"].numpy(),
                    tensors["homes"].numpy(),
                )
            )
        return fits
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / FILE}: expected what Router.save wrote, got something else ({error}); save it again"
        ) from error


def _check(about: _About, tensors: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
    """Refuses what does not fit together, or not to the base model."""
    n, modules = len(about.names), about.modules
    numbers = {*about.representative, *about.lookalikes, *about.silent}
    if len(about.representative) != n or not n or not numbers <= set(range(n)):
        raise ValueError(f"expected a representative for each of {n} adapters")
    there = np.zeros((n, len(modules), 2), bool)  # which adapter has a prototype where
    shapes: dict[str, tuple[int, ...]] = {"reference": there.shape, "gate threshold_": (1,), "homes": (n,)}
    for m, module in enumerate(modules):
        owners = tensors[f"owners {module}"]
        width = widths.get(module, 0)
        shapes |= {f"directions {module}": (width, len(owners)), f"weights {module}": (len(owners),)}
        shapes |= {f"mean {module}": (width,)}
        if owners.dtype != torch.int64 or not torch.equal(owners, owners.sort()[0].clamp(0, n - 1)):
            raise ValueError(f"owners {module}: expected numbers of adapters in ascending order")
        there[owners.numpy(), m] = True
    heard = tensors["reference"].isfinite().numpy()  # (adapters, modules, 2)
    if heard.shape != there.shape or (heard != heard[..., :1] & there).any():
        raise ValueError("reference: expected numbers where an adapter has a prototype, and nowhere else")
    if not (stand := kept(about.representative, tensors["reference"].numpy())):
        raise ValueError("reference: expected a number wherever an adapter is heard, got none")
    who = tensors["gate landmarks_"]
    sizes = {"a": len(stand), "m": len(modules), "v": 2, "f": FACTORS}
    sizes |= {"l": len(who), "g": len(tensors["gate reference_leads_"])}
    shapes |= {f"gate {name}": tuple(sizes[axis] for axis in axes) for name, axes in _LEARNED.items()}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.is_floating_point() == (name in ("gate landmarks_", "homes")):
            raise ValueError(f"{name}: expected numbers of shape {shape}, got {tuple(tensor.shape)}")
        if name not in ("reference", "gate mean_", "gate std_") and not tensor.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers")
    if who.dtype != torch.int64 or not ((who >= 0) & (who < len(stand))).all():
        raise ValueError(f"gate landmarks_: expected numbers of {len(stand)} adapters")
    if not (tensors["gate residual_scale_"] > 0).all():
        raise ValueError("gate residual_scale_: expected numbers above 0")
    if (tensors["gate mean_"].isfinite().numpy() != heard[stand]).any():
        raise ValueError("gate mean_: expected a number wherever an adapter is heard, and nowhere else")
