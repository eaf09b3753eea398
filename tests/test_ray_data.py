"""`proto-route ray`: the rows of a run, in blocks; what is answered is not answered again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from helpers import ROOT, read_by_id, write_queries
from router import ray_data
from router.queries.submission import COLUMNS, read_queries
from router.system.errors import InputError

pq = pytest.importorskip("pyarrow.parquet", reason="the extra ray is not installed")
pa = pytest.importorskip("pyarrow", reason="the extra ray is not installed")
pytest.importorskip("ray", reason="the extra ray is not installed")

CHOICE = ("multiple_choice", "['a', 'bcd']")
MANY = [
    (f"{n:02}", f"{n} is a number" + ", is it" * (n % 7), *(CHOICE if n % 3 == 0 else ("generation", "")))
    for n in range(23)
]


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
def words(tmp_path, tiny_base, tiny_library):
    """The flags of the command."""

    def joined(path, *flags, out="ray"):
        every = [
            "--input", path, "--output", tmp_path / out, "--adapters", tiny_library, "--base_model",
            tiny_base, "--dtype", "float32", "--device", "cpu", "--max_gen_len", 6, "--block", 4,
            "--sample", 100, *flags,
        ]  # fmt: skip
        return [str(word) for word in every]

    return joined


@pytest.fixture()
def ray(words, capfd):
    """Runs the command; returns the exit code and what it said."""

    def run(path, *flags, out="ray"):
        capfd.readouterr()
        code = ray_data.main(words(path, *flags, out=out))
        return code, "".join(capfd.readouterr())

    return run


@pytest.fixture()
def answering(monkeypatch):
    """Answers in this process, in place of Ray's actors; the files of the blocks that were answered."""
    done = []

    def here(todo, args, settings, router):
        actor, rows = ray_data.Answering(router, settings.base_model, settings.device), 0
        for part, block in todo:
            done.append(part.name)
            answered = actor(ray_data.table(part, block))
            if answered["error"][0]:
                raise InputError(answered["error"][0])
            rows += answered["rows"][0]
        return rows, 0

    monkeypatch.setattr(ray_data, "_answer", here)
    return done


def rows_of(folder):
    return {
        row["id"]: row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    }


def test_every_row_is_in_one_block_in_order(tmp_path):
    path = write_parquet(tmp_path / "queries.parquet")
    blocks = list(ray_data.blocks(path, tmp_path, 4))
    assert [len(queries) for _, queries in blocks] == [4, 4, 4, 4, 4, 3]
    assert sorted({part for part, _ in blocks}) == [part for part, _ in blocks]
    assert [query.id for _, queries in blocks for query in queries] == [row[0] for row in MANY]


def test_parquet_and_csv_hold_the_same_queries(tmp_path, queries):
    expected = read_queries(queries)
    assert list(ray_data.read(queries)) == expected
    assert list(ray_data.read(write_parquet(tmp_path / "queries.parquet"))) == expected
    numbers = write_parquet(tmp_path / "numbers.parquet", id=list(range(23)))
    assert [query.id for query in ray_data.read(numbers)][3] == "3"


def test_a_sample_is_drawn_alike_from_all_rows(queries):
    every = read_queries(queries)
    texts = [row[1] for row in MANY]
    assert ray_data.sample(every, 100, 0) == texts
    assert ray_data.sample(every, 5, 0) == ray_data.sample(every, 5, 0) != ray_data.sample(every, 5, 1)
    drawn = Counter(text for seed in range(600) for text in ray_data.sample(every, 5, seed))
    assert set(drawn) == set(texts)
    assert max(drawn.values()) < 2 * min(drawn.values())  # 130 of each are expected, give or take 10
    places = [texts.index(text) for text in ray_data.sample(every, 9, 3)]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("column", "value"),
    [("input", ["a", None]), ("eval_type", ["generation", "poem"]), ("input", [b"a", b"b"])],
)
def test_a_row_that_is_no_query_is_named(ray, answering, tmp_path, column, value):
    path = write_parquet(tmp_path / "queries.parquet", MANY[:2], **{column: value})
    code, said = ray(path)
    assert code == 2 and f"{path}, row " in said and f"column {column}" in said and "Traceback" not in said


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


@pytest.mark.parametrize("call", ["from_library", "load"])  # here, and in an actor
def test_memory_that_runs_out_is_told_with_what_needs_less(ray, answering, queries, monkeypatch, call):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")

    monkeypatch.setattr(f"router.api.Router.{call}", fail)
    code, said = ray(queries)
    assert code == 2 and "memory ran out" in said and "fewer --actors" in said and "Traceback" not in said
    assert "--apply" not in said  # which this command does not have


def test_what_cannot_be_answered_is_refused(ray, answering, queries, tmp_path, monkeypatch):
    pq.write_table(pa.table({"id": ["1"], "text": ["x"]}), tmp_path / "other.parquet")
    write_parquet(tmp_path / "empty.parquet", MANY[:1], group=1)
    pq.write_table(pq.read_table(tmp_path / "empty.parquet")[:0], tmp_path / "empty.parquet")
    (tmp_path / "no.parquet").write_text("id,input")
    for words, named in (
        ([tmp_path / "other.parquet"], "input is missing"),
        ([tmp_path / "empty.parquet"], "at least one query"),
        ([tmp_path / "no.parquet"], "no.parquet"),
        ([tmp_path / "none.csv"], "--input"),
        ([queries, "--input", queries, queries], "--input"),
        ([queries, "--address", "127.0.0.1:1"], "--address"),
        ([queries, "--address", "nonsense"], "--address"),
        ([queries, "--actors", 0], "--actors"),
        ([queries, "--block", 10**30], "--block"),
    ):
        code, said = ray(*words)
        assert code == 2 and named in said and "Traceback" not in said
    monkeypatch.setattr(ray_data, "find_spec", lambda name: None if name == "ray" else name)
    code, said = ray(queries)
    assert code == 2 and "pip install 'proto-route[ray]'" in said


def test_folders_of_somebody_else_are_left_alone(ray, answering, queries, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "kept" / "answers").mkdir(parents=True)
    assert ray(queries, out="file")[0] == 2 and ray(queries, out="kept")[0] == 2
    assert ray(queries, "--fresh", out="kept")[0] == 2 and (tmp_path / "kept" / "answers").is_dir()
    assert ray(queries)[0] == 0
    answers = tmp_path / "ray" / "answers"
    answers.rename(tmp_path / "elsewhere")
    answers.symlink_to(tmp_path / "elsewhere")
    assert ray(queries, "--fresh")[0] == 2 and ray(queries)[0] == 2
    assert list((tmp_path / "elsewhere" / "queries").iterdir())


def test_the_rows_are_those_of_a_run(ray, answering, command, tmp_path):
    queries = write_queries(tmp_path / "queries.csv", MANY)  # the command's
    assert command("proto_route") == (0, tmp_path / "out")
    code, said = ray(queries)
    assert code == 0 and "23 queries" in said
    check_rows(tmp_path)


def check_rows(tmp_path):
    """The rows in blocks are those of the run in `out`."""
    rows = rows_of(tmp_path / "ray" / "answers" / "queries")
    assert list(rows) == [row[0] for row in MANY]
    predictions = read_by_id(tmp_path / "out" / "queries.csv")
    routing = read_by_id(tmp_path / "out" / "queries.routing.csv")
    for own, row in rows.items():
        assert row["prediction"] == predictions[own]["prediction"]
        assert str(row["variant"]) == routing[own]["variant"]
    assert len({row["variant"] for row in rows.values()}) > 1


def test_a_block_that_has_its_answers_is_not_answered_again(ray, answering, queries, tmp_path):
    assert ray(queries)[0] == 0
    folder = tmp_path / "ray" / "answers" / "queries"
    parts = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(parts) == answering and len(parts) == 6
    fitted = (tmp_path / "ray" / "router" / "router.json").stat().st_mtime_ns
    answering.clear()
    for name in ("000001.parquet", "000004.parquet"):
        (folder / name).unlink()
    (folder / ".000001.parquet.77").write_text("half")
    assert ray(queries)[0] == 0 and answering == ["000001.parquet", "000004.parquet"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == parts
    assert (tmp_path / "ray" / "router" / "router.json").stat().st_mtime_ns == fitted
    assert ray(queries)[0] == 0 and len(answering) == 2


def test_a_run_that_was_killed_while_it_fitted_fits_again(ray, answering, queries, tmp_path):
    assert ray(queries)[0] == 0
    expected = rows_of(tmp_path / "ray" / "answers" / "queries")
    (tmp_path / "ray" / "router" / "router.json").unlink()
    (tmp_path / "ray" / "router" / "variants" / ".proto-route").unlink()
    shutil.rmtree(tmp_path / "ray" / "answers")
    assert ray(queries)[0] == 0
    assert rows_of(tmp_path / "ray" / "answers" / "queries") == expected


def test_other_answers_are_not_mixed_in(ray, answering, queries, tmp_path):
    assert ray(queries)[0] == 0
    for words, named in ((["--max_gen_len", 3], "max_gen_len"), (["--block", 5], "block")):
        code, said = ray(queries, *words)
        assert code == 2 and named in said
    write_queries(queries, MANY[:-1])
    code, said = ray(queries)
    assert code == 2 and "input" in said
    answering.clear()
    assert ray(queries, "--fresh")[0] == 0
    assert len(answering) == 6 and len(rows_of(tmp_path / "ray" / "answers" / "queries")) == 22


def test_a_run_that_is_stopped_says_how_it_goes_on(ray, queries, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_data, "_answer", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # else a test that fails would end all
    try:
        code, said = ray(queries)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 130 and said.endswith("stopped; the same command goes on where it was\n")
    assert not (tmp_path / "ray" / ".lock").exists()


@pytest.mark.slow
def test_two_actors_give_the_rows_of_a_run(words, command, tmp_path):
    queries = write_queries(tmp_path / "queries.csv", MANY)  # the command's
    assert command("proto_route")[0] == 0

    def run():
        started = [sys.executable, "-m", "router", "ray", *words(queries, "--quiet")]
        done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = run()
    assert code == 0, said
    check_rows(tmp_path)
    # What is wrong in an actor is told as if it were here.
    weights = next((tmp_path / "ray" / "router").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "ray" / "answers" / "queries" / "000002.parquet").unlink()
    code, said = run()
    assert code == 2 and "error: " in said and str(weights) in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_run_that_is_stopped_while_actors_answer_ends_as_it_says(words, tmp_path):
    many = [(f"{n:04}", f"{n} is a number", "generation", "") for n in range(4000)]
    queries = write_queries(tmp_path / "queries.csv", many)
    started = [sys.executable, "-m", "router", "ray", *words(queries, "--sample", 20, "--quiet")]
    with subprocess.Popen(started, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list((tmp_path / "ray").glob("answers/queries/*.parquet")):
            time.sleep(0.1)
        process.terminate()
        _, said = process.communicate()
    assert process.returncode == 130
    assert said.endswith("stopped; the same command goes on where it was\n") and "Traceback" not in said


DIES = """
import os, sys
from router import ray_data

class Dies:
    def __init__(self, *how):
        self.how = how

    def __call__(self, block):
        from router import ray_data

        ray_data.Answering._answer = lambda *_: os._exit(1)
        return ray_data.Answering(*self.how)(block)

ray_data.Answering = Dies
sys.exit(ray_data.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_actor_that_dies_again_and_again_ends_the_run_in_a_sentence(words, queries):
    started = [sys.executable, "-c", DIES, *words(queries, "--quiet", "--block", 100, "--actors", 1)]
    done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said, said
    assert "error: an actor died 3 times" in said and "fewer --actors" in said
