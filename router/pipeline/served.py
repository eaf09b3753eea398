"""Variants on a server: names that bear hashes, and whether it answers with their weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from merge.folders import CONFIG_FILE, WEIGHTS_FILE
from router.constants import TEMPLATE
from router.routing.variants import Variant
from router.system.files import sha256_of

EQUAL = 1e-3  # nats between two answers of one server that are the same but for rounding
ALIKE = 0.05  # nats between what a variant and the base model say, which another dtype may turn around


def served(number: int, sha256: str) -> str:
    """The name of a variant on a server, with the start of its hash.

    A server keeps what it computed under a name, so other weights need another name. One that was not written
    has no hash.

    Example:
        >>> served(3, "0a1b2c3d4e")
        'variant-3-0a1b2c3d'
    """
    return f"variant-{number}-{sha256[:8]}" if sha256 else f"variant-{number}"


def served_names(variants: Sequence[Variant]) -> list[str | None]:
    """The name of each variant on a server; None for the plain base model."""
    return [served(n, variant.sha256) if variant.weights else None for n, variant in enumerate(variants)]


def hashed(variants: Sequence[Variant], names: Sequence[str | None], folder: Path) -> list[Variant]:
    """The variants with the hashes of what was written into their folders, if they have any.

    Args:
        names: of these in `folder`.
    """
    pairs = zip(variants, names, strict=True)
    return [
        replace(variant, sha256=content_of(folder / name)) if name else variant for variant, name in pairs
    ]


def content_of(folder: Path) -> str:
    """The hash of a variant's configuration, which scales its weights, of these, and of its chat template if
    it brings one; "" if one of the first two is gone.
    """
    paths = [folder / name for name in (CONFIG_FILE, WEIGHTS_FILE, TEMPLATE)]
    files = [path for path in paths if path.is_file()]
    return sha256_of(*files) if files[:2] == paths[:2] else ""


def stray(variants: Sequence[Variant], said: Mapping[int, float], base: float | None = None) -> list[int]:
    """Which variants a server answers as the base model would, though they answer otherwise.

    A server that takes an adapter and finds none of its weights answers so, too. A variant that says nearly
    the same as the base model is not counted. Where the server's base model says something else than here, as
    a quantised one may, a variant has to say just that to be one.

    Args:
        variants: one of them the plain base model.
        said: log-probability of the likeliest token after CANARY, by the number of the variant.
        base: that of the server's base model; None where it is not known.

    Example:
        >>> made = [Variant({"one": 1.0}, 0.0, canary=-0.2), Variant({}, 1.0, canary=-0.9)]
        >>> stray(made, {0: -0.25}), stray(made, {0: -0.9})
        ([], [0])
    """
    plain = next((variant.canary for variant in variants if not variant.weights), None)
    base = plain if base is None else base
    if plain is None or base is None:
        return []
    other = abs(base - plain) > ALIKE
    return [
        number
        for number, value in said.items()
        if (canary := variants[number].canary) is not None
        and abs(canary - plain) > ALIKE
        and abs(value - base) < (EQUAL if other else abs(value - base - (canary - plain)))
    ]
