"""The notebook runs from top to bottom on any run, its tables are right, and the committed outputs are clean.

`PROTO_ROUTE_RUN=output python tests/test_notebook.py` makes the committed outputs anew.
"""

import json
import os
import re
import shutil

import numpy as np
import pytest

from helpers import NAMES, ROOT, ROWS, write_tiny_adapter
from router.constants import LIBRARY
from router.runs import tables

NOTEBOOK = ROOT / "notebooks" / "clusters.ipynb"


def execute(folder):
    """The notebook, executed from a folder, without what differs from run to run."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    metadata = {**notebook.metadata}
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=120, record_timing=False, resources=where).execute()
    notebook.metadata = metadata
    return notebook


def shown(notebook):
    """All text of the outputs, and the number of figures; nothing may have gone to stderr."""
    text, figures = [], 0
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output["text"]
            data = output.get("data", {})
            text += [output.get("text", ""), data.get("text/html", ""), data.get("text/plain", "")]
            figures += "image/png" in data
    return "\n".join("".join(part) for part in text), figures


@pytest.fixture()
def extra():
    for name in ("ipykernel", "matplotlib", "nbclient", "nbformat"):
        pytest.importorskip(name, reason="needs the extra `notebook`")


@pytest.fixture()
def finished(command, tiny_library):
    """Makes a run over the tiny library and a duplicate of one of its adapters; returns its folder."""
    write_tiny_adapter(tiny_library / "double", 2, 2, alpha=4)
    return lambda method, *flags, **how: command(method, "--max_gen_len", 2, *flags, **how)[1]


def test_the_notebook_shows_any_run(extra, finished, monkeypatch):
    monkeypatch.setenv("PROTO_ROUTE_RUN", str(finished("proto_route")))
    monkeypatch.setenv("PROTO_ROUTE_RUN_B", str(finished("average", out="other")))
    text, figures = shown(execute(NOTEBOOK.parent))
    assert figures >= 7
    for part in (*NAMES, "double", "queries:m1", ROWS[0][1], "low margin", "worst loss", "mean loss"):
        assert part in text
    assert "largest difference of a weight: 0.00000" in text
    assert "of 6 queries have the same top candidate" in text


def test_a_replay_with_other_settings_is_the_run_with_them(finished):
    run = tables.open_run(finished("proto_route"))
    for flag, value in (("--temperature", 2.0), ("--top_k", 1), ("--n_variants", 2)):
        other = tables.open_run(finished("proto_route", flag, value, out=flag))
        replayed = tables.replay(run, **tables.settings_of(other))
        np.testing.assert_allclose(replayed.weights, other.weights, atol=1e-5)
        np.testing.assert_array_equal(replayed.clusters.labels, other.labels)
        assert tables.settings_of(run) != tables.settings_of(other)


def test_a_run_is_found_from_a_folder_below(finished, monkeypatch, tmp_path):
    finished("base")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    run = tables.open_run("out", evidence=False)
    assert run.line(0, 70) == ROWS[0][1] and run.keys[0] == "queries:g1" and not run.notes
    with pytest.raises(tables.NotShown, match="nowhere"):
        tables.open_run("nowhere")
    with pytest.raises(tables.NotShown, match="method base"):
        tables.open_run("out")
    shutil.move(tmp_path / "queries.csv", tmp_path / "gone.csv")
    run = tables.open_run("out", evidence=False)
    assert run.line(0, 70) == "g1" and "not at hand" in run.notes[0]


def test_the_committed_outputs_are_of_the_library():
    raw = NOTEBOOK.read_text("utf-8")
    notebook = json.loads(raw)
    text, figures = shown(notebook)
    names = {path.parent.name for path in LIBRARY.resolve().glob("*/adapter_config.json")}
    assert {name for name in names if name not in text} == set() and figures >= 7
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert len(raw) < 1_000_000
    plain = json.dumps([cell | {"outputs": []} for cell in notebook["cells"]]) + text
    queries = (ROOT / "data" / "test.csv").read_text("utf-8")  # some ask about paths
    paths = re.findall(r"(?<![\w.<])/[\w.-]+/[\w./-]*|\b[A-Z]:\\\\\w+", plain)
    assert [path for path in paths if path not in queries] == []


if __name__ == "__main__":
    import nbformat

    os.environ.pop("PROTO_ROUTE_RUN_B", None)
    nbformat.write(execute(NOTEBOOK.parent), NOTEBOOK)
