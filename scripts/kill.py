"""Kills the demo at random moments and compares what it leaves: `python -m scripts.kill --kills 20`.

First the demo runs uninterrupted. Then it is started again and again, in another folder, and gets a SIGKILL
at a moment that is drawn from the time that the first run took. Each start goes on where the last one was
killed, until one is done; then its files are compared with the first run's, byte for byte, and the next start
begins anew. The times in run.json are left out, and the report, which shows them. Flags are router.main's.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from router.journal import FOLDER
from router.record import RECORD, REPORT
from router.run import COMMIT, WORK

DEMO = [sys.executable, "-m", "router.main", "-m", "proto_route"]
TIMES = ("seconds", "peak_mib", "peak_gpu_mib")  # in run.json


def files(out: Path) -> dict[str, bytes]:
    """What a run left, by name, without what differs from run to run."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found.pop(REPORT, None)
    if RECORD in found:
        record = json.loads(found[RECORD])
        record["flags"].pop("output_folder")
        found[RECORD] = json.dumps({key: record[key] for key in record if key not in TIMES}).encode()
    return found


def hidden(out: Path) -> dict[str, int]:
    """The names in a run's folder that begin with a dot, and the bytes of the answers in its journal."""
    answers = out / FOLDER / "answers.jsonl"
    names = {path.name: 0 for path in out.glob(".*")}
    return names | ({FOLDER: answers.stat().st_size} if answers.exists() else {})


def stage(out: Path, before: dict[str, int], told: str) -> str:
    """What a run was doing when it was killed.

    Args:
        before: what was hidden in its folder when it started.
        told: on standard error.
    """
    now = hidden(out)
    new = [name for name in now if name not in before]
    if (out / RECORD).exists():
        return "report"
    if COMMIT in new:
        return "results"
    if any(name.startswith(WORK) for name in new):
        return "answers" if now.get(FOLDER, 0) > before.get(FOLDER, 0) else "variants"
    return "routing" if "load: " in told else "loading"


def start(command: Sequence[str], out: Path, log: Path, limit: float | None = None) -> bool:
    """Runs a command for at most so many seconds; returns whether it ended by itself.

    Raises:
        RuntimeError: it failed.
    """
    with log.open("w") as told:
        process = subprocess.Popen(
            [*command, "--output_folder", str(out)], stdout=subprocess.DEVNULL, stderr=told
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return False
        finally:
            process.kill()
            process.wait()
    if code:
        raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{log.read_text('utf-8')[-2000:]}")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if a run that was killed left other files."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=20, help="default: 20")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args, flags = p.parse_known_args(argv)
    rng, command, kills, different = random.Random(args.seed), [*DEMO, *flags], 0, set[str]()
    with tempfile.TemporaryDirectory() as work:
        whole, out, log = (Path(work) / name for name in ("whole", "killed", "log"))
        began = time.monotonic()
        start(command, whole, log)
        took = time.monotonic() - began
        print(f"uninterrupted: {took:.0f} s\nkill  after s  in", flush=True)
        expected = files(whole)
        while True:
            before = hidden(out)
            limit = rng.uniform(0, took) if kills < args.kills else None
            if not start(command, out, log, limit):
                kills += 1
                print(f"{kills:4}  {limit:7.1f}  {stage(out, before, log.read_text('utf-8'))}", flush=True)
                continue
            found = files(out)
            other = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
            print(
                f"done: {len(found)} files, other than uninterrupted: {sorted(other) or 'none'}", flush=True
            )
            different |= other
            if kills == args.kills:
                return 1 if different else 0
            shutil.rmtree(out)


if __name__ == "__main__":
    sys.exit(main())
