"""Gives damaged files to all that reads a stranger's: `python -m scripts.fuzz --cases 10000`.

A case damages one file of a sound set and opens it at a door (scripts/fuzz_doors.py). It may succeed or end
in the project's error for people. Any other exception, more than 10 s or 2 GiB, and anything half-written is
a failure. A case depends on its door, the seed and its number alone. The files of one that failed stay in
`output/fuzz/DOOR-SEED-NUMBER`; `--replay` opens them again, with the traceback.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from unittest.mock import patch

import hypothesis
from hypothesis import strategies as st

from router.errors import InputError
from scripts.fuzz_doors import DOORS, Door

OUT = Path("output/fuzz")
SECONDS, BYTES = 10, 2 << 30  # of processor time, and of memory beyond what the process has, of one case


class TooLong(BaseException):
    """A case took more than SECONDS."""


# Damage: bytes in, bytes out. `values` are what stands where another value is expected.

Damage = Callable[[random.Random, bytes, Sequence[bytes]], bytes]
DEEP = 100_000
NASTY = [
    b"", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b'"', b"\\ud800", b"\xed\xa0\x80", b"<script>",
    b"\x1b[2J", b"-1", b"1e999", b"NaN", b"9" * 30, b"1" * 5000, b"../..", b"x" * 70_000, b"(a+)+$",
    b"[" * DEEP, b"(" * DEEP, b"-" * 300, b'{"a":' * DEEP, b"[" * 300 + b"]" * 300, "\u202e".encode(),
]  # fmt: skip


@cache
def drawn(seed: int) -> list[bytes]:
    """JSON values of every kind, drawn by hypothesis, with as many of NASTY."""
    text = st.text(st.characters(), max_size=8)
    plain = st.none() | st.booleans() | st.integers() | st.floats() | text
    found: list[bytes] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=400, database=None, deadline=None, phases=[hypothesis.Phase.generate])
    @hypothesis.given(st.recursive(plain, lambda of: st.lists(of) | st.dictionaries(text, of), max_leaves=5))
    def draw(value: object) -> None:
        found.append(json.dumps(value).encode())

    draw()
    return [*found, *NASTY * (len(found) // len(NASTY))]


def _part(rng: random.Random, data: bytes) -> slice:
    start = rng.randrange(len(data) + 1)
    return slice(start, min(len(data), start + int(rng.expovariate(1 / 12))))


def flip(rng: random.Random, data: bytes, values: Sequence[bytes]) -> bytes:
    """A few bytes get other values."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4) if out else 0):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """The end is missing."""
    return data[: rng.randrange(len(data) + 1)]


def splice(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """One part takes the place of another; an empty one removes or inserts."""
    into = _part(rng, data)
    return data[: into.start] + data[_part(rng, data)] + data[into.stop :]


def duplicate(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """A part stands there again and again."""
    part = _part(rng, data)
    return data[: part.stop] + data[part] * rng.choice((1, 2, 1000)) + data[part.stop :]


def insert(rng: random.Random, data: bytes, values: Sequence[bytes]) -> bytes:
    """A value stands anywhere."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(values) + data[at:]


def replace(rng: random.Random, data: bytes, values: Sequence[bytes]) -> bytes:
    """A value, a list, an object or a cell becomes something else, such as a value of another type."""
    tokens = rb'"(?:[^"\\]|\\.)*"|[\w.+-]+', rb"\[[^\[\]]*\]", rb"\{[^{}]*\}", rb"(?<=,)[^,\n]*(?=[,\n])"
    places = list(re.finditer(rng.choice(tokens), data))
    if not places:
        return rng.choice(values)
    place = rng.choice(places)
    return data[: place.start()] + rng.choice(values) + data[place.end() :]


DAMAGES: list[Damage] = [flip, truncate, splice, duplicate, insert, replace, replace, replace]


def damaged(rng: random.Random, data: bytes, values: Sequence[bytes], part: str) -> bytes:
    """The bytes after one to three damages, of a part of a safetensors file alone if it is named."""
    size = 8 + int.from_bytes(data[:8], "little") if part else 0
    head, body = data[8:size], data[size:]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if part == "header":  # its length stays true
            head = rng.choice(DAMAGES)(rng, head, values)
        else:
            body = rng.choice(DAMAGES[:4] if part else DAMAGES)(rng, body, values)
    return len(head).to_bytes(8, "little") + head + body if part else body


# Cases


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder, by their names in it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@contextmanager
def limited() -> Iterator[None]:
    """Ends a block by TooLong after SECONDS, and by MemoryError beyond BYTES."""

    def stop(*_: object) -> None:
        raise TooLong

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, SECONDS),
        signal.ITIMER_REAL: (signal.SIGALRM, 6 * SECONDS),
    }
    for timer, (number, seconds) in timers.items():  # the second is for what waits, on a busy machine too
        signal.signal(number, stop)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, (number, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(door: Door, folder: Path, case: Mapping[str, bytes], name: str) -> None:
    """Opens a case, whose damaged file has that name, in a folder that may hold another.

    Raises:
        AssertionError: something was half-written.
        BaseException: what a door let through.
    """
    write(folder, case)
    quiet = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
    with chdir(folder), quiet[0], quiet[1], warnings.catch_warnings(), limited():
        warnings.simplefilter("ignore")
        try:
            door.open(Path(name))
        except InputError:
            assert contents(Path()) == case, "the door refused the file, and yet changed something"
    parts = [
        path for path in contents(folder).keys() - case.keys() if re.search(r"(^|/)\.[^/]*$|\.part$", path)
    ]
    assert not parts, f"half-written: {parts}"


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Fills a folder with these files alone."""
    there = contents(folder)
    for name in there.keys() - files.keys():
        (folder / name).unlink()
    for name, data in files.items():
        if there.get(name) != data:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def fuzz(name: str, cases: int, seed: int = 0, out: Path = OUT) -> Iterator[tuple[Path, str]]:
    """Tries a door; yields the folder of each failure, and what came through."""
    door, values = DOORS[name], drawn(seed)
    with (
        tempfile.TemporaryDirectory() as work,
        patch.dict(os.environ, {"PROTO_ROUTE_CACHE": f"{work}/cache"}),
    ):
        with chdir(work):
            door.make()
            targets = sorted(str(path) for path in Path().glob(door.damaged))
        files = contents(Path(work))
        place = out.absolute() / f"{name}-now"  # stays if a case ends this process
        for target in targets:
            attempt(door, place, files, target)  # it is sound
        for number in range(cases):
            rng = random.Random(f"{name} {seed} {number}")
            target = rng.choice(targets)
            parts = ("header", "body", "") if target.endswith(".safetensors") else ("",)
            case = files | {target: damaged(rng, files[target], values, door.part or rng.choice(parts))}
            try:
                attempt(door, place, case, target)
            except (Exception, TooLong) as error:
                write(folder := out.absolute() / f"{name}-{seed}-{number}", case)
                last = traceback.extract_tb(error.__traceback__)[-1]
                yield folder, f"{target}: {type(error).__name__} in {last.name}: {str(error)[:120]!r}"
        shutil.rmtree(place)


def replay(folder: Path) -> None:
    """Opens the files of a case again; what comes through is raised."""
    door = DOORS[folder.name.partition("-")[0]]
    with tempfile.TemporaryDirectory() as work:
        for path in sorted(folder.glob(door.damaged)):
            attempt(door, Path(work), contents(folder), str(path.relative_to(folder)))


def main(argv: Sequence[str] | None = None) -> int:
    """Tries one door or all; returns 1 if anything came through."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=200, help="for each door (default: 200)")
    p.add_argument("--door", choices=DOORS, help="this one alone")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--replay", type=Path, metavar="FOLDER", help="open the files of a failed case again")
    args = p.parse_args(argv)
    if args.replay:
        replay(args.replay)
        return 0
    failed = 0
    for name in [args.door] if args.door else DOORS:
        start, n = time.monotonic(), 0
        for folder, what in fuzz(name, args.cases, args.seed):
            n += 1
            print(f"{folder}: {what}", flush=True)
        print(f"{name}: {args.cases} cases, {n} failures, {time.monotonic() - start:.0f} s", flush=True)
        failed += n
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
