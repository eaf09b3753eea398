"""The console command: every subcommand reaches its own parser, and `--help` loads nothing heavy."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from unittest.mock import Mock

import pytest

import router
from helpers import METHODS, ROOT
from router.cli import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_has_its_own_help(capsys, name):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    told = capsys.readouterr().out
    assert caught.value.code == 0 and told.startswith(f"usage: proto-route {name} ")


@pytest.mark.parametrize("words", [[], ["answer"], ["--json"], ["-m", "proto_route"]])
def test_what_is_no_command_is_refused(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, error = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and "proto-route: error: " in error


def test_a_file_that_cannot_be_read_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("router.serving.names._made", Mock(side_effect=PermissionError(13, "no", "a/file")))
    assert main(["check", str(tmp_path)]) == 2 and "a/file" in capsys.readouterr().err


def test_a_reader_that_leaves_early_ends_the_command(tiny_library, monkeypatch):
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "w") as gone:
        monkeypatch.setattr("sys.stdout", gone)
        assert main(["library", "check", str(tiny_library)]) == 1


def test_the_version_is_that_of_the_installed_package(capsys, monkeypatch):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"proto-route {version('proto-route')}\n"
    monkeypatch.setattr("importlib.metadata.distribution", Mock(side_effect=PackageNotFoundError))
    assert router.__version__ == "unknown"


@pytest.mark.parametrize(
    ("words", "said"), [(["router", "--help"], COMMANDS), (["router.main", "--help"], METHODS)]
)
def test_the_module_is_the_command_and_loads_little_to_help(words, said):
    command = [sys.executable, "-X", "importtime", "-m", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in said)
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.M))
    assert "argparse" in imported and not imported & {"torch", "transformers", "peft", "numpy", "sklearn"}
