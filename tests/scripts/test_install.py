"""The scripts that set up and run, with stand-ins for Python, pip and uv that log what they are asked."""

import os
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT

# A .venv/bin/python that has torch.
PYTHON = """#!/bin/bash
echo "python $*" >> log
"""


@pytest.fixture()
def place(tmp_path):
    """A clone with nothing but the scripts and a .venv of stand-ins."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("*.py", "*.pyc"))
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "uv"):
        (programs / name).write_text(PYTHON)
        (programs / name).chmod(0o755)
    return tmp_path


def run(place, *command, python=sys.executable):
    return subprocess.run(
        ["bash", *command], cwd=place, env=os.environ | {"PYTHON": str(python)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_the_demo_hands_its_words_to_the_run_alone(place):
    done = run(place, "scripts/demo.sh", "--n_variants", "3")
    assert done.returncode == 0, done.stderr
    log = (place / "log").read_text().splitlines()
    assert log[-1] == "python -m router.main -m proto_route --n_variants 3"
    assert any(line.endswith("--editable .") for line in log)


def test_an_old_python_is_refused_before_anything_is_made(place):
    shutil.rmtree(place / ".venv")
    old = place / "old"
    old.write_text('#!/bin/bash\n[ "$1" = --version ] && echo "Python 3.10.1" || exit 1\n')
    old.chmod(0o755)
    done = run(place, "scripts/demo.sh", python=old)
    assert done.returncode == 2 and "Python 3.10.1" in done.stderr
    assert not (place / ".venv").exists()
