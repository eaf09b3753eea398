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
from router.errors import InputError
from router.submission import COLUMNS, read_queries

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
    found = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True)) | columns
    found["answer_choices"] = [["a", "bcd"] if "[" in text else None for text in found["answer_choices"]]
    pq.write_table(pa.table(found), path, row_group_size=group)
    return path


@pytest.fixture()
def words(tmp_path, tiny_base, tiny_library):
    """The flags of the command."""

    def found(path, *flags, out="ray"):
        every = [
            "--input", path, "--output", tmp_path / out, "--adapters", tiny_library, "--base_model",
            tiny_base, "--dtype", "float32", "--device", "cpu", "--max_gen_len", 6, "--block", 4,
            "--sample", 100, *flags,
        ]  # fmt: skip
        return [str(word) for word in every]

    return found


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
    """Answers in this process, in place of Ray's actors; the blocks that were answered."""
    done = []

    def here(todo, args, settings, router, queries):
        actor = ray_data.Answering(router, settings.base_model, settings.device)
        for block in todo:
            done.append(block)
            found = actor(block._asdict())
            if found["error"]:
                raise InputError(found["error"])
        return 0

    monkeypatch.setattr(ray_data, "_answer", here)
    return done


def rows_of(folder):
    return {
        row["id"]: row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    }


def test_every_row_is_in_one_block(tmp_path):
    path = write_parquet(tmp_path / "queries.parquet")
    found = list(ray_data.blocks(path, tmp_path, 4))
    assert [(b.group, b.start, b.stop) for b in found] == [
        (0, 0, 4), (0, 4, 8), (0, 8, 10), (1, 0, 4), (1, 4, 8), (1, 8, 10), (2, 0, 3)
    ]  # fmt: skip
    assert len({block.part for block in found}) == len(found)
    assert [query.id for block in found for query in block.queries] == [row[0] for row in MANY]


def test_parquet_and_csv_hold_the_same_queries(tmp_path):
    of_csv = read_queries(write_queries(tmp_path / "queries.csv", MANY))
    for path in (write_parquet(tmp_path / "queries.parquet"), tmp_path / "queries.csv"):
        assert [q for block in ray_data.blocks(path, tmp_path, 5) for q in block.queries] == of_csv
    numbers = write_parquet(tmp_path / "numbers.parquet", id=list(range(23)))
    assert next(ray_data.blocks(numbers, tmp_path, 5)).queries[3].id == "3"


def test_a_sample_is_drawn_alike_from_all_rows(tmp_path):
    found = list(ray_data.blocks(write_parquet(tmp_path / "queries.parquet"), tmp_path, 4))
    texts = [row[1] for row in MANY]
    assert ray_data.sample(found, 100, 0) == texts
    assert ray_data.sample(found, 5, 0) == ray_data.sample(found, 5, 0) != ray_data.sample(found, 5, 1)
    drawn = Counter(text for seed in range(600) for text in ray_data.sample(found, 5, seed))
    assert set(drawn) == set(texts)
    assert max(drawn.values()) < 2 * min(drawn.values())  # 130 of each are expected, give or take 10
    places = [texts.index(text) for text in ray_data.sample(found, 9, 3)]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("rows", "columns", "told"),
    [
        (MANY[:2], {"input": ["a", None]}, "row group 0, row 2, column input: expected a value, got none"),
        (MANY[:2], {"eval_type": ["generation", "poem"]}, "row 2, column eval_type: expected generation or"),
        (
            MANY[:2],
            {"input": [b"a", b"b"]},
            "row 1, column input: expected a text or a whole number, got bytes",
        ),
    ],
)
def test_a_row_that_is_no_query_is_named(ray, answering, tmp_path, rows, columns, told):
    path = write_parquet(tmp_path / "queries.parquet", rows, **columns)
    code, said = ray(path)
    assert code == 2 and told in said and "Traceback" not in said


def test_a_file_whose_pages_are_damaged_is_named(ray, answering, tmp_path):
    path = write_parquet(tmp_path / "queries.parquet", group=100)
    of = pq.ParquetFile(path).metadata.row_group(0)
    pages = [of.column(n) for n in range(of.num_columns) if of.column(n).path_in_schema == "input"]
    content = bytearray(path.read_bytes())
    first = pages[0].dictionary_page_offset
    content[first + 20 : first + pages[0].total_compressed_size] = b"\xff" * (
        pages[0].total_compressed_size - 20
    )
    path.write_bytes(content)
    code, said = ray(path)
    assert code == 2 and f"{path}, row group 0: expected rows that can be read" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("call", ["from_library", "load"])  # here, and in an actor
def test_memory_that_runs_out_is_told_with_what_needs_less(ray, answering, tmp_path, monkeypatch, call):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")

    monkeypatch.setattr(f"router.api.Router.{call}", fail)
    code, said = ray(write_queries(tmp_path / "queries.csv", MANY))
    assert code == 2 and "memory ran out" in said and "fewer --actors" in said and "Traceback" not in said
    assert "--apply" not in said  # which this command does not have


def test_what_cannot_be_answered_is_refused(ray, answering, tmp_path, monkeypatch):
    queries = write_queries(tmp_path / "queries.csv", MANY)
    pq.write_table(pa.table({"id": ["1"], "text": ["x"]}), tmp_path / "other.parquet")
    (tmp_path / "no.parquet").write_text("id,input")
    (tmp_path / "kept" / "answers").mkdir(parents=True)
    for words, told in (
        ([tmp_path / "other.parquet"], "input, eval_type, answer_choices is missing (found: id, text)"),
        ([tmp_path / "no.parquet"], "expected a Parquet file"),
        ([tmp_path / "none.csv"], "expected a Parquet or CSV file, found none"),
        ([queries, "--input", queries, queries], "two files called queries"),
        ([queries, "--address", "127.0.0.1:1"], "HOST:PORT of a Ray cluster that runs"),
        ([queries, "--address", "nonsense"], "--address nonsense: expected local, auto, or HOST:PORT"),
        ([queries, "--actors", 0], "--actors: expected a whole number from 1 to 2147483647, got 0"),
        ([queries, "--block", 10**30], "--block: expected a whole number from 1 to 2147483647, got 1000"),
    ):
        code, said = ray(*words)
        assert code == 2 and told in said
    code, said = ray(queries, out="no.parquet")
    assert code == 2 and "expected a folder, found a file" in said
    code, said = ray(queries, out="kept")
    assert code == 2 and "found another's" in said
    monkeypatch.setattr(ray_data, "find_spec", lambda name: None if name == "ray" else name)
    code, said = ray(queries)
    assert code == 2 and "pip install 'proto-route[ray]'" in said


def test_the_rows_are_those_of_a_run(ray, answering, command, tmp_path):
    queries = write_queries(tmp_path / "queries.csv", MANY)
    assert command("proto_route") == (0, tmp_path / "out")
    code, said = ray(queries)
    assert code == 0 and "23 queries, 6 of 6 blocks" in said
    check_rows(tmp_path)


def check_rows(tmp_path):
    """The rows in blocks are those of the run in `out`."""
    found = rows_of(tmp_path / "ray" / "answers" / "queries")
    assert list(found) == [row[0] for row in MANY]
    predictions = read_by_id(tmp_path / "out" / "queries.csv")
    routing = read_by_id(tmp_path / "out" / "queries.routing.csv")
    for own, row in found.items():
        assert row["prediction"] == predictions[own]["prediction"]
        assert str(row["variant"]) == routing[own]["variant"]
    assert len({row["variant"] for row in found.values()}) > 1


def test_a_block_that_has_its_answers_is_not_answered_again(ray, answering, tmp_path):
    queries = write_queries(tmp_path / "queries.csv", MANY)
    assert ray(queries)[0] == 0
    folder = tmp_path / "ray" / "answers" / "queries"
    parts = {path.name: path.read_bytes() for path in folder.iterdir()}
    fitted = (tmp_path / "ray" / "router" / "router.json").stat().st_mtime_ns
    answering.clear()
    for name in ("000001.parquet", "000004.parquet"):
        (folder / name).unlink()
    (folder / ".000001.parquet.77").write_text("half")
    code, said = ray(queries)
    assert code == 0 and "2 of 6 blocks" in said
    assert [(block.start, block.stop) for block in answering] == [(4, 8), (16, 20)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == parts
    assert (tmp_path / "ray" / "router" / "router.json").stat().st_mtime_ns == fitted
    assert ray(queries)[0] == 0 and len(answering) == 2


def test_answers_that_cannot_be_removed_do_not_pass_for_new_ones(ray, answering, tmp_path):
    queries = write_queries(tmp_path / "queries.csv", MANY)
    assert ray(queries)[0] == 0
    answers = tmp_path / "ray" / "answers"
    answers.rename(tmp_path / "elsewhere")
    answers.symlink_to(tmp_path / "elsewhere")
    code, said = ray(queries, "--fresh")
    assert code == 2 and "expected a folder `answers` that can be removed" in said and "Traceback" not in said


def test_a_run_that_was_killed_while_it_fitted_fits_again(ray, answering, tmp_path):
    queries = write_queries(tmp_path / "queries.csv", MANY)
    assert ray(queries)[0] == 0
    expected = rows_of(tmp_path / "ray" / "answers" / "queries")
    (tmp_path / "ray" / "router" / "router.json").unlink()
    (tmp_path / "ray" / "router" / "variants" / ".proto-route").unlink()
    shutil.rmtree(tmp_path / "ray" / "answers")
    assert ray(queries)[0] == 0
    assert rows_of(tmp_path / "ray" / "answers" / "queries") == expected


def test_other_answers_are_not_mixed_in(ray, answering, tmp_path):
    queries = write_queries(tmp_path / "queries.csv", MANY)
    assert ray(queries)[0] == 0
    for words, told in (
        (["--max_gen_len", 3], "differ in max_gen_len"), (["--block", 5], "differ in block;")
    ):  # fmt: skip
        code, said = ray(queries, *words)
        assert code == 2 and told in said
    write_queries(queries, MANY[:-1])
    code, said = ray(queries)
    assert code == 2 and "differ in input" in said
    answering.clear()
    assert ray(queries, "--fresh")[0] == 0
    assert len(answering) == 6 and len(rows_of(tmp_path / "ray" / "answers" / "queries")) == 22


def test_a_run_that_is_stopped_says_how_it_goes_on(ray, tmp_path, monkeypatch):
    queries = write_queries(tmp_path / "queries.csv", MANY)
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
    queries = write_queries(tmp_path / "queries.csv", MANY)
    assert command("proto_route")[0] == 0

    def run():
        started = [sys.executable, "-m", "router", "ray", *words(queries, "--quiet")]
        done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert run() == (0, "")
    check_rows(tmp_path)
    # What is wrong in an actor is told as if it were here.
    weights = next((tmp_path / "ray" / "router").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "ray" / "answers" / "queries" / "000002.parquet").unlink()
    code, said = run()
    assert code == 2 and said.startswith("error: ") and str(weights) in said and "Traceback" not in said


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
    assert (process.returncode, said) == (130, "stopped; the same command goes on where it was\n")


DIES = """
import os, sys
from router import ray_data

class Dies:
    def __init__(self, *how):
        self.how = how

    def __call__(self, row):
        from router import ray_data

        ray_data.Answering._answer = lambda *_: os._exit(1)
        return ray_data.Answering(*self.how)(row)

ray_data.Answering = Dies
sys.exit(ray_data.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_actor_that_dies_again_and_again_ends_the_run_in_a_sentence(words, tmp_path):
    queries = write_queries(tmp_path / "queries.csv", MANY)
    started = [sys.executable, "-c", DIES, *words(queries, "--quiet", "--block", 100, "--actors", 1)]
    done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said, said
    assert "error: an actor died 3 times at rows " in said and "fewer --actors" in said
