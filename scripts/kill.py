"""Kills the demo at random moments and compares what it leaves: `python -m scripts.kill --kills 20`.

First the demo runs uninterrupted. Then it is started again and again, in another folder, and gets a SIGKILL
at a moment that is drawn from the time that the first run took. Each start goes on where the last one was
killed, until one is done; then its files are compared with the first run's, byte for byte, and the next start
begins anew. The times in run.json are left out, and the report, which shows them. Flags are router.main's.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEMO = [sys.executable, "-m", "router.main", "-m", "proto_route", "--quiet"]
TIMES = ("seconds", "peak_mib", "peak_gpu_mib", "resumed")  # in run.json


def files(out: Path) -> dict[str, bytes]:
    """What a run left, by name, without what differs from run to run."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found.pop("report.html", None)
    record = json.loads(found["run.json"])
    record["flags"].pop("output_folder")
    kept = {key: value for key, value in record.items() if key not in TIMES}
    return found | {"run.json": json.dumps(kept).encode()}


def main() -> int:
    """Command line; returns 1 if a run that was killed left other files."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=20, help="default: 20")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args, flags = p.parse_known_args()
    rng, command, kills, different = random.Random(args.seed), [*DEMO, *flags], 0, set[str]()
    with tempfile.TemporaryDirectory() as work:
        whole, out = Path(work) / "whole", Path(work) / "killed"
        began = time.monotonic()
        subprocess.run([*command, "--output_folder", str(whole)], check=True)
        took = time.monotonic() - began
        print(f"uninterrupted: {took:.0f} s", flush=True)
        expected = files(whole)
        while True:
            limit = rng.uniform(0, took) if kills < args.kills else None
            try:
                subprocess.run([*command, "--output_folder", str(out)], check=True, timeout=limit)
            except subprocess.TimeoutExpired:  # by now it is killed
                kills += 1
                print(f"kill {kills} after {limit:.1f} s", flush=True)
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
