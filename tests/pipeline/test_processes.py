"""A run in several processes ends with the bytes of one; where there cannot be several, they are refused."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import psutil
import pytest

from helpers import ROOT, Killed, arguments, before_batches, files_of, many_rows, read_table, write_queries
from router.kit import Merges
from router.model.answer import FAILED, Answer
from router.model.base import load_base
from router.pipeline import steps
from router.pipeline.context import Context, Deadline
from router.pipeline.journal import Journal
from router.pipeline.processes import Processes
from router.queries.submission import Query, read_queries
from router.run import _run
from router.settings import Settings
from router.system.errors import InputError

MANY = many_rows(48)


class Threads(Processes):
    """Processes that are threads of this one, which start at once."""

    def __init__(self, rank, barrier, slots):
        super().__init__(rank, barrier.parties)
        self.barrier, self.slots = barrier, slots

    def gathered(self, value):
        self.slots[self.rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def decided(self, decide):
        return self.gathered(None if self.rank else decide())[0]


def in_threads(count, task):
    """What `task(processes)` returns, or raises, in each of so many threads, in order of rank."""
    barrier, slots, found = threading.Barrier(count, timeout=60), [None] * count, [None] * count

    def one(rank):
        try:
            found[rank] = task(Threads(rank, barrier, slots))
        except BaseException as error:
            barrier.abort()
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), name=str(rank)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture()
def started(tmp_path, tiny_base, tiny_library, monkeypatch):
    """Runs a method in so many processes; returns what each of them returned or raised."""
    lock = threading.Lock()

    def one_by_one(*how):  # while transformers loads a model, it changes what all threads share
        with lock:
            return load_base(*how)

    monkeypatch.setattr("router.pipeline.steps.load_base", one_by_one)
    queries = write_queries(tmp_path / "queries.csv", MANY)

    def run(method, count, out, deadline=lambda: None, **settings):
        settings = {"max_gen_len": 6, "batch_size": 5, "dtype": "float32", "device": "cpu"} | settings
        flags = Settings((queries,), tmp_path / out, (str(tiny_library),), str(tiny_base), **settings)
        (tmp_path / out).mkdir(exist_ok=True)

        def one(processes):
            context = Context(flags, processes=processes, deadline=deadline())
            return _run(method, {queries: read_queries(queries)}, context)

        return in_threads(count, one)

    return run


@pytest.mark.parametrize("method", ["proto_route", "average", "arrow", "logo"])
def test_several_processes_leave_the_files_of_one(started, tmp_path, monkeypatch, method):
    monkeypatch.setattr("router.pipeline.fitted.AT_ONCE", 20)
    monkeypatch.setattr("router.model.passes.tokens_at_once", lambda *_: 200)
    monkeypatch.setattr("router.methods.proto_route.tokens_at_once", lambda *_: 200)
    taken = []
    before_batches(monkeypatch, lambda _: taken.append(threading.current_thread().name))
    (alone,) = started(method, 1, "one")
    assert set(taken) == {"0"} and alone.processes is None
    taken.clear()
    record, *others = started(method, 3, "three")
    assert set(taken) == {"0", "1", "2"}
    assert record.processes == 3 and others == [None, None]
    assert files_of(tmp_path / "three") == files_of(tmp_path / "one")
    assert len(list((tmp_path / "three").iterdir())) == len(list((tmp_path / "one").iterdir()))


@pytest.mark.parametrize("count", [1, 2])
def test_what_was_answered_before_a_death_stays_answered(started, tmp_path, monkeypatch, count):
    done, dies = [], []

    def noting(batch):
        name = threading.current_thread().name
        if name in dies and done.count(name) == 2:
            raise Killed
        done.append(name)

    before_batches(monkeypatch, noting)
    started("proto_route", 1, "whole")
    whole = len(done)
    done.clear()
    dies.append("1")
    first, second = started("proto_route", 2, "out")
    dies.clear()
    assert isinstance(first, threading.BrokenBarrierError) and isinstance(second, Killed)
    assert 2 < len(done) < whole
    monkeypatch.setattr("router.pipeline.fitted.probe", lambda *_: pytest.fail("routed again"))
    assert started("proto_route", count, "out")[0].method == "proto_route"
    assert len(done) == whole
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("size", [None, 5])
def test_processes_that_would_make_other_batches_are_refused(started, tmp_path, monkeypatch, size):
    """As on two cards of unlike memory; some queries would be in no process's batch."""
    unlike = lambda *_: (99, 50) if threading.current_thread().name == "1" else (400, 200)  # noqa: E731
    monkeypatch.setattr("router.model.answer.batch_tokens", unlike)
    monkeypatch.setattr("router.run.batch_tokens", unlike)
    _, second = started("base", 2, "out", batch_size=size)
    if size:
        table = read_table(tmp_path / "out" / "queries.csv")
        assert second is None and "unknown" not in {row["prediction"] for row in table}
    else:
        assert isinstance(second, InputError) and "--batch_size" in str(second)


def test_what_all_processes_left_out_for_want_of_time_is_counted(started, tmp_path):
    class Looks(Deadline):
        """Time is over at the fourth look of a process."""

        looked = 0

        def over(self):
            self.looked += 1
            return self.looked >= 4

    record = started("base", 2, "out", lambda: Looks(1))[0]
    unknown = [row for row in read_table(tmp_path / "out" / "queries.csv") if row["prediction"] == "unknown"]
    assert 0 < record.time_limit.unanswered == len(unknown) < len(MANY)


def test_a_query_that_another_process_answered_is_not_missing():
    query, other = Query("1", "x", "generation"), Query("2", "y", "generation")

    def task(processes):
        context = Context(processes=processes, deadline=Deadline(1))
        context.deadline.unanswered = [[other], [query, query]][processes.rank]
        answers = [[Answer("a"), *[FAILED] * 3], [FAILED] * 4][processes.rank]
        method = SimpleNamespace(context=context, stages=nullcontext, predict=lambda *_: answers)
        too_long = Query("3", "z", "generation")  # which no time helps
        made = steps.answer(method, [query, other, query, too_long], [], None, None).answers
        return [answer.text for answer in made], context.deadline.unanswered

    assert in_threads(2, task) == [(["a", "unknown", "a", "unknown"], [other])] * 2


def test_the_others_stop_in_a_line_once_a_process_has_ended(command, capsys, monkeypatch):
    def closed(*_):
        raise RuntimeError("Connection closed by peer\nand where torch saw it")

    monkeypatch.setattr("accelerate.utils.gather_object", closed)
    monkeypatch.setattr("router.run.connected", lambda device: nullcontext(Processes(0, 2)))
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda found: found)
    code, out = command("base", "--quiet")
    assert code == 130 and {path.name for path in out.iterdir()} == {".journal"}
    (said,) = capsys.readouterr().err.splitlines()
    assert "Connection closed by peer" in said


def test_what_several_processes_cannot_do_is_refused(command, started, capsys, monkeypatch, tmp_path):
    with pytest.raises(InputError, match="--output_folder"):  # the journal is on another machine
        Journal(tmp_path / "elsewhere", {"seed": 0}, rank=1)
    with monkeypatch.context() as patch:
        patch.setattr("router.run.load_method", lambda name: Merges)
        first, _ = started("mine", 2, "kit")
    assert isinstance(first, InputError) and "-m mine" in str(first)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out = command("base")
    assert code == 2 and not out.exists() and "torchrun" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        command("base", "--plan")
    assert caught.value.code == 2 and "--plan" in capsys.readouterr().err
    torchrun = {"RANK": "0", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert command("base", "--device", "cuda")[0] == 2  # more than there are cards
    assert "--nproc_per_node 1" in capsys.readouterr().err


def torchrun(tmp_path, *words):
    """Two processes of a run, each with one thread; its output is one text."""
    environment = os.environ | {"PROTO_ROUTE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    start = ["torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    start += ["--rdzv_endpoint", "127.0.0.1:0", "-m", "router.main", *words]
    return subprocess.Popen(
        [sys.executable, "-m", *start],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_leaves_the_files_of_one_also_after_a_kill(tmp_path, tiny_base, tiny_library):
    queries = write_queries(tmp_path / "queries.csv", MANY)

    def words(out, *flags):
        return arguments("proto_route", [queries], tiny_library, tiny_base, tmp_path / out, *flags)

    alone = [sys.executable, "-m", "router.main"]
    environment = os.environ | {"PROTO_ROUTE_CACHE": str(tmp_path / "other"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*alone, *words("one")], env=environment, cwd=ROOT, check=True)
    run = torchrun(tmp_path, *words("two"))
    told, _ = run.communicate()
    assert run.returncode == 0 and told.count("answers in") == 1, told
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")

    slow = ("--batch_size", 1, "--max_gen_len", 120)
    run = torchrun(tmp_path, *words("killed", *slow))
    journal = tmp_path / "killed" / ".journal" / "answers.1.jsonl"
    while not (journal.exists() and journal.stat().st_size):
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    (second,) = [one for one in psutil.Process(run.pid).children() if one.environ().get("RANK") == "1"]
    second.send_signal(signal.SIGKILL)
    told, _ = run.communicate()
    assert run.returncode != 0 and "Signal 9 (SIGKILL)" in told
    assert told.count("another process of the run") == 1 and "goes on where it was" in told
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {".journal"}
    subprocess.run([*alone, *words("whole", *slow)], env=environment, cwd=ROOT, check=True)
    subprocess.run([*alone, *words("killed", *slow)], env=environment, cwd=ROOT, check=True)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
