"""A finished run as one HTML file that needs nothing else: `proto-route report DIR`.

Loads no model and no adapter. Queries, answers and names may be hostile text. The template escapes all of
them, and the page's script gets them as JSON that cannot end its block.
"""

import base64
import hashlib
from argparse import ArgumentParser, Namespace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from router.pipeline.evidence import LOW_MARGIN
from router.pipeline.record import REPORT
from router.runs.load import Run, load
from router.runs.report.data import BEST, LONG, SHOWN_QUERIES, data, escaped, headline, layers, variants
from router.system.errors import InputError
from router.system.files import SEAL, is_sealed, replacing, sealed


def write_report(folder: Path) -> Path:
    """Makes `report.html` from the files of a finished run and returns its path.

    Raises:
        InputError: files of the run are missing, or do not belong together, or somebody changed the report.
    """
    if not is_sealed(folder / REPORT):
        raise InputError(f"{folder / REPORT}: expected none, or one as it was made; move it away")
    html = render(load(folder)).encode("utf-8", "replace").decode()  # half a character of a query is none
    with replacing(folder / REPORT) as file:
        file.write(sealed(html))
    return folder / REPORT


def render(run: Run) -> str:
    """The page of a run."""
    shown = run.sample(SHOWN_QUERIES)
    facts, rows, layered = data(shown), variants(run, shown), layers(run)
    facts["layers"] = layered["groups"] if layered else []
    used = [k for k in range(len(run.names)) if any(row["weights"][k] >= 0.005 for row in rows)]
    adapters = {
        name: [adapter.revision or "none", adapter.sha256] for name, adapter in run.record.adapters.items()
    }
    return _template().render(
        run=run, shown=shown, record=run.record.plain(), headline=headline(run), variants=rows, used=used,
        adapters=adapters, layers=layered, best=BEST, low_margin=LOW_MARGIN, long=LONG,
        data=facts, json=Markup(escaped(facts)), seal=SEAL + "0" * 64,
    )  # fmt: skip


@cache
def _template() -> Template:
    """The page's template; compiling it takes longer than rendering a small run."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, lstrip_blocks=True)
    environment.filters |= {"number": _number, "duration": _duration, "digest": _digest, "value": _value}
    source = resources.files("router.runs.report").joinpath("report.html.j2").read_text("utf-8")
    return environment.from_string(source)


def _number(value: float | None, digits: int = 0) -> str:
    return "none" if value is None else f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} seconds"


def _digest(text: str) -> str:
    """How a content security policy names an inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _value(value: Any) -> str:
    """A setting in words."""
    return "default" if value is None else ", ".join(map(str, value if isinstance(value, list) else [value]))


def flags(p: ArgumentParser) -> None:
    """The flags of `proto-route report`."""
    p.add_argument("folder", type=Path, metavar="DIR", help="the run's output folder")


def work(args: Namespace) -> None:
    """Writes the report and prints where it is."""
    print(write_report(args.folder))
