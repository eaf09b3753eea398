"""The console command: every subcommand reaches its own parser, and `--help` loads nothing heavy."""

import json
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

import router
from helpers import METHODS, ROOT, write_run
from router.cli import COMMANDS, main


@pytest.fixture()
def run_folder(tmp_path):
    return write_run(tmp_path / "run", [[0.7, 0.29, 0, 0.01]], {})


def test_run_answers_queries(capsys):
    assert main(["run", "--list_methods"]) == 0
    assert set(METHODS) <= set(capsys.readouterr().out.split())


def test_explain_tells_of_a_query(capsys, run_folder):
    assert main(["explain", str(run_folder), "q0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "answer q0"
    assert main(["explain", str(run_folder), "nobody"]) == 2  # its exit code is passed on
    assert capsys.readouterr().err.startswith("error: ")


def test_compare_compares_runs(capsys, run_folder):
    assert main(["compare", str(run_folder), str(run_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["moved"] == 0


def test_library_checks_adapters(capsys, tiny_library):
    assert main(["library", "check", str(tiny_library), "--json"]) == 0
    names = [facts["name"] for facts in json.loads(capsys.readouterr().out)["adapters"]]
    assert names == ["attention", "everything", "mlp"]


def test_report_makes_the_page_again(capsys, run_folder):
    assert main(["report", str(run_folder)]) == 0
    assert capsys.readouterr().out.strip() == str(run_folder / "report.html")
    assert (run_folder / "report.html").is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_has_its_own_help(capsys, name):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    told = capsys.readouterr().out
    assert caught.value.code == 0 and told.startswith(f"usage: proto-route {name} ")


def test_the_module_names_itself_in_its_help():
    command = [sys.executable, "-m", "router.main", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.startswith("usage: python -m router.main ")


@pytest.mark.parametrize("words", [[], ["answer"], ["--list_methods"], ["-m", "proto_route"]])
def test_what_is_no_command_is_refused(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, error = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and "proto-route: error: " in error
    assert all(name in error for name in COMMANDS) or "-" in words[0]


def test_the_version_is_that_of_the_installed_package(capsys, monkeypatch):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"proto-route {version('proto-route')}\n"
    assert re.search(
        rf'version="{re.escape(version("proto-route"))}"', (ROOT / "setup.py").read_text("utf-8")
    )
    monkeypatch.setattr("importlib.metadata.distribution", missing)
    assert router.__version__ == "unknown"


def missing(name):
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_the_module_is_the_same_command_and_loads_nothing_to_help():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "router", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("usage: proto-route ")
    for name, (_, what) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(what)}$", done.stdout, re.M)
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.M))
    assert "router.cli" in imported and not imported & {"torch", "numpy", "rich", "router.main"}
    asked = [sys.executable, "-m", "router", "answer"]
    assert subprocess.run(asked, cwd=ROOT, capture_output=True, check=False).returncode == 2
