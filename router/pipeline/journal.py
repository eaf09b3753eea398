"""The routing and answers of an unfinished run, so that the same command goes on where it stood.

A folder `.journal` in the output folder holds the routing, part by part, and the answers, one a line. It goes
when the run is finished, unless --time_limit left queries out. Only one run at a time may write to an output
folder. Of several processes each writes a file of answers and reads all; the first one does the rest.
"""

import json
from collections import UserDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from router.model.answer import Answer
from router.pipeline.evidence import Evidence
from router.pipeline.result import Routing
from router.queries.submission import Query
from router.system.errors import InputError, reason
from router.system.files import is_ours, mark, record_of, remove_ours, replacing

FOLDER, LOCK, DONE = ".journal", ".lock", "done"


@contextmanager
def alone_in(output: Path, flag: str = "") -> Iterator[None]:
    """Makes a folder and keeps other runs and saves out of it while the block runs.

    The operating system releases the lock of a process that was killed.

    Args:
        flag: that names the folder, if one does.

    Raises:
        InputError: it cannot be written, another one is writing there, or something that is no lock is
            called like it.
    """
    where = f"{flag} {output}".strip()
    file = output / LOCK
    lock = FileLock(file)
    try:
        ours = not file.exists() or (file.is_file() and not file.stat().st_size)
        if file.is_symlink() or not ours:
            raise InputError(f"{where}: expected no {LOCK} in it but a run's, which is empty; move it away")
        new = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{where}: another run or save is writing there; wait or choose another") from error
    except OSError as error:
        raise InputError(f"{where}: expected a folder to write to ({reason(error)})") from error
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows removes no open file; there `release` does it
            file.unlink(missing_ok=True)
        lock.release()
        if new and not any(output.iterdir()):  # a run that was refused leaves nothing
            output.rmdir()


class Journal(UserDict[Query, Answer]):
    """The answers so far, by query; what is added is kept at once.

    The same query has the same answer wherever it stands: its prompt alone decides how it is routed.

    Args:
        output: the output folder.
        identity: everything that the answers depend on, as JSON values.
        fresh: forgets what is there.
        rank: of this process. The others open the journal once the first one has.

    Attributes:
        resumed: whether something of an earlier process was there.

    Raises:
        InputError: what is there is no journal, or of a run with another identity that has answers or a
            routing, or cannot be read, or the first process's journal is not there or has another identity.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], fresh: bool = False, rank: int = 0) -> None:
        super().__init__()
        self.folder, self.rank = output / FOLDER, rank
        if fresh:
            self.discard()
        if not is_ours(self.folder):
            raise InputError(f"{self.folder}: expected the journal of a run, or none; move it away")
        self._begin(json.loads(json.dumps(identity)))
        if not rank:
            (self.folder / DONE).unlink(missing_ok=True)
        file = self.folder / (f"answers.{rank}.jsonl" if rank else "answers.jsonl")
        file.touch()
        ends = {path: self._read(path) for path in self.folder.glob("answers*.jsonl")}
        self.resumed = bool(self.data) or self._routed
        self._file: IO[bytes] = file.open("r+b")
        self._file.truncate(ends[file])
        self._file.seek(ends[file])

    @property
    def _routed(self) -> bool:
        """Whether it holds a routing, or a part of one."""
        return any(self.folder.glob("*.safetensors"))

    def _begin(self, identity: dict[str, Any]) -> None:
        """Goes on with what is there, or starts anew where there is nothing, or nothing of this identity."""
        file = self.folder / "identity.json"
        try:
            known = record_of(dict[str, Any], file.read_bytes())
        except (FileNotFoundError, ValueError) as error:  # none yet, or damaged
            if self.rank:
                raise InputError(
                    f"--output_folder {self.folder.parent}: expected one folder for all processes, but here "
                    "the first one's journal is not in it; choose a folder that all machines share"
                ) from error
            known = {}
        other = [key for key in {**known, **identity} if known.get(key) != identity.get(key)]
        if not other:
            return
        if self.rank:  # other batches, of which some would be no process's
            raise InputError(
                f"expected a process like the first, but this one differs in {', '.join(other)}; take the "
                "same versions, cards of one kind and the same OMP_NUM_THREADS, or pass --dtype, --apply and "
                "--batch_size"
            )
        begun = self._routed or any(file.stat().st_size for file in self.folder.glob("answers*.jsonl"))
        if known and begun and not (self.folder / DONE).exists():
            raise InputError(
                f"--output_folder {self.folder.parent}: holds an unfinished run that differs in "
                f"{', '.join(other)}; choose another folder, or pass --fresh to start anew there"
            )
        self.discard()
        mark(self.folder)
        with replacing(file) as new:
            json.dump(identity, new)

    def _read(self, path: Path) -> int:
        """Reads whole lines and returns where the last of them ends; a killed run may leave half a one."""
        end = 0
        with path.open("rb") as file:
            for line in file:
                try:
                    if not line.endswith(b"\n"):
                        break
                    query, answer = record_of(tuple[Query, Answer], line)
                except ValueError:
                    break
                self.data[query] = answer
                end += len(line)
        return end

    def __setitem__(self, query: Query, answer: Answer) -> None:
        super().__setitem__(query, answer)
        self._file.write(json.dumps([asdict(query), asdict(answer)]).encode() + b"\n")
        self._file.flush()

    def kept(self, name: str, queries: int) -> Routing | None:
        """The routing of `queries` queries, as `keep` was given it; None if there is none."""
        evidence = self.folder / f"{name}.evidence.safetensors"
        try:
            weights = load_file(self.folder / f"{name}.safetensors")["weights"]
            routing = Routing(weights, Evidence.load(evidence) if evidence.exists() else None)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        sound = weights.dtype == np.float64 and weights.ndim == 2 and np.isfinite(weights).all()
        return routing if sound and len(weights) == queries else None

    def keep(self, name: str, routing: Routing) -> None:
        """Keeps the routing of all queries or of some under a name."""
        if self.rank:
            return
        if routing.evidence:
            routing.evidence.save(self.folder / f"{name}.evidence.safetensors")
        part = self.folder / f"{name}.part"
        save_file({"weights": np.ascontiguousarray(routing.weights)}, part)
        part.replace(self.folder / f"{name}.safetensors")  # last, so that what is there is whole

    def close(self) -> None:
        """Closes the file; a journal without an entry goes."""
        self._file.close()
        if not self.data and not self._routed:
            self.discard()

    def finish(self) -> None:
        """Stays for the same command, which answers what there was no time for; any other one begins anew."""
        if not self.rank:
            (self.folder / DONE).touch()

    def discard(self) -> None:
        """Forgets everything, on disk too."""
        if not self.rank:
            remove_ours(self.folder)
