"""Progress bars show on a terminal, and nowhere else."""

import io

import pytest

from router.system.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("file", "variable", "shown"), [(Terminal, "", True), (Terminal, "1", False), (io.StringIO, "", False)]
)
def test_a_bar_shows_on_a_terminal_unless_it_is_to_be_quiet(monkeypatch, file, variable, shown):
    monkeypatch.setenv("TQDM_DISABLE", variable)
    out = file()
    assert list(progress(range(3), desc="probe", file=out)) == [0, 1, 2]
    assert ("probe: 100%" in out.getvalue()) == shown and bool(out.getvalue()) == shown
