"""The settings of a run: the command line's flags and their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

from router.constants import Apply, Device, DeviceMap, Dtype, Engine
from router.errors import InputError
from router.model.answer import Scoring

LARGEST = (1 << 31) - 1  # whole number of a flag; faiss takes no larger seed
# The words that a setting may be; that of device_map may also be None.
WORDS: dict[str, tuple[str, ...]] = {
    "device": get_args(Device), "device_map": get_args(DeviceMap), "dtype": get_args(Dtype),
    "apply": get_args(Apply), "engine": get_args(Engine), "scoring": get_args(Scoring),
}  # fmt: skip
# The least that a number may be, and which may also be None.
SMALLEST = {
    "n_variants": 1, "variant_rank": 1, "top_k": 1, "ahead": 0, "seed": 0, "batch_size": 1, "max_gen_len": 1,
    "max_seq_len": 1,
}  # fmt: skip
OPTIONAL = ("n_variants", "variant_rank", "batch_size", "max_seq_len")


@dataclass(frozen=True)
class Settings:
    """The flags of a run; see `python -m router.main --help` for what each means.

    Raises:
        InputError: one of WORDS is another word, or a number is not in its range.
    """

    dataset_filepaths: tuple[Path, ...] = (Path("data/test.csv"),)
    output_folder: Path = Path("output")
    adapters: tuple[str, ...] = ("data/library",)
    base_model: str | None = None
    skip_bad: bool = False
    n_variants: int | None = None
    variant_rank: int | None = None
    temperature: float = 0.7
    top_k: int = 3
    false_alarm: float = 0.2
    ahead: int = 8
    seed: int = 0
    batch_size: int | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    device_map: DeviceMap | None = None
    apply: Apply = "auto"
    engine: Engine = "transformers"
    max_gen_len: int = 64
    max_seq_len: int | None = None
    scoring: Scoring = field(default="full")

    def __post_init__(self) -> None:
        for name, words in WORDS.items():
            value = getattr(self, name)
            if value not in words and (name, value) != ("device_map", None):
                raise InputError(f"--{name}: expected one of {', '.join(words)}, got {value!r}")
        for name, least in SMALLEST.items():
            number = getattr(self, name)
            fits = isinstance(number, Integral) and least <= int(number) <= LARGEST
            if not fits and (number is not None or name not in OPTIONAL):
                raise InputError(f"--{name}: expected a whole number from {least} to {LARGEST}, got {number}")
        for name in ("temperature", "false_alarm"):
            if not isinstance(getattr(self, name), Real):
                raise InputError(f"--{name}: expected a number, got {getattr(self, name)!r}")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"--temperature: expected a number above 0, got {self.temperature}")
        if not 0 < self.false_alarm < 1:
            raise InputError(f"--false_alarm: expected a number between 0 and 1, got {self.false_alarm}")

    def plain(self) -> dict[str, Any]:
        """The settings as JSON values: paths become strings, tuples become lists."""
        return {key: _plain(value) for key, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
