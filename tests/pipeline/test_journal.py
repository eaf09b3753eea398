"""A run that was killed goes on where it stood, and two do not write to one folder."""

import shutil
import time
from functools import partial
from multiprocessing import get_context
from unittest.mock import Mock, patch

import numpy as np
import pytest

from helpers import ROWS, Killed, arguments, edit_json, files_of, killed_after, write_queries
from router.constants import TEMPLATE
from router.main import main
from router.model.answer import Answer
from router.pipeline.fitted import Fitted
from router.pipeline.journal import Journal, alone_in
from router.pipeline.result import Routing
from router.pipeline.steps import evenly
from router.queries.submission import Query
from router.routing.variants import write_variant
from router.runs.load import load
from router.system.errors import InputError

ONE, TWO = Query("1", "a", "generation"), Query("2", "b\u2028\n", "multiple_choice", ("x", "y"))
FOUND = {ONE: Answer("text", (3, 1)), TWO: Answer("1", scores=(-0.1, -1 / 3))}


@pytest.fixture()
def opened(tmp_path):
    """Opens journals in one folder, as runs do one after the other; a killed run closes none."""
    found = []

    def journal(fresh=False, **identity):
        found.append(Journal(tmp_path, identity or {"method": "a", "seed": 0}, fresh))
        return found[-1]

    yield journal
    for one in found:
        one._file.close()


@pytest.fixture()
def journal(opened):
    return opened()


def test_what_was_added_is_there_again(journal, opened, tmp_path):
    journal.update(FOUND)
    assert journal.kept("routing", 2) is None
    journal.keep("routing", Routing(np.array([[0.1, 0.9], [1 / 3, 2 / 3]])))
    again = opened(seed=0, method="a")
    assert dict(again) == FOUND and len(again) == 2
    np.testing.assert_array_equal(again.kept("routing", 2).weights, [[0.1, 0.9], [1 / 3, 2 / 3]])
    with pytest.raises(InputError, match=r"seed, dtype.*--fresh"):  # another run
        opened(method="a", seed=1, dtype="float32")
    for text in ("[" * 100_000, "[]", "7", '"a"', "{", ""):
        (tmp_path / ".journal" / "identity.json").write_text(text)
        started = opened()
        assert dict(started) == {}
        started.update(FOUND)
    assert dict(opened(fresh=True)) == {}
    opened().close()
    assert list(tmp_path.iterdir()) == []  # one without an entry goes


DAMAGED = ["[" * 100_000, "[]", "7", '[{}, {"text": 7}]', "[[], []]", "null"]


@pytest.mark.parametrize("cut", [*range(1, 60, 7), *DAMAGED])
def test_half_a_line_is_forgotten_and_overwritten(journal, opened, tmp_path, cut):
    journal[ONE] = FOUND[ONE]
    file = tmp_path / ".journal" / "answers.jsonl"
    whole = file.read_text()
    if isinstance(cut, str):
        file.write_text(whole + cut + "\n" + whole)  # what is behind a damaged line goes, too
    else:
        journal[TWO] = FOUND[TWO]
        file.write_bytes(file.read_bytes()[:-cut])
    again = opened()
    assert dict(again) == {ONE: FOUND[ONE]} and file.read_text() == whole
    again[TWO] = FOUND[TWO]
    assert dict(opened()) == FOUND


@pytest.mark.parametrize(
    "weights", [np.ones((3, 2)), np.ones(2), np.ones((2, 2), int), np.full((2, 2), np.nan)]
)
def test_a_routing_of_other_queries_or_without_numbers_is_none(journal, weights):
    journal.keep("routing", Routing(weights))
    assert journal.kept("routing", 2) is None


def test_one_run_at_a_time(tmp_path):
    with alone_in(tmp_path / "out"):
        with pytest.raises(InputError, match="another run"), alone_in(tmp_path / "out"):
            pass
        (tmp_path / "out" / "file").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    with alone_in(tmp_path / "out"), alone_in(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()  # nothing was written


@pytest.mark.parametrize("method", ["proto_route", "average", "arrow"])
def test_a_run_killed_after_any_batch_ends_with_the_same_bytes(command, monkeypatch, method):
    _, whole = command(method, "--batch_size", 1, out="whole")
    for _ in ROWS[1:]:  # each time one batch more
        with pytest.raises(Killed), killed_after(1, monkeypatch):
            command(method, "--batch_size", 1, out="killed")
    code, out = command(method, "--batch_size", 1, out="killed")
    assert code == 0 and files_of(out) == files_of(whole)
    assert not (out / ".journal").exists()


def test_what_was_answered_is_not_answered_again(command, monkeypatch):
    def unreadable(*how):
        with patch("router.library.adapters.sha256_of", side_effect=OSError(5, "Input/output error")):
            return write_variant(*how)

    with patch("router.pipeline.steps.write_variant", unreadable):
        code, out = command("proto_route", "--batch_size", 1, "--false_positive_rate", 0.99)
    assert code == 2 and (out / ".journal" / "routing.safetensors").exists()
    monkeypatch.setattr("router.pipeline.fitted.probe", lambda *_: pytest.fail("routed again"))
    with pytest.raises(Killed), killed_after(3, monkeypatch):
        command("proto_route", "--batch_size", 1, "--false_positive_rate", 0.99)
    with killed_after(len(ROWS), monkeypatch) as done:
        assert command("proto_route", "--batch_size", 1, "--false_positive_rate", 0.99)[0] == 0
    assert len(done) == len(ROWS) - 3 and load(out).record.resumed and "earlier process" in load(out).notes[0]


@pytest.mark.parametrize("method", ["oracle", "cards"])
def test_what_else_a_method_reads_is_known(method, command, tiny_library, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("router.methods.cards.Cards.check", lambda: None)
    route = lambda self, queries, rows: evenly(queries, self.adapters)  # noqa: E731
    monkeypatch.setattr("router.methods.cards.Cards.route", route)
    with pytest.raises(Killed), killed_after(1, monkeypatch):
        command(method, "--batch_size", 1)
    if method == "cards":
        (tiny_library / "mlp" / "README.md").write_text("It sorts.")
    else:
        write_queries(tmp_path / "queries.csv", [(*row[:4], "base") for row in ROWS])
    capsys.readouterr()
    assert command(method, "--batch_size", 1)[0] == 2 and "reads" in capsys.readouterr().err


def test_a_run_killed_while_it_probes_goes_on(command, monkeypatch):
    monkeypatch.setattr("router.pipeline.fitted.AT_ONCE", 2)
    _, whole = command("proto_route", out="whole")
    plain, done = Fitted.probe, []

    def stopping(self, model, rows, *more):
        if len(done) == 2:
            raise Killed
        done.append(rows)
        return plain(self, model, rows, *more)

    monkeypatch.setattr(Fitted, "probe", stopping)
    with pytest.raises(Killed):
        command("proto_route")
    done.clear()
    code, out = command("proto_route")
    assert code == 0 and len(done) == 1  # of three parts
    assert files_of(out) == files_of(whole)


@pytest.mark.slow
def test_sigkill_at_any_moment(tmp_path, tiny_base, tiny_library, monkeypatch):
    """The real signal, at moments spread over the whole run; processes start with all imported."""
    queries = write_queries(tmp_path / "queries.csv")
    words = arguments("proto_route", [queries], tiny_library, tiny_base, tmp_path / "out", "--quiet")
    monkeypatch.setenv("PROTO_ROUTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["router.run", "transformers", "peft"])

    def run(*more, seconds=None):
        process, started = processes.Process(target=main, args=([*words, *more],)), time.monotonic()
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return time.monotonic() - started

    run("--output_folder", str(tmp_path / "first"))  # which waits for the imports
    took = run("--output_folder", str(tmp_path / "whole"))
    for share in (0.5, 0.8, 0.95):
        run(seconds=took * share)
    run()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole") != {}


def test_a_run_that_was_killed_before_it_routed_is_no_hindrance(command, monkeypatch):
    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr("router.run.route", Mock(side_effect=Killed))
        patch.setattr(Journal, "close", lambda self: self._file.close())  # a killed process removes nothing
        command("proto_route")
    assert command("proto_route", "--seed", 3)[0] == 0


def test_a_method_whose_code_changed_does_not_go_on(command, own_method, capsys, monkeypatch):
    code = "from router.methods.average import Average\n\n\nclass Mine(Average):\n    pass\n"
    own_method("mine", code)
    with pytest.raises(Killed), killed_after(1, monkeypatch):
        command("mine", "--batch_size", 1)
    with monkeypatch.context() as patch:
        patch.setattr("router.run.CODE", [])  # as if another file of the package had changed
        assert command("mine", "--batch_size", 1)[0] == 2 and "code;" in capsys.readouterr().err
    own_method("mine", code.replace("Mine", "Other"))
    assert command("mine", "--batch_size", 1)[0] == 2 and "code;" in capsys.readouterr().err


def with_other(file, **fields):
    """Changes a file of the base model."""
    return lambda base, library: edit_json(base / file, **fields)


def move_template(base, library):
    (library / "mlp" / TEMPLATE).rename(library / "attention" / TEMPLATE)


ROPE = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("change", "flags", "again", "differs"),
    [
        (with_other("config.json", rope_parameters=ROPE), (), (), "configuration"),
        (with_other("tokenizer_config.json", chat_template="{{ messages }}"), (), (), "configuration"),
        (with_other("tokenizer.json", normalizer={"type": "Lowercase"}), (), (), "configuration"),
        (with_other("generation_config.json", eos_token_id=7), (), (), "configuration"),
        (move_template, (), (), "adapters"),
        (None, ("--dtype", "bfloat16"), (), "threads"),
        (None, (), ("--seed", "3"), "seed"),
        (None, (), ("--adapters", "mlp", "everything", "attention"), "adapters"),  # another order
    ],
)
def test_an_unfinished_run_that_answers_otherwise_is_refused(
    change, flags, again, differs, command, tiny_base, tiny_library, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("router.library.sources.LIBRARY", tiny_library)
    (tiny_library / "mlp" / TEMPLATE).write_text("{{ messages[0]['content'] }}")
    base = shutil.copytree(tiny_base, tmp_path / "base")
    run = partial(command, "base", "--batch_size", 1, *flags, base=base)
    with pytest.raises(Killed), killed_after(1, monkeypatch):
        run()
    if change:
        change(base, tiny_library)
    monkeypatch.setattr("torch.get_num_threads", lambda: 99)  # which counts in half precision alone
    assert run(*again)[0] == 2 and f"{differs};" in capsys.readouterr().err
    assert run(*again, "--fresh")[0] == 0
