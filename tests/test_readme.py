"""The README's blocks, run one after the other in a folder that has what they speak of, on the tiny model.

Left out are the scripts that make environments: CI runs scripts/test.sh itself, of which demo.sh is
the first half.
"""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
STAND_INS = {
    'load_base("embedded")': 'load_base("some/base")',
    'Router.from_library("data/library")': 'Router.from_library("adapters", base_model="some/base")',
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base):
    """A folder with queries.csv, adapters/ and some/base, as a user of the README has them."""
    from conftest import write_tiny_adapter

    folder = tmp_path_factory.mktemp("readme")
    for seed in range(3):
        write_tiny_adapter(folder / "adapters" / f"adapter{seed}", seed)
    shutil.copytree(tiny_base, folder / "some" / "base")
    with (folder / "queries.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "input", "eval_type", "answer_choices"])
        rows.writerows([n, f"What is {n} and {n}?", "generation", ""] for n in range(20))
    return folder


def run(command, place):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PROTO_ROUTE_CACHE": str(place / "cache")}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return done.stdout


def test_every_block_runs(place):
    ran = 0
    for language, text in BLOCKS:
        if language == "python":
            for name, other in STAND_INS.items():
                text = text.replace(name, other)
            run([sys.executable, "-c", text], place)
            ran += 1
            continue
        for line in text.splitlines():
            if line.startswith("python -m router."):
                run([sys.executable, *shlex.split(line)[1:]], place)
                ran += 1
                if not (place / "other_output").exists() and (place / "output" / "run.json").exists():
                    shutil.copytree(place / "output", place / "other_output")
    assert ran >= 5


def test_no_other_commands_stand_in_the_blocks():
    lines = [line for language, text in BLOCKS if not language for line in text.splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"(python|pip|bash) ", line)]
    assert all(line.startswith(("python -m router.", "bash scripts/")) for line in told)


def test_every_file_it_names_is_there():
    text = (ROOT / "README.md").read_text("utf-8")
    named = set(re.findall(r"\b(?:router|merge|scripts|docs|data|notebooks)/[\w/.-]*\w\b", text))
    assert named and not [name for name in sorted(named) if not (ROOT / name).exists()]
