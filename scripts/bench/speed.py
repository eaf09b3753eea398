"""What the pipeline costs, beside what it is compared with: `python -m scripts.bench.speed`.

Writes the table of docs/speed.md. What is compared takes turns, and a ratio is that of two measurements of
one turn. What was measured is kept in a file under output/benchmark/speed; delete it to measure it anew. The
queries are the competition's `test.csv` where it is at hand, else `data/test.csv`.
"""

import sys
import tempfile
from argparse import ArgumentParser, RawTextHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MistralConfig

from router.constants import LIBRARY
from router.library.adapters import Adapter, load_library
from router.model.answer import encode
from router.model.base import EMBEDDED, load_base, ready
from router.model.passes import batches, forward, truncated
from router.queries.submission import Query, read_queries
from router.routing.probe import input_means, probe
from router.routing.prototypes import prototypes
from scripts.bench import libraries, runner
from scripts.bench.markdown import header, insert, row
from scripts.bench.runner import Found, timed
from scripts.bench.score import COPY

PAGE, DEMO = Path("docs/speed.md"), Path("data/test.csv")
COMPETITION = Path("../shared/competition/test.csv")
LARGEST = 256  # adapters
ALL, EIGHTH, ONE = 1, 8, 1 << 30  # every so many queries
PROMPTS = 100  # that the probe is measured with
MISTRAL, RANK, ADAPTERS = "random/mistral", 16, 27  # one layer of its shape, and the competition's library
Known = dict[str, dict[str, Found]]  # by measurement and number of the turn


def queries(every: int = ALL) -> list[Query]:
    """Every so many of the queries, the first one first."""
    return read_queries(COMPETITION if COMPETITION.exists() else DEMO)[::every]


def library(size: int) -> list[Adapter]:
    """The first adapters of the committed library, and perturbed copies after them, of each one in turns."""
    committed = load_library([str(LIBRARY)])
    if size <= len(committed):
        return committed[:size]
    copies = libraries.grown(committed, LARGEST)[len(committed) :]
    return (committed + sorted(copies, key=lambda copy: copy.name.rpartition(COPY)[2]))[:size]


def _run(method: str, every: int, size: int, *flags: str) -> Found:
    """A run of a method on every so many queries, with a library of so many adapters."""
    paths = [str(adapter.folder.path) for adapter in library(size)]
    return runner.run(queries(every), "-m", method, "--adapters", *paths, *flags)


def routed(size: int, every: int) -> Found:
    """A run of proto_route without loading, its prototypes and calibration on disk already."""
    _run("proto_route", ONE, size)
    found = _run("proto_route", every, size)
    return found | {"seconds": sum(found["stages"].values()) - found["stages"]["load"]}


def static() -> Found:
    """The same answers from one average of all adapters, which is merged into the weights already."""
    found = _run("average", ALL, 22, "--apply", "merged")
    return found | {"seconds": found["stages"]["predict"]}


def demo() -> Found:
    """The demo's command with nothing on disk but the installed packages, from its start to its end."""
    with tempfile.TemporaryDirectory() as cache:
        return runner.run(read_queries(DEMO), "-m", "proto_route", cache=cache)


def probing() -> Found:
    """The probe of a hundred queries with the committed library, and one pass that only reads them."""
    base = load_base(EMBEDDED)
    rows = truncated(encode(base.tokenizer, [query.input for query in queries()]))
    some = rows[:: max(1, len(rows) // PROMPTS)]
    return _probing(base.model, some, base.tokenizer.pad_token_id, library(22))


def mistral() -> Found:
    """The same with a layer of Mistral-7B's shape and random weights, and adapters on all of it."""
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM
    model = made.from_config(MistralConfig(num_hidden_layers=1), dtype=torch.bfloat16)
    ready(model, "cpu")
    rows = torch.randint(5, model.config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(2))
    with tempfile.TemporaryDirectory() as folder:
        libraries.uniform(model, MISTRAL, RANK, ADAPTERS, Path(folder))
        return _probing(model, rows.tolist(), 0, load_library([folder]))


def _probing(model: Any, rows: list[list[int]], pad: int, adapters: Sequence[Adapter]) -> Found:
    """Seconds of the probe and of one pass over the same tokens, one after the other."""
    protos = prototypes(adapters, dtype=model.dtype)
    means, _ = input_means(model, rows[:8], pad, list(protos))

    def read(part: list[list[int]]) -> None:
        with torch.inference_mode():
            list(batches(model, part, pad, None, partial(forward, model)))

    def routing(part: list[list[int]]) -> None:
        probe(model, part, pad, protos, means, len(adapters), None)

    for warm in (read, routing):
        warm(rows[:4])
    tokens = sum(map(len, rows))
    seconds, of_pass = (timed(partial(work, rows))[0] for work in (routing, read))
    return {"seconds": seconds, "pass": of_pass, "tokens": tokens}


MEASURES: dict[str, Callable[[], Found]] = {
    "probing": probing,
    "mistral": mistral,
    "demo": demo,
    "routed 22": partial(routed, 22, ALL),
    "static": static,
    "routed 256": partial(routed, LARGEST, EIGHTH),
    "routed 16": partial(routed, 16, EIGHTH),
}


def line(what: str, against: str, limit: float, values: list[float], unit: str = "x") -> list[str]:
    """A line of the table: median and range of what the turns found, and whether the limit is kept."""
    if not values:
        return []
    low, middle, high = min(values), median(values), max(values)
    spread = "" if low == high else f" ({low:.2f} to {high:.2f})"
    verdict = "met" if middle <= limit else "missed"
    return [row(what, against, f"at most {limit:g}{unit}", f"{middle:.2f}{unit}{spread}", verdict)]


def lines(known: Known) -> list[str]:
    """The lines of the table of which there are measurements."""

    def values(job: str, key: str = "seconds") -> list[float]:
        return [one[key] for one in known.get(job, {}).values()]

    def ratios(one: str, other: str, key: str = "seconds", over: str = "") -> list[float]:
        """One measurement over the other, of each turn that has both."""
        first, second = known.get(one, {}), known.get(other, {})
        return [first[turn][key] / second[turn][over or key] for turn in sorted(first.keys() & second.keys())]

    asked, few = (max(values(job, "queries"), default=0) for job in ("routed 22", "routed 16"))
    probes = [ratios(job, job, "seconds", "pass") for job in ("probing", "mistral")]
    by_size = [ratios("routed 256", "routed 16", key) for key in ("seconds", "peak_mib")]
    shape = f"one layer of Mistral-7B's shape, {ADAPTERS} adapters of rank {RANK}"
    average = "one static average, merged into the weights"
    return [
        *line("probe, 22 adapters", "one pass of the base model over the same tokens", 1.15, probes[0]),
        *line(f"probe, {shape}", "the same", 1.15, probes[1]),
        *line(f"routed run, {asked} queries, 22 adapters", average, 1.25, ratios("routed 22", "static")),
        *line(f"routed run, {few} queries, {LARGEST} adapters", "16 adapters", 1.25, by_size[0]),
        *line(f"peak memory, {LARGEST} adapters", "16 adapters", 1.05, by_size[1]),
        *line("the demo, nothing cached", "from its start to its end", 60, values("demo"), " s"),
    ]


def by_stage(known: Known) -> list[str]:
    """What the last routed run took, stage by stage, and in memory."""
    if not (runs := known.get("routed 22")):
        return []
    run = runs[max(runs)]
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in run["stages"].items())
    return [
        "",
        f"Seconds of the routed run by stage: {stages}. It wrote {run['variants']} variants and took "
        f"{run['peak_mib']:,} MiB at its peak.",
    ]


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES, help="these measurements")
    args = parser.parse_args()
    cells = [((job, str(turn)), MEASURES[job]) for turn in range(args.repetitions) for job in args.only]
    failed = runner.fill("speed", cells)
    known: Known = {}
    for (job, turn), found in runner.kept("speed"):
        known.setdefault(job, {})[turn] = found
    names = ["measured", "against", "target", "median (range)", ""]
    table = [*header(names, texts=5), *lines(known), *by_stage(known)]
    print("\n".join(table))
    insert(PAGE, "speed", table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
