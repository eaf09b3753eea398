"""`proto-route ray`: the rows of a run, in blocks; what is answered is not answered again."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest

from helpers import ROOT, many_rows, read_by_id, write_queries
from router.cli import main as cli
from router.integrations import ray as module
from router.queries.submission import COLUMNS, read_queries
from router.system.errors import InputError

pq = pytest.importorskip("pyarrow.parquet", reason="the extra ray is not installed")
pa = pytest.importorskip("pyarrow", reason="the extra ray is not installed")
pytest.importorskip("ray", reason="the extra ray is not installed")

MANY = many_rows(23)


def write_parquet(path, rows=MANY, group=10, **columns):
    """The rows as Parquet, choices as lists."""
    table = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True)) | columns
    table["answer_choices"] = [["a", "bcd"] if "[" in text else None for text in table["answer_choices"]]
    pq.write_table(pa.table(table), path, row_group_size=group)
    return path


@pytest.fixture()
def queries(tmp_path):
    return write_queries(tmp_path / "queries.csv", MANY)


@pytest.fixture()
def saved(saved_of):
    """The folder of a router that was fitted to the queries."""
    return saved_of([row[1] for row in MANY])


@pytest.fixture()
def words(tmp_path, saved):
    """The flags of the command."""

    def joined(path, *flags, router=saved):
        every = ["--router", router, "--input", path, "--output", tmp_path / "ray", "--device", "cpu"]
        return [str(word) for word in [*every, "--block", 4, *flags]]

    return joined


@pytest.fixture()
def ray(words, capfd):
    """Runs the command; returns the exit code and what it said."""

    def run(path, *flags, **how):
        capfd.readouterr()
        code = cli(["ray", *words(path, *flags, **how)])
        return code, "".join(capfd.readouterr())

    return run


@pytest.fixture()
def answering(monkeypatch):
    """Answers in this process, in place of Ray's actors; the files of the blocks that were answered."""
    done = []

    def here(todo, args):
        actor = module.Answering(args.router, args.base_model, args.device, args.dtype)
        for part, block in todo.items():
            done.append(part.name)
            if error := actor(module.packed(part, block))["error"]:
                raise InputError(error)

    monkeypatch.setattr(module, "_answer", here)
    return done


def folder_of(tmp_path, name="queries"):
    """The one folder with answers to a query file."""
    (folder,) = (tmp_path / "ray").glob(f"{name}-*")
    return folder


def check_rows(tmp_path):
    """The rows in blocks are those of the run in `out`, in the order of the file."""
    files = sorted(folder_of(tmp_path).glob("*.parquet"))
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert [row["id"] for row in rows] == [row[0] for row in MANY]
    predictions = read_by_id(tmp_path / "out" / "queries.csv")
    routing = read_by_id(tmp_path / "out" / "queries.routing.csv")
    for row in rows:
        assert row["prediction"] == predictions[row["id"]]["prediction"]
        assert str(row["variant"]) == routing[row["id"]]["variant"]
    assert len({row["variant"] for row in rows}) > 1


def test_parquet_and_csv_hold_the_same_queries(tmp_path, queries):
    expected = read_queries(queries)
    assert module.read(queries) == expected
    assert module.read(write_parquet(tmp_path / "queries.parquet")) == expected
    numbers = write_parquet(tmp_path / "numbers.parquet", id=list(range(23)))
    assert [query.id for query in module.read(numbers)][3] == "3"
    talk = [{"role": "user", "content": "Bonjour"}]
    pq.write_table(pa.table({"messages": [talk, talk]}), tmp_path / "chat.parquet")
    first, second = module.read(tmp_path / "chat.parquet")
    assert first.conversation == talk and (first.id, second.id) == ("1", "2")
    for ids, found in ((["a", None], ["a", "2"]), (["a", "a"], None), (["a", " "], None)):
        pq.write_table(pa.table({"id": ids, "messages": [talk, talk]}), tmp_path / "chat.parquet")
        with nullcontext() if found else pytest.raises(InputError, match="row 2, column id"):
            assert [query.id for query in module.read(tmp_path / "chat.parquet")] == found


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("input", ["a", None]),
        ("eval_type", ["generation", "poem"]),
        ("input", [b"a", b"b"]),
        ("instruction", ["a", "b"]),
    ],
)
def test_a_row_that_is_no_query_is_named(ray, answering, tmp_path, column, value):
    path = write_parquet(tmp_path / "queries.parquet", MANY[1:3], **{column: value})
    code, said = ray(path)
    assert code == 2 and f"{path}, row " in said and column in said and "Traceback" not in said


def test_a_file_whose_pages_are_damaged_is_named(ray, answering, tmp_path):
    path = write_parquet(tmp_path / "queries.parquet", group=100)
    of = pq.ParquetFile(path).metadata.row_group(0)
    pages = next(of.column(n) for n in range(of.num_columns) if of.column(n).path_in_schema == "input")
    content, first = bytearray(path.read_bytes()), pages.dictionary_page_offset
    size = pages.total_compressed_size
    content[first + 20 : first + size] = b"\xff" * (size - 20)
    path.write_bytes(content)
    code, said = ray(path)
    assert code == 2 and str(path) in said and "Traceback" not in said


def test_what_cannot_be_answered_is_refused(ray, answering, queries, tmp_path, monkeypatch):
    pq.write_table(pa.table({"id": ["1"], "text": ["x"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"id": ["1"], "input": ["x"]})[:0], tmp_path / "empty.parquet")
    (tmp_path / "no.parquet").write_text("id,input")
    for name in ("other.parquet", "empty.parquet", "no.parquet", "none.csv"):
        code, said = ray(tmp_path / name)
        assert code == 2 and name in said and "Traceback" not in said
    for flag, name in (("--output", "no.parquet"), ("--router", "nothing")):
        code, said = ray(queries, flag, tmp_path / name)
        assert code == 2 and flag in said and "Traceback" not in said
    with pytest.raises(SystemExit) as caught:
        ray(queries, "--actors", 0)
    assert caught.value.code == 2
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "ray" else name)
    code, said = ray(queries)
    assert code == 2 and "proto-route[ray]" in said


def test_the_rows_are_those_of_a_run(ray, answering, command, tmp_path):
    _, out = command("proto_route", rows=MANY)
    code, said = ray(tmp_path / "queries.csv", router=out)
    assert code == 0 and "23 queries" in said
    check_rows(tmp_path)


def test_a_block_that_has_its_answers_is_not_answered_again(ray, answering, queries, tmp_path):
    assert ray(queries)[0] == 0
    folder = folder_of(tmp_path)
    parts = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(parts) == answering and len(parts) == 6
    answering.clear()
    for name in ("000001.parquet", "000004.parquet"):
        (folder / name).unlink()
    (folder / ".000001.parquet").write_text("half")  # an actor was killed
    assert ray(queries)[0] == 0 and answering == ["000001.parquet", "000004.parquet"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == parts
    assert ray(queries)[0] == 0 and len(answering) == 2


def test_other_answers_have_another_folder(ray, answering, queries, tmp_path):
    assert ray(queries)[0] == 0 and ray(queries, "--block", 5)[0] == 0
    about = tmp_path / "saved" / "router.json"
    about.write_text(about.read_text() + "\n")
    assert ray(queries)[0] == 0
    write_queries(queries, MANY[:-1])
    assert ray(queries)[0] == 0
    rows = [
        sum(pq.read_table(file).num_rows for file in folder.glob("*.parquet"))
        for folder in (tmp_path / "ray").glob("queries-*")
    ]
    assert sorted(rows) == [22, 23, 23, 23]


def test_a_run_that_is_stopped_says_how_it_goes_on(ray, queries, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_answer", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # else a test that fails would end all
    try:
        code, said = ray(queries)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 130 and said.endswith("stopped; the same command goes on where it was\n")
    assert not (tmp_path / "ray" / ".lock").exists()


@pytest.mark.slow
def test_two_actors_give_the_rows_of_a_run(words, saved, command, tmp_path):
    queries = write_queries(tmp_path / "queries.csv", MANY)  # the command's
    assert command("proto_route")[0] == 0

    def run():
        started = [sys.executable, "-m", "router", "ray", *words(queries)]
        done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = run()
    assert code == 0, said
    check_rows(tmp_path)
    # What is wrong in an actor is told as if it were here.
    weights = next(saved.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    (folder_of(tmp_path) / "000002.parquet").unlink()
    code, said = run()
    assert code == 2 and "error: " in said and str(weights) in said and "Traceback" not in said


def test_a_block_at_which_actors_died_again_and_again_is_refused(tmp_path):
    part = tmp_path / "0.parquet"
    (tmp_path / ".0.parquet.tries").write_text("...")
    found = module.Answering(tmp_path / "no router")({"part": str(part), "queries": "[]"})
    assert "an actor died 3 times" in found["error"] and "--actors" in found["error"]
    assert not any(tmp_path.iterdir())
