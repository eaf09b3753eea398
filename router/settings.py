"""The settings of a run. Each stands here once, with its default, its range and its help.

The command line's flags, run.json, Ray's flags and the model cards derive from the fields of `Settings`.
"""
# ruff: noqa: RUF009

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

from router.constants import (
    FALSE_POSITIVE_RATE,
    TEMPERATURE,
    TOP_K,
    Apply,
    Device,
    DeviceMap,
    Dtype,
    Engine,
    Scoring,
)
from router.system.errors import InputError
from router.system.files import typed

LARGEST = (1 << 31) - 1  # whole number of a flag; faiss takes no larger seed


@dataclass(frozen=True)
class Kind:
    """Which values a setting takes, and how they are written as a flag.

    Attributes:
        help: what the setting does.
        expected: its values in words.
        metavar: its values in the usage line.
        read: makes a value of a word of the command line, or raises ValueError.
        fits: whether a value is one of them.
        none: how None is written; "" where the setting is never None.
        many: whether the setting is a tuple of such values.
        choices: all values, where they are words.
    """

    help: str
    expected: str
    metavar: str
    read: Callable[[str], Any]
    fits: Callable[[Any], bool]
    none: str = ""
    many: bool = False
    choices: tuple[str, ...] = ()

    def parse(self, text: str) -> Any:
        """The value that a word of the command line stands for.

        Raises:
            ArgumentTypeError: it stands for none.
        """
        if self.none and text == self.none:
            return None
        try:
            value = self.read(text)
        except ValueError:
            value = None
        if not self.fits(value):
            close = difflib.get_close_matches(text, self.choices, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise argparse.ArgumentTypeError(f"expected {self.expected}, got {text!r:.40}{hint}")
        return value

    def takes(self, value: Any) -> bool:
        """Whether the setting may have this value."""
        if value is None:
            return bool(self.none)
        if self.many:
            return isinstance(value, tuple) and all(map(self.fits, value))
        return self.fits(value)


def _setting(default: Any, kind: Kind) -> Any:
    return field(default=default, metadata={"kind": kind})


def _whole(default: int | None, least: int, help: str, none: str = "", more: str = "") -> Any:
    """A setting that is a whole number from `least` to LARGEST; `more` ends its help."""

    def fits(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= LARGEST

    help = f"{help}, from {least}{more and f'; {more}'}"
    expected = f"a whole number from {least} to {LARGEST}{none and f' or {none}'}"
    return _setting(default, Kind(help, expected, f"INT{none and f'|{none}'}", int, fits, none))


def above_zero(help: str, metavar: str = "FLOAT", below: float = inf) -> Kind:
    """A finite number above 0 and below another."""
    where = "above 0" if below == inf else f"between 0 and {below:g}"
    return Kind(
        help=f"{help}, {where}",
        expected=f"a number {where}",
        metavar=metavar,
        read=float,
        fits=lambda value: isinstance(value, Real) and 0 < float(value) < below,
    )


def one_of(choices: tuple[str, ...], help: str, none: str = "") -> Kind:
    """One of some words."""
    shown = (none, *choices) if none else choices
    expected, usage = f"one of {', '.join(shown)}", "|".join(shown)
    return Kind(help, expected, usage, str, choices.__contains__, none, choices=choices)


def _word(default: str | None, words: Any, help: str, none: str = "") -> Any:
    """A setting that is one of the words of a Literal."""
    return _setting(default, one_of(get_args(words), help, none))


def _text(default: Any, metavar: str, help: str, none: str = "", read: type = str) -> Any:
    """A setting that is a text or a path, or several where the default is a tuple."""
    many = isinstance(default, tuple)
    expected = f"{'texts' if many else 'a text'}{none and f' or {none}'}"
    fits: Callable[[Any], bool] = lambda value: isinstance(value, read)  # noqa: E731
    return _setting(default, Kind(help, expected, metavar, read, fits, none, many))


@dataclass(frozen=True)
class Settings:
    """The settings of a run; `python -m router.main --help` prints what each means.

    Raises:
        InputError: one has a value that it does not take.
    """

    dataset_filepaths: tuple[Path, ...] = _text(
        (Path("data/test.csv"),), "CSV", "the query files to answer", read=Path
    )
    output_folder: Path = _text(Path("output"), "DIR", "the folder for the results", read=Path)
    adapters: tuple[str, ...] = _text(
        ("data/library",),
        "NAME_OR_FOLDER_OR_HUB_ID",
        "adapters, folders of adapter folders, or the word competition",
    )
    base_model: str | None = _text(
        None,
        "embedded|FOLDER|HUB_ID[@REVISION]",
        "the base model",
        "the one that the adapters name; embedded if that is SmolLM2-135M-Instruct",
    )
    chat_template: Path | None = _text(
        None, "auto|FILE", "a Jinja template for conversations; auto is the base model's own", "auto", Path
    )
    frame: str | None = _setting(
        None,
        Kind(
            "what stands around queries and says nothing of them; auto knows chat templates and common "
            "instruction frames, and finds what many queries share; none compares all with bare generic text",
            "auto, none, or a text with {input} in it once",
            "auto|none|'TEXT {input} TEXT'",
            str,
            lambda value: value == "none" or (isinstance(value, str) and value.count("{input}") == 1),
            "auto",
        ),
    )
    skip_bad: bool = _setting(
        False,
        Kind(
            "go on without adapters that are missing, broken, of an unsupported kind or of another base "
            "model, and list them; else the first one ends the run",
            "true or false",
            "",
            bool,
            lambda value: isinstance(value, bool),
        ),
    )
    n_variants: int | None = _whole(
        None, 1, "number of merged variants", "auto", "auto makes as few as the weights allow"
    )
    variant_rank: int | None = _whole(
        None, 1, "recompress variants to at most this rank", "exact", "exact does not recompress"
    )
    temperature: float = _setting(
        TEMPERATURE, above_zero("temperature of the gate's softmax, in standard deviations of generic text")
    )
    top_k: int = _whole(TOP_K, 1, "maximum number of adapters per query")
    false_positive_rate: float = _setting(
        FALSE_POSITIVE_RATE,
        above_zero("share of generic text, which no adapter fits, that may be sent to one", below=1),
    )
    seed: int = _whole(0, 0, "seed of the clustering and of dare_ties")
    batch_size: int | None = _whole(None, 1, "queries per batch", "auto", "auto fills batches by tokens")
    device: Device = _word("auto", Device, "auto uses a GPU if there is one")
    dtype: Dtype = _word(
        "auto",
        Dtype,
        "auto uses bfloat16 if the device multiplies it natively, else float16 on a GPU and float32 on a CPU",
    )
    device_map: DeviceMap | None = _word(
        None,
        DeviceMap,
        "how accelerate spreads a base model that is too large for one device: over all devices, the memory "
        "and the disk; none does not",
        "none",
    )
    apply: Apply = _word(
        "auto",
        Apply,
        "add a variant to the weights, of which a copy is kept (merged), or compute it beside them; auto "
        "adds it in float32 where the memory has room for the copy, since other dtypes round the sum",
    )
    engine: Engine = _word(
        "transformers", Engine, "what answers, in this process; transformers routes in both cases"
    )
    max_gen_len: int = _whole(64, 1, "maximum number of new tokens per answer")
    max_seq_len: int | None = _whole(
        None, 1, "maximum number of tokens per prompt", "none", "longer ones keep their start, none keeps all"
    )
    scoring: Scoring = _word(
        "full",
        Scoring,
        "score a choice by the log-probability of all of its tokens (full) or of all but its first, as the "
        "starter kit does (kit)",
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            kind, value = setting.metadata["kind"], getattr(self, setting.name)
            if not kind.takes(value):
                raise InputError(f"--{setting.name}: expected {kind.expected}, got {value!r:.60}")

    def plain(self) -> dict[str, Any]:
        """The settings as JSON values: paths become texts, tuples become lists."""
        found: dict[str, Any] = json.loads(json.dumps(vars(self), default=str))
        return found

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Settings:
        """The settings that `plain` gave; what is no setting of this version is left out.

        Raises:
            ValueError: one is missing, or has a value that it does not take; the message names it.
        """
        return typed(cls, {setting.name: values.get(setting.name) for setting in fields(cls)})
