"""The settings of a run. Each stands here once, with its default, its range and its help.

The type of a setting is its range; pydantic checks it. The command line's flags, run.json and the model cards
derive from the fields of `Settings`. The gate has three of the defaults, too: router/constants.py names them.
"""
# ruff: noqa: RUF009

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, Field, FiniteFloat

from router.constants import (
    FALSE_POSITIVE_RATE,
    LIBRARY,
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
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Positive = Annotated[FiniteFloat, Field(gt=0)]


def _framing(text: str) -> str:
    if text != "none" and text.count("{input}") != 1:
        raise ValueError("expected none or a text with {input} in it once")
    return text


def setting(default: Any, help: str, metavar: str = "", none: str = "") -> Any:
    """A field of `Settings`.

    Args:
        metavar: its values in the usage line; "" lists the words of its type.
        none: how None is written as a flag.
    """
    return field(default=default, metadata={"help": help, "metavar": metavar, "none": none})


def reader(kind: Any, none: str = "") -> Callable[[str], Any]:
    """Makes values of a type of words of the command line; argparse prints the errors that it raises."""

    def read(word: str) -> Any:
        if none and word == none:
            return None
        try:
            return typed(kind, word)
        except ValueError as error:
            more = f", or {none}" if none else ""
            raise argparse.ArgumentTypeError(f"{error}{more}, got {word!r:.40}") from error

    return read


@dataclass(frozen=True)
class Settings:
    """The settings of a run; `python -m router.main --help` prints what each means.

    Raises:
        InputError: one has a value that it does not take.
    """

    dataset_filepaths: tuple[Path, ...] = setting(
        (Path("data/test.csv"),), "the query files to answer", metavar="CSV"
    )
    output_folder: Path = setting(Path("output"), "the folder for the results", metavar="DIR")
    adapters: tuple[str, ...] = setting(
        (LIBRARY.as_posix(),),
        "adapters, folders of adapter folders, or the word competition",
        metavar="NAME_OR_FOLDER_OR_HUB_ID",
    )
    base_model: str | None = setting(
        None,
        "the base model",
        metavar="embedded|FOLDER|HUB_ID[@REVISION]",
        none="the one that the adapters name; embedded if that is SmolLM2-135M-Instruct",
    )
    chat_template: Path | None = setting(
        None,
        "a Jinja template for conversations; auto is the base model's, or else the adapters'",
        metavar="auto|FILE",
        none="auto",
    )
    frame: Annotated[str, AfterValidator(_framing)] | None = setting(
        None,
        "what stands around queries and says nothing of them; auto knows chat templates and common "
        "instruction frames, and finds what many queries share; none compares prompts with bare text, "
        "and conversations in their template",
        metavar="auto|none|'TEXT {input} TEXT'",
        none="auto",
    )
    skip_bad: bool = setting(
        False,
        "go on without adapters that are missing, broken, of an unsupported kind or of another base "
        "model, and list them; else the first one ends the run",
    )
    n_variants: Count | None = setting(
        None,
        "number of merged variants, from 1; auto makes as few as the weights allow",
        metavar="INT|auto",
        none="auto",
    )
    variant_rank: Count | None = setting(
        None,
        "recompress variants to at most this rank, from 1; exact does not recompress",
        metavar="INT|exact",
        none="exact",
    )
    temperature: Positive = setting(
        TEMPERATURE,
        "temperature of the gate's softmax, in standard deviations of generic text, above 0",
        "FLOAT",
    )
    top_k: Count = setting(TOP_K, "maximum number of adapters per query, from 1", "INT")
    false_positive_rate: Annotated[float, Field(ge=1e-6, lt=1)] = setting(
        FALSE_POSITIVE_RATE,
        "of queries that no adapter fits, the share that may be sent to one, between 0.000001 and 1",
        "FLOAT",
    )
    seed: Annotated[int, Field(ge=0, le=LARGEST)] = setting(
        0, "seed of the clustering and of dare_ties, from 0", "INT"
    )
    batch_size: Count | None = setting(
        None, "queries per batch, from 1; auto fills batches by tokens", "INT|auto", none="auto"
    )
    device: Device = setting("auto", "auto uses a GPU if there is one")
    dtype: Dtype = setting(
        "auto",
        "auto uses bfloat16 if the device multiplies it natively, else float16 on a GPU and float32 on a CPU",
    )
    device_map: DeviceMap | None = setting(
        None,
        "how accelerate spreads a base model that is too large for one device: over all devices, the memory "
        "and the disk; none does not",
        none="none",
    )
    apply: Apply = setting(
        "auto",
        "add a variant to the weights, of which a copy is kept (merged), or compute it beside them; auto "
        "adds it in float32 where the memory has room for the copy, since other dtypes round the sum",
    )
    engine: Engine = setting(
        "transformers", "what answers, in this process; transformers routes in both cases"
    )
    max_gen_len: Count = setting(64, "maximum number of new tokens per answer, from 1", "INT")
    max_seq_len: Count | None = setting(
        None,
        "maximum number of tokens per prompt, from 1; longer ones keep their start, chats both ends; none "
        "keeps all",
        "INT|none",
        none="none",
    )
    scoring: Scoring = setting(
        "full",
        "score a choice by the log-probability of all of its tokens (full) or of all but its first, as the "
        "starter kit does (kit)",
    )

    def __post_init__(self) -> None:
        for name, kind in kinds().items():
            value = getattr(self, name)
            try:
                typed(kind, value, strict=True)
            except ValueError as error:
                raise InputError(f"--{name}: {error}, got {value!r:.60}") from error

    def plain(self) -> dict[str, Any]:
        """The settings as JSON values: paths become texts, tuples become lists."""
        values: dict[str, Any] = json.loads(json.dumps(vars(self), default=str))
        return values

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Settings:
        """The settings that `plain` gave; what is no setting of this version is left out.

        Raises:
            ValueError: one is missing, or has a value that it does not take; the message names it.
        """
        return typed(cls, {item.name: values.get(item.name) for item in fields(cls)})


@cache
def kinds() -> dict[str, Any]:
    """The type of each setting, by its name."""
    return get_type_hints(Settings, include_extras=True)
