"""Runs on the tiny model, finished once for all tests of a session."""

from contextlib import redirect_stdout
from io import StringIO

import pytest

from helpers import QUERIES, arguments, write_queries, write_tiny_library


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny_base):
    """Output folders of finished runs on two query files, by method; made when first asked for."""
    from router.main import main

    folder = tmp_path_factory.mktemp("runs")
    library = write_tiny_library(folder / "library")
    queries = [
        write_queries(folder / "queries.csv", QUERIES),
        write_queries(folder / "more.csv", [("g1", "1 + 1 =", "generation", "", "base")]),
    ]

    def run(method):
        out = folder / method
        if not out.exists():
            with redirect_stdout(StringIO()):
                assert main(arguments(method, queries, library, tiny_base, out)) == 0
        return out

    return run
