"""Imports go one way: no module and no room depends on itself, and the algebra knows nothing of routing."""

import ast
from graphlib import TopologicalSorter

from helpers import ROOT

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("router", "merge")
    for path in (ROOT / package).rglob("*.py")
}


def imported(path):
    """The modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in FILES else node.module


ARROWS = {name: set(imported(path)) for name, path in FILES.items()}


def room(name):
    """`router.model` of `router.model.base`; a module at the top is a room of its own."""
    return ".".join(name.split(".")[:2])


def test_no_module_and_no_room_depends_on_itself():
    list(TopologicalSorter(ARROWS).static_order())  # a circle is an error that names it
    rooms = {}
    for name, targets in ARROWS.items():
        rooms.setdefault(room(name), set()).update({room(target) for target in targets} - {room(name)})
    order = list(TopologicalSorter(rooms).static_order())
    assert order.index("router.model") < order.index("router.routing") < order.index("router.runs")
    algebra = [targets for name, targets in ARROWS.items() if name.startswith("merge")]
    assert {target.split(".")[0] for targets in algebra for target in targets} == {"merge"}
