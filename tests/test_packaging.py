"""What an installation needs and brings: requirements, package data, the console command."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from importlib.metadata import distribution, packages_distributions

import pytest

from helpers import ROOT

FILES = [*(ROOT / "router").rglob("*.py"), *(ROOT / "merge").rglob("*.py")]
# Which extra a module, or all of a folder, may need.
EXTRAS = {
    "serving": "serve", "tracing": "trace", "vllm": "vllm", "vllm_worker": "vllm", "integrations": "litellm",
    "ray": "ray",
}  # fmt: skip


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(tree):
    """The top-level names of all absolute imports, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@cache
def required(extra=None):
    """The names of setup.py's install_requires, or of one of its extras, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    listed = {word.arg: word.value for call in calls for word in call.keywords}
    texts = ast.literal_eval(listed["extras_require" if extra else "install_requires"])
    return {normal(re.match(r"[\w.-]+", text)[0]) for text in (texts[extra] if extra else texts)}


def test_all_that_is_imported_is_required():
    providers, unmet, found = packages_distributions(), {}, set()
    for file in FILES:
        extra = EXTRAS.get(file.stem) or EXTRAS.get(file.parent.name)
        allowed = required() | (required(extra) if extra else set())
        names = set(imported(ast.parse(file.read_text("utf-8"))))
        names -= set(sys.stdlib_module_names) | {"router", "merge"}
        found |= names
        # A package that is needed on another system alone may not be here.
        missing = {
            name for name in names if not {normal(one) for one in providers.get(name, [name])} & allowed
        }
        unmet |= {file.name: missing} if missing else {}
    assert {"torch", "numpy", "faiss", "starlette"} <= found  # the search above finds imports
    assert not unmet


@pytest.fixture(scope="module")
def wheel_and_sdist(tmp_path_factory):
    """Built from a copy of what is installed, with the setuptools that are here."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("router", "merge"):
        (source / name).symlink_to(ROOT / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for kind in ("wheel", "sdist"):
        code = f"from setuptools import build_meta as m; m.build_{kind}({str(out)!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_module_and_data_file(wheel_and_sdist):
    data = {
        "router/py.typed", "merge/py.typed", "router/routing/generic.json", "router/routing/talk.json",
        "router/runs/report/report.html.j2", "router/serving/page.html", "router/pipeline/card.md",
    }  # fmt: skip
    expected = {str(file.relative_to(ROOT)) for file in FILES} | data
    wheel, sdist = wheel_and_sdist
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
        assert packed == expected
    with tarfile.open(sdist) as file:
        assert expected <= {name.partition("/")[2] for name in file.getnames()}


def test_the_installed_package_has_the_console_command():
    points = {(entry.group, entry.name) for entry in distribution("proto-route").entry_points}
    plugins = {(f"vllm.{kind}_plugins", "proto_route") for kind in ("endpoint", "general")}
    assert points == {("console_scripts", "proto-route")} | plugins
    for entry in distribution("proto-route").entry_points:
        assert callable(entry.load())


def test_all_files_state_the_same_version_and_date():
    texts = {name: (ROOT / name).read_text("utf-8") for name in ("setup.py", "CITATION.cff", "CHANGELOG.md")}
    version = re.search(r'version="([\d.]+)"', texts["setup.py"])[1]
    newest = re.search(r"^## ([\d.]+), (\d{4}-\d\d-\d\d)$", texts["CHANGELOG.md"], re.M)
    assert newest[1] == version
    assert f"\nversion: {version}\ndate-released: {newest[2]}\n" in texts["CITATION.cff"]


# Modules that Python does not have on Windows, and names in others that it has not.
UNIX_ALONE = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog"}
UNIX_NAMES = {
    "fork", "getuid", "geteuid", "killpg", "setsid", "mkfifo", "chown", "sysconf", "uname", "nice", "statvfs",
    "getloadavg", "sched_getaffinity", "SIGKILL", "SIGALRM", "SIGQUIT", "setitimer",
}  # fmt: skip


def test_no_module_needs_what_windows_lacks():
    for file in FILES:
        tree = ast.parse(file.read_text("utf-8"))
        at_once = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not set(imported(ast.Module(at_once, []))) & UNIX_ALONE | used & UNIX_NAMES, file
