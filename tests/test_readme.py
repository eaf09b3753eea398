"""What README.md, CONTRIBUTING.md and docs/ say is so: blocks run, and files, modules and headings are there.

The blocks of the README and of docs/quickstart.md run one after the other in a folder that has what they
speak of, on the tiny model. Only the scripts that make environments are left out: CI runs them itself.
"""

import os
import re
import shlex
import shutil
import subprocess
from importlib import import_module

import pytest

from helpers import PLAIN, ROOT, read_table, write_queries, write_tiny_adapter
from router import cli

README, CONTRIBUTING, QUICKSTART = (
    (ROOT / name).read_text("utf-8") for name in ("README.md", "CONTRIBUTING.md", "docs/quickstart.md")
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README + QUICKSTART, re.M | re.S)
COMMAND, MODULE = "proto-route ", "python -m router."
STAND_INS = {
    'load_base("embedded")': 'load_base("some/base")',
    'Router.from_library("data/library_chat")': 'Router.from_library("adapters", base_model="some/base")',
    'Router.from_library("data/library")': 'Router.from_library("adapters", base_model="some/base")',
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base):
    """A folder with queries.csv, adapters/ and some/base, as a user of the README has them."""
    folder = tmp_path_factory.mktemp("readme")
    for seed in range(3):
        write_tiny_adapter(folder / "adapters" / f"adapter{seed}", seed)
    shutil.copytree(tiny_base, folder / "some" / "base")
    (folder / "some" / "base" / "chat_template.jinja").write_text(PLAIN)
    rows = [(n, f"What is {n} and {n}?", "generation", "") for n in range(20)]
    write_queries(folder / "queries.csv", rows)
    return folder


def test_every_block_runs(place, monkeypatch):
    """In this process, since importing the model libraries takes longer than all commands."""
    monkeypatch.chdir(place)
    ran = []
    for language, text in BLOCKS:
        if language == "python":
            for name, other in STAND_INS.items():
                text = text.replace(name, other)
            exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
            ran.append(language)
            continue
        for line in text.splitlines():
            if line.startswith((COMMAND, MODULE)):
                words = shlex.split(line)
                _, *rest = words if line.startswith(COMMAND) else words[2:]
                main = cli.main if line.startswith(COMMAND) else import_module(words[2]).main
                assert main(rest) == 0, line
                ran.append(words[1])
                if not (place / "other_output").exists() and (place / "output" / "run.json").exists():
                    shutil.copytree(place / "output", place / "other_output")
    assert ran.count("python") == 4 and {"run", "explain", "compare", "library"} <= set(ran)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_heading_that_is_named_is_there(page):
    text = page.read_text("utf-8")
    files = re.findall(r"\b(?:router|merge|scripts|tests|docs|data|notebooks)/[\w/.-]*\w\b", text)
    files += [name.replace(".", "/") for name in re.findall(r"-m (scripts[\w.]*\w)", text)]
    assert [name for name in files if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()] == []
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = (page.parent / name) if name else page
        assert target.exists(), name
        titles = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.M) if anchor else []
        found = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in found


def test_the_tree_of_files_is_whole():
    tree = README.partition("## Files")[2]
    modules = [path for path in ROOT.glob("router/*.py") if not path.name.startswith("__")]
    rooms = {path.parent for where in ("router", "scripts") for path in ROOT.glob(f"{where}/*/*.py")}
    names = [path.relative_to(ROOT).as_posix() for path in [*modules, *sorted(rooms)]]
    assert len(names) > 20 and [name for name in names if name not in tree] == []


def test_the_readme_is_one_page():
    assert len(README.split()) <= 800


def test_the_example_of_a_method_runs(command, own_method):
    own_method("first_adapter", *re.findall(r"^```python\n(.*?)^```$", CONTRIBUTING, re.M | re.S))
    code, out = command("first_adapter")
    rows = read_table(out / "queries.routing.csv")
    assert code == 0 and rows
    for _, _, first, *others in map(dict.values, rows):  # id and variant, then the candidates
        assert float(first) == 1 and not any(map(float, others))


def test_the_tests_that_are_named_are_there():
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?: -k (?:\"([^\"]+)\"|(\w+)))?", text)
    assert len(named) > 40
    for name, several, one in named:
        lines = (ROOT / name).read_text("utf-8")
        assert [word for word in (several or one).split(" or ") if word not in lines] == [], name


def test_an_old_python_is_refused_before_anything_is_made(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("*.py", "*.pyc"))
    old = tmp_path / "old"
    old.write_text('#!/bin/bash\n[ "$1" = --version ] && echo "Python 3.10.1" || exit 1\n')
    old.chmod(0o755)
    words, env = ["bash", "scripts/demo.sh"], os.environ | {"PYTHON": str(old)}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Python 3.10.1" in done.stderr
    assert not (tmp_path / ".venv").exists()
