"""Damaged files and command lines are read or refused in a sentence, soon, and leave nothing half-written.

Each case damages one file of a sound set. `--cases 10000` draws so many new ones of each kind.
"""

import json
import re
import shutil
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from helpers import ROOT, WIDTHS, arguments, write_queries, write_tiny_adapter
from merge.folders import CONFIG_FILE, WEIGHTS_FILE
from router.api import Router
from router.cli import main as command
from router.library.adapters import load_library
from router.library.command import check
from router.main import main as run
from router.methods.cards import card_of
from router.model.answer import Answer
from router.model.base import load_base
from router.pipeline.journal import FOLDER as JOURNAL
from router.pipeline.journal import Journal
from router.pipeline.result import Routing
from router.queries.submission import Query, read_queries
from router.routing.prototypes import prototypes
from router.serving.names import read_served
from router.system.errors import InputError
from router.system.hub import HubError

CARD = "README.md"
QUERIES = [Query("1", "Two and two?", "generation"), Query("2", "a\nb", "multiple_choice", ("x", "y"))]
SECONDS, BYTES = 10, 2 << 30  # of a case, and of memory beyond what the process has
COMMANDS = [
    "run -m proto_route --dataset_filepaths queries.csv --output_folder out --top_k 2 --dtype float32",
    "run -m base --temperature 0.5 --n_variants auto --time_limit 5 --base_model tiny@1",
    "explain out 7 --json", "compare out other --labels labels --show 3", "report out",
    "library check library --json", "export out --engine vllm --max_rank 8", "--version",
]  # fmt: skip

# Damage: a span of a file becomes something else. What is drawn are small numbers; files are made of them.

DEEP = 100_000
NEW = [
    b"", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b'"', b"\\ud800", b"\xed\xa0\x80", b"<script>",
    b"\x1b[2J", b"null", b"true", b"-1", b"0", b"0.5", b"1e999", b"NaN", b"9" * 30, b"1" * 5000,
    b'""', b'"x"', b"../..", b"x" * 70_000, b"(a+)+$", b"[]", b"[1]", b'["x"]', b"[[]]", b"{}", b'{"x": 1}',
    b"[" * DEEP, b"(" * DEEP, b'{"a":' * DEEP, b"[" * 300 + b"]" * 300, "\u202e".encode(),
]  # fmt: skip
# Strings, numbers and words; flat lists; flat objects; cells; any bytes.
TOKENS = rb'"(?:[^"\\]|\\.)*"|[\w.+-]+', rb"\[[^\[\]]*\]", rb"\{[^{}]*\}", rb"(?<=,)[^,\n]*(?=[,\n])", rb""
PLACE = st.integers(0, 999)  # thousandths of the way
DAMAGES = st.lists(
    st.tuples(
        st.sampled_from(range(len(TOKENS))),
        PLACE,
        st.sampled_from([0, 1, 12, 1 << 30]),  # bytes that go, where they are no token
        st.integers(0, len(NEW) - 1) | st.binary(min_size=1, max_size=4) | st.tuples(PLACE, st.just(100)),
    ),
    min_size=1,
    max_size=3,
)
PARTS = st.sampled_from(["all", "header", "body"])  # of a safetensors file


def damaged(data, damages):
    """The bytes after all damages."""
    for kind, place, length, new in damages:
        tokens = list(re.finditer(TOKENS[kind], data[:20_000])) if TOKENS[kind] else []
        start = len(data) * place // 999
        start, end = tokens[len(tokens) * place // 1000].span() if tokens else (start, start + length)
        if isinstance(new, int):
            new = NEW[new]
        elif isinstance(new, tuple):  # another part, or itself, again and again
            other, times = new
            new = data[start:end][:1000] * times if other % 2 else data[len(data) * other // 999 :][:12]
        data = data[:start] + new + data[end:]
    return data


def damaged_weights(data, damages, part):
    """A safetensors file damaged anywhere, in its header, whose length stays true, or behind it."""
    end = 8 + int.from_bytes(data[:8], "little")
    if part == "header":
        head = damaged(data[8:end], damages)
        return len(head).to_bytes(8, "little") + head + data[end:]
    return data[:end] + damaged(data[end:], damages) if part == "body" else damaged(data, damages)


# Doors: what a stranger's file comes in by. Each takes the folder that it stands in.


def open_library(folder):
    """Reads every value and card, and computes what routing and `library check` do."""
    try:
        adapters = load_library([str(folder)])
        prototypes(adapters)
        list(map(card_of, adapters))
    finally:
        json.dumps(check([str(folder)]))


def open_run(folder):
    """Reads a finished run in every way that needs no model."""
    read_served(folder)
    for words in ("explain", "out", "g1", "--json"), ("compare", "out", "out"), ("report", "out"):
        assert command([str(folder) if word == "out" else word for word in words]) in (0, 2), words


def open_journal(folder):
    """Goes on with a run that was killed."""
    journal = Journal(folder, {"method": "base"})
    try:
        assert all(isinstance(journal[query].text, str) for query in QUERIES if query in journal)
        journal.kept("routing", 2)
    finally:
        journal.close()


def open_router(folder):
    """Loads a saved router and decides two prompts with it."""
    router = Router.load(folder, device="cpu")
    for choice in router.choose(["a", "b"]):
        assert choice.variant in range(len(router.variants)) and set(choice.weights) <= set(router.candidates)
    read_served(folder)


DOORS = {
    "queries": (lambda folder: read_queries(folder / "queries.csv"), "queries.csv"),
    "config": (open_library, f"one/{CONFIG_FILE}"),
    "weights": (open_library, f"one/{WEIGHTS_FILE}"),
    "card": (open_library, f"one/{CARD}"),
    "run": (open_run, "*.*"),
    "journal": (open_journal, f"{JOURNAL}/[!.]*"),
    "router": (open_router, "router.*"),
}


@pytest.fixture(scope="module")
def sound(tiny_base, tmp_path_factory):
    """Folders of sound files, by door."""
    folder = tmp_path_factory.mktemp("sound")
    library = folder / "library"
    write_tiny_adapter(library / "one", 1, kinds=tuple(WIDTHS)[:2], layers=(0,))
    write_tiny_adapter(library / "two", 2, rank=2, layers=(0,))
    shutil.copy(ROOT / "data" / "library" / "chain_sum" / CARD, library / "one")
    (folder / "queries").mkdir()
    queries = write_queries(folder / "queries" / "queries.csv")
    assert run(arguments("proto_route", [queries], library, tiny_base, folder / "run", "--quiet")) == 0
    Router.from_library(library, base_model=str(tiny_base)).fit(["a", "b"]).save(folder / "router")
    (folder / "journal").mkdir()
    journal = Journal(folder / "journal", {"method": "base"})
    journal[QUERIES[0]], journal[QUERIES[1]] = Answer("four", (3, 1)), Answer("1", scores=(-0.5, -0.25))
    journal.keep("routing", Routing(np.full((2, 3), 1 / 3)))
    journal.close()
    return {
        name: folder / ("library" if opened is open_library else name) for name, (opened, _) in DOORS.items()
    }


@pytest.fixture(scope="module")
def limited(sound, tiny_base):
    """The tiny model is loaded once, and no case takes more than BYTES, where the system can say so."""
    base = load_base(str(tiny_base), "cpu", "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.api.load_base", lambda *_, **__: base)
        if sys.platform != "linux":
            yield
            return
        import resource

        used = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_AS, before)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def cases(pytestconfig):
    """So many cases of a test: the same ones each time, or new ones."""
    new = pytestconfig.getoption("--cases")
    return settings(
        max_examples=new or 100, derandomize=not new, deadline=timedelta(seconds=SECONDS),
        phases=[Phase.reuse, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DOORS)
def test_damaged_files_are_read_or_refused(name, sound, limited, cases):
    opened, pattern = DOORS[name]
    opened(sound[name])
    before = contents(sound[name])
    targets = [path for path in before if path.match(pattern) and path.name != "report.html"]

    @cases
    @given(st.sampled_from(targets), DAMAGES, PARTS)
    def case(target, damages, part):
        weights = target.suffix == ".safetensors"
        bad = damaged_weights(before[target], damages, part) if weights else damaged(before[target], damages)
        with tempfile.TemporaryDirectory() as work:
            folder = shutil.copytree(sound[name], Path(work) / "set")
            (folder / target).write_bytes(bad)
            try:
                opened(folder)
            except InputError:
                assert contents(folder) == before | {target: bad}, "refused, and yet changed"
            new = [str(path) for path in contents(folder).keys() - before.keys()]
            assert not [path for path in new if re.search(r"(^|/)\.[^/]*$|\.part$", path)], "half-written"

    case()


def test_damaged_commands_run_or_are_refused(tmp_path, monkeypatch, cases):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("router.run.run", Mock(side_effect=InputError("loaded")))
    monkeypatch.setattr("router.library.sources.fetch", Mock(side_effect=HubError("offline")))

    @cases
    @given(st.sampled_from(COMMANDS), DAMAGES)
    def case(line, damages):
        words = damaged(line.replace(" ", "\n").encode(), damages).replace(b"\0", b"")
        try:
            code = command(
                [word.lstrip("/") for word in words.decode("utf-8", "surrogateescape").split("\n")[:100]]
            )
        except SystemExit as end:  # argparse's
            code = end.code
        assert code in (0, 2)

    case()
