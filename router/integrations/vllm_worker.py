"""The half of the vLLM plugin that lives in vLLM's workers: reads the prompts of marked requests.

Hooks on the linear modules that the prototypes name turn a prompt's tokens into responses, as
router/routing/probe.py does with a base model of our own. No activation leaves the worker. A request that
bears no mark costs nothing.
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from router.pipeline import state
from router.pipeline.fitted import Fitted
from router.routing.probe import Inputs, averages, confidence_of, counted_tokens, squared_cosines
from router.system.errors import InputError
from router.system.files import sha256_of

log = logging.getLogger("vllm.proto_route")  # vLLM shows its own loggers alone
MARKED = re.compile(r"proto-route-(\w+)-(\d+)-\w+")  # the library's version, the frame's number, the prompt's
VERSIONS = 2  # of the library: requests that began before a reload end with the old one


def mark(version: str, frame: int, number: str) -> str:
    """The id of a request whose prompt is read; `number` is unlike any other's, letters and digits."""
    return f"proto-route-{version}-{frame}-{number}"


def register() -> None:
    """Gives vLLM's workers methods for `collective_rpc`; an entry point of `vllm.general_plugins`."""
    from vllm.v1.worker.worker_base import WorkerBase

    WorkerBase.proto_route_load = _load
    WorkerBase.proto_route_take = _take


def _load(worker: Any, folder: str, sha256: str, version: str) -> str:
    """Reads the prototypes of a saved router; "" or, in a sentence, why it cannot."""
    try:
        if not hasattr(worker, "proto_route"):
            worker.proto_route = Reader(worker.model_runner)
        worker.proto_route.load(Path(folder), sha256, version)
    except InputError as error:
        return str(error)
    return ""


def _take(worker: Any, name: str) -> bytes:
    """The measurements of a marked request, see `Reader.take`."""
    taken: bytes = worker.proto_route.take(name)
    return taken


class Prompt:
    """A prompt that the engine reads, in one step or in several.

    Args:
        fitted: the library in the frame that the prompt is compared in.
        ids: (T,) int64 its tokens.
        device: of the base model.
    """

    def __init__(self, fitted: Fitted, ids: Tensor, device: torch.device) -> None:
        self.fitted, self.tokens, self.read = fitted, len(ids), 0
        counted = counted_tokens(ids[None], torch.ones_like(ids[None]), fitted.framing.prefix)  # (1, T)
        self.views = torch.zeros(2, len(ids))  # weight of each token in the two responses
        self.views[:, counted[0]] = averages(counted, fitted.framing.end)[:, 0]
        self.views = self.views.to(device)
        zeros = torch.zeros(len(fitted.prototypes), 2, len(fitted.names), device=device, dtype=torch.float32)
        self.squares = dict(zip(fitted.prototypes, zeros, strict=True))  # by module, each (2, adapters)
        self.confidence: Tensor | None = None

    def responses(self) -> bytes:
        """(adapters, modules, 2) float32, NaN where none is heard; and, last, the base model's confidence."""
        assert self.confidence is not None
        squares = torch.stack([*self.squares.values()])  # (modules, 2, adapters)
        responses = squares.sqrt().permute(2, 0, 1).cpu()
        responses[torch.from_numpy(self.fitted.absent)] = torch.nan
        return torch.cat([responses.flatten(), self.confidence.cpu()[None]]).numpy().tobytes()


class Group(NamedTuple):
    """The marked prompts of one frame in a step of the engine.

    Attributes:
        inputs: picks the tokens that count.
        views: (2, prompts, T') their weights.
    """

    prompts: list[Prompt]
    inputs: Inputs
    views: Tensor


class Reader:
    """Reads the marked requests of one model runner.

    Args:
        runner: vLLM's; it knows which rows of a batch are whose.

    Raises:
        InputError: it is vLLM's second model runner, which tells nobody.
    """

    def __init__(self, runner: Any) -> None:
        if not (hasattr(runner, "input_batch") and hasattr(runner, "query_start_loc")):
            raise InputError("expected vLLM's first model runner; set VLLM_USE_V2_MODEL_RUNNER=0")
        self.runner, self.model = runner, runner.get_model()
        self.libraries: OrderedDict[str, list[Fitted]] = OrderedDict()
        self.reading: OrderedDict[str, Prompt] = OrderedDict()  # by the request's id here
        self.done: OrderedDict[str, bytes] = OrderedDict()  # by its mark
        self.step: object = None  # vLLM's context of the step that `groups` are of
        self.groups: list[Group] = []
        self.last: list[tuple[int, str, Prompt]] = []  # prompts that end in this step, by row
        self.names: dict[str, set[str]] = {}  # of the prototypes' modules, by the engine's
        logits_of = self.model.compute_logits

        def compute_logits(*args: Any, **how: Any) -> Any:
            logits = logits_of(*args, **how)
            with self._guarded():
                self._finish(logits)
            return logits

        self.model.compute_logits = compute_logits

    def load(self, folder: Path, sha256: str, version: str) -> None:
        """Reads the prototypes of a saved router, beside those of the one before.

        Args:
            sha256: of their file.
            version: by which marks name it, letters and digits that nobody guesses.

        Raises:
            InputError: they are not those that are meant, or do not fit the model.
        """
        file = folder / state.FILE
        if sha256_of(file) != sha256:
            raise InputError(f"{file}: expected the file of the router that was loaded, got another; reload")
        packed = getattr(self.model, "packed_modules_mapping", None) or {}
        modules = dict(self.model.named_modules())
        places = {}
        widths = {}
        for place, module in modules.items():
            parent, _, last = place.rpartition(".")
            for part in packed.get(last, [last]):  # the engine has fused layers that read the same input
                if (width := getattr(module, "input_size", None)) is not None:
                    places[f"{parent}.{part}"], widths[f"{parent}.{part}"] = place, width
        fits = state.load(folder, self.runner.device, self.runner.model_config.dtype, widths)
        self.libraries[version] = fits
        while len(self.libraries) > VERSIONS:
            self.libraries.popitem(last=False)
        for name in fits[0].prototypes:
            place = places[name]
            if place not in self.names:
                self.names[place] = set()
                modules[place].register_forward_pre_hook(self._hook(self.names[place]))
            self.names[place].add(name)

    def take(self, name: str) -> bytes:
        """The measurements of a marked prompt, once; empty if it was not read whole."""
        return self.done.pop(name, b"")

    def _hook(self, names: set[str]) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def read(_: Any, args: tuple[Tensor, ...]) -> None:
            with self._guarded():
                self._enter()
                for group in self.groups:
                    self._visit(group, names, args[0])

        return read

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Leaves a step unread where the block fails: the engine must not fail for it."""
        try:
            yield
        except Exception:
            log.exception("the prompts of a step were not read, so the base model answers them")
            self.groups, self.last = [], []
            self.reading.clear()  # some are half read

    def _visit(self, group: Group, names: set[str], x: Tensor) -> None:
        """Adds what the tokens of a module's input x, (tokens, d_in), tell to the prompts' responses."""
        fitted = group.prompts[0].fitted
        x = x[: group.inputs.total]  # what fills up the batch comes last
        for name in names & fitted.prototypes.keys():
            centred, size = group.inputs.centred(name, x, fitted.means[name])
            proto, count = fitted.prototypes[name], len(fitted.names)
            cosines = squared_cosines(proto, centred, size, group.views, count)  # (2, prompts, adapters)
            for prompt, part in zip(group.prompts, cosines.transpose(0, 1), strict=True):
                prompt.squares[name] += part  # (2, adapters)

    def _enter(self) -> None:
        """Looks, once a step, which of its tokens belong to marked prompts."""
        from vllm.forward_context import get_forward_context

        if (context := get_forward_context()) is self.step:
            return
        self.step, self.groups, self.last = context, [], []
        if context.attn_metadata is None:  # a rehearsal
            return
        batch = self.runner.input_batch
        bounds = self.runner.query_start_loc.np
        ids = batch.req_ids
        parts: dict[int, list[tuple[Prompt, int, int]]] = {}  # by frame
        for n, name in enumerate(ids):
            marked = MARKED.search(name)
            if marked is None or (library := self.libraries.get(marked[1])) is None:
                continue
            start, count = int(batch.num_computed_tokens_cpu[n]), int(bounds[n + 1] - bounds[n])
            if start + count > batch.num_prompt_tokens[n]:  # it writes, or was put off after it wrote
                continue
            if start == 0:
                tokens = torch.from_numpy(batch.token_ids_cpu[n, : batch.num_prompt_tokens[n]]).long()
                self.reading[name] = Prompt(library[int(marked[2])], tokens, self.runner.device)
            prompt = self.reading.get(name)
            if prompt is None or prompt.read != start:
                continue  # its start came from the cache
            parts.setdefault(id(prompt.fitted), []).append((prompt, int(bounds[n]), count))
            prompt.read += count
            if prompt.read == prompt.tokens:
                self.last.append((n, marked[0], self.reading.pop(name)))
        total = int(bounds[len(ids)])
        groups = (self._group(some, total) for some in parts.values())
        self.groups = [group for group in groups if group is not None]
        for kept in (self.reading, self.done):
            while len(kept) > 2 * self.runner.max_num_reqs:  # of clients that left
                kept.popitem(last=False)

    def _group(self, parts: Sequence[tuple[Prompt, int, int]], total: int) -> Group | None:
        """The prompts of one frame; None if no token of theirs in this step counts.

        Args:
            parts: each with its first row in the batch, and how many there are.
            total: rows of the batch.
        """
        views = torch.zeros(2, len(parts), total, device=self.runner.device)
        for k, (prompt, row, count) in enumerate(parts):
            views[:, k, row : row + count] = prompt.views[:, prompt.read - count : prompt.read]
        counted = views[0].any(0)  # (total,)
        if not counted.any():
            return None
        return Group([prompt for prompt, _, _ in parts], Inputs(counted[None]), views[..., counted])

    def _finish(self, logits: Tensor | None) -> None:
        """Keeps the responses of the prompts that end in this step; logits are (requests, V)."""
        last, self.last = self.last, []
        for row, name, prompt in last:
            if logits is not None:
                prompt.confidence = confidence_of(logits[row : row + 1])[0]
                self.done[name] = prompt.responses()
