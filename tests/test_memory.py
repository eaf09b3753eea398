"""Memory that runs out: a sentence says which flags need less, and nothing else is blamed for it."""

import errno
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch

from helpers import ROOT, arguments, write_queries
from merge.folders import AdapterError, open_adapter
from router.library.adapters import load_library
from router.system.errors import InputError

LIMITED = """
import sys
from resource import RLIMIT_AS, getpagesize, setrlimit
import router.methods.proto_route, router.main, router.pipeline.record, router.run
router.main.LEAST = 0
own = int(open("/proc/self/statm").read().split()[0]) * getpagesize()
setrlimit(RLIMIT_AS, (own, own))
sys.exit(router.main.main(sys.argv[1:]))
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits on memory are Linux's")


@linux
@pytest.mark.parametrize("start", [["-m", "router.main"], ["-c", LIMITED]], ids=["at once", "after imports"])
def test_a_run_below_a_limit_says_what_to_change(start, tmp_path, tiny_base, tiny_library):
    queries = write_queries(tmp_path / "queries.csv")
    words = arguments("proto_route", [queries], tiny_library, tiny_base, tmp_path / "out")
    limited = ["bash", "-c", 'ulimit -v "$0"; exec "$@"', "400000" if "-m" in start else "unlimited"]
    done = subprocess.run(
        [*limited, sys.executable, *start, *map(str, words)],
        cwd=ROOT, env={"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "ulimit -v" in done.stderr and ("-m" in start or "--batch_size 1" in done.stderr)
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_told_and_answers_are_kept(error, command, capsys, monkeypatch):
    _, whole = command("base", out="whole")
    with patch("router.run.write_submission", side_effect=error):
        code, out = command("base")
    told = capsys.readouterr().err
    assert code == 2 and "error: " in told and "--dtype bfloat16" in told
    mistake = RuntimeError("expected scalar type Float")  # any other error stays what it is
    with patch("router.run.write_submission", side_effect=mistake), pytest.raises(RuntimeError):
        command("base")
    monkeypatch.setattr("router.model.answer.generate", lambda *_: pytest.fail("asked again"))
    assert command("base")[0] == 0
    assert (out / "queries.csv").read_bytes() == (whole / "queries.csv").read_bytes()


def test_an_adapter_too_large_for_memory_is_not_a_bad_one(tiny_library, monkeypatch):
    def failing(path):
        if path.name == "mlp":
            raise AdapterError("unreadable") from OSError(errno.ENOMEM, "Cannot allocate memory")
        return open_adapter(path)

    monkeypatch.setattr("router.library.adapters.open_adapter", failing)
    with pytest.raises(InputError, match="unreadable"):
        load_library([str(tiny_library)], bad=[])
