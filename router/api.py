"""Routing from Python: `from router import Router`. The command line does the same with files."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, TypeVar, cast

import numpy as np
import pandas as pd
import torch

from router.constants import BASE_COLUMN, CANARY, FORMAT, TEMPLATE, Device, Dtype
from router.methods import check_flags, load_method
from router.methods.proto_route import ProtoRoute, decided
from router.model.answer import Answer, Rows, encode, padded
from router.model.apply import applied
from router.model.base import EMBEDDED, EMBEDDED_ID, Base, load_base
from router.model.frames import BARE, Frame
from router.model.passes import forward, lock_of, truncated
from router.model.template import Template, brought
from router.pipeline import state
from router.pipeline.context import Context
from router.pipeline.evidence import LOW_MARGIN
from router.pipeline.fitted import Fitted
from router.pipeline.journal import alone_in
from router.pipeline.reading import FRAMES, SHARED, Read
from router.pipeline.record import RECORD
from router.pipeline.result import Decision, Routing, joined
from router.pipeline.saved import ABOUT, Saved, changed, replacing_router
from router.pipeline.served import content_of, hashed
from router.pipeline.state import FILE
from router.pipeline.steps import Method
from router.pipeline.steps import load as load_library_and_base
from router.queries.conversation import Message
from router.queries.submission import GENERATION, MULTIPLE_CHOICE, Query, query_of
from router.routing.clusters import Array, Clusters, cluster, firsts, mixes, nearest, with_base
from router.routing.probe import Probed, confidence_of
from router.routing.variants import VARIANTS, Variant, decide, folder_names
from router.runs.load import load as load_run
from router.settings import Settings, kinds
from router.system.errors import InputError, printable
from router.system.files import check_apart, hashes, is_still, sha256_of, typed
from router.system.version import own_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

REMEMBERED = 10_000  # texts, and turns of conversations
# What a saved router keeps of a run's.
SETTINGS = ("max_seq_len", "max_gen_len", "scoring", "seed", "apply", "frame", "device_map", "batch_size")
Prompt = str | Sequence[Message]  # a text, or a conversation
Work = TypeVar("Work", bound=Callable[..., Any])


def _one_at_a_time(work: Work) -> Work:
    """A method that waits while another thread is in one: there is one model and one set of hooks."""

    @wraps(work)
    def waiting(self: Any, *args: Any, **how: Any) -> Any:
        with self._lock:
            return work(self, *args, **how)

    return cast(Work, waiting)


@dataclass(frozen=True)
class Choice:
    """How one text was decided.

    Attributes:
        variant: the number of the variant that answers it; None before variants are made.
        weights: of its candidates, largest first, those above 0.005; `base` is the base model.
        margin: score of the best candidate less that of the next one, in standard deviations.
        low_margin: whether another candidate might be as good.
        fits: whether an adapter answers it: one has more weight than the base model, and a variant has it.
        mix: adapter -> share, what its own answer would be made of; empty for the plain base model.
        frame: the name of the frame that it was compared in, see `Frame.name`.
    """

    variant: int | None
    weights: dict[str, float]
    margin: float
    low_margin: bool
    fits: bool
    mix: dict[str, float]
    frame: str = BARE.name


class Router:
    """A loaded library of adapters and its base model, ready to route queries.

    Threads may share a router; its work is done for one of them after the other.

    Attributes:
        candidates: the adapters' names and, last, `base`.
        variants: what queries are answered with, once `fit` or `load` has decided that; else empty.
        templates: chat templates of the variants of a loaded router that bring another than the router's, by
            number; an adapter that was trained in one answers in no other.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self._lock = lock_of(method.base.model)
        self.candidates = [*(adapter.name for adapter in method.adapters), BASE_COLUMN]
        self.variants: list[Variant] = []
        self.templates: dict[int, Template] = {}
        self._centres: Array | None = None  # (variants, candidates) the mean mix that each was made for
        self._firsts = np.zeros((0, 0), bool)  # (variants, candidates) the first of a query it was made for
        self._folder: Path | None = None  # of a router that was loaded
        self._seen = ""  # what its ABOUT was then, by its sha256
        self._known = OrderedDict[bytes, Routing]()  # what `choose` was asked lately, by its sha256
        self._asked = Counter[Frame]()  # system messages, by how many requests came under each
        self._written: Path | None = None  # a temporary folder of the variants, once they have answered
        self._forget: Callable[[], object] = lambda: None  # removes it

    def __reduce__(self) -> NoReturn:
        raise TypeError("a router is neither copied nor pickled; save it, and Router.load the folder")

    @classmethod
    def from_library(
        cls,
        *adapters: str | Path,
        base_model: str | Path | None = None,
        method: str = "proto_route",
        **settings: Any,
    ) -> Router:
        """Loads adapters and the base model that they belong to.

        Args:
            adapters: folders, folders of folders, names in data/library or hub ids (`ID[@REVISION]`);
                without any, data/library is loaded. One list of them is taken, too.
            base_model: `embedded`, a folder or a hub id; None takes the one that the adapters name.
            method: a routed method, by name.
            settings: any other field of `router.settings.Settings`, with the command line's defaults.

        Raises:
            InputError: an adapter or the base model is missing, broken or does not fit, there is no such
                method, a setting is another word or seed than it may be, or settings do not go together.
            ValueError: the method is one of the starter kit's, which give no weights.
        """
        made = load_method(method)
        if not issubclass(made, Method):
            raise ValueError(f"method {method}: expected one that routes, this one is of the starter kit")
        if len(adapters) == 1 and isinstance(adapters[0], (list, tuple)):
            (adapters,) = adapters
            if not adapters:
                raise InputError("adapters: expected at least one, got an empty list")
        if adapters:
            settings["adapters"] = tuple(map(str, adapters))
        settings |= {key: value.item() for key, value in settings.items() if isinstance(value, np.generic)}
        base_model = str(base_model) if isinstance(base_model, Path) else base_model
        if isinstance(template := settings.get("chat_template"), str):
            settings["chat_template"] = Path(template)
        context = Context(Settings(base_model=base_model, **settings))
        check_flags(method, made, context.settings)
        made.check()
        loaded = load_library_and_base(context)
        return cls(made(method, loaded.base, loaded.adapters, context))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        base_model: str | Path | None = None,
        device: Device | Literal["meta"] = "auto",
        dtype: Dtype | None = None,
    ) -> Router:
        """Loads what `save` wrote, or a finished run of proto_route with its variants.

        A saved router needs no adapters and no queries; a finished run needs the adapters that it names.

        Args:
            folder: of a saved router, or the output folder of a run.
            base_model: `embedded`, a folder or a hub id; None takes the one that was used.
            device: `auto`, `cpu`, `cuda`, or `meta` for a saved router whose base model another program has;
                see `read_by`.
            dtype: None takes the one that was used.

        Raises:
            InputError: there is neither, it is damaged or of another format, the base model has other
                weights, or the device or the dtype is another word. Another configuration or tokenizer is
                a warning.
        """
        folder = Path(folder).absolute()  # the working directory may change
        if not (folder / ABOUT).is_file():
            if device == "meta":
                raise InputError(f"{folder}: expected a saved router, of which others have the base model")
            if not (folder / RECORD).is_file():
                raise InputError(f"{folder}: expected a saved router or a finished run, found neither")
            return cls._of_run(folder, base_model, device, dtype)
        seen, about = sha256_of(folder / ABOUT), Saved.read(folder)
        settings = Settings(
            base_model=str(base_model or about.base),
            dtype=dtype or about.dtype,
            device="auto" if device == "meta" else device,
            chat_template=folder / TEMPLATE if TEMPLATE in about.files else None,
            **{key: value for key in SETTINGS if (value := about.settings.get(key)) is not None},
        )
        spread = None if device == "meta" else settings.device_map
        base = load_base(str(settings.base_model), device, settings.dtype, spread)
        _check_base(base, folder, about.base_sha256, about.configuration)
        method = ProtoRoute("proto_route", base, [], Context(settings))
        router = cls(method)
        router.candidates, router.variants = about.candidates, about.variants
        router._centres = np.array(about.centres, np.float64)
        router._firsts = np.zeros(router._centres.shape, bool)
        for row, numbers in zip(router._firsts, about.firsts, strict=True):
            row[numbers] = True
        router._folder, router._seen = folder, seen
        if wrong := changed(folder, about.files):
            raise InputError(
                f"{folder / wrong}: expected the file that was saved with this router, got another or none; "
                "save the router again"
            )
        widths = {module: width for module, (_, width) in method.shapes.items()}
        fits = state.load(folder, base.model.device, base.model.dtype, widths)
        _ = method.template  # read now, from the folder as it is
        router._check_there()
        if about.candidates != [*fits[0].names, BASE_COLUMN]:
            raise InputError(f"{folder / ABOUT}: expected the adapters of {FILE}; save the router again")
        method.fits.update({fitted.framing.frame: fitted for fitted in fits})
        method.known = list(method.fits)
        router._read_templates(folder)
        return router

    @classmethod
    def _of_run(
        cls, folder: Path, base_model: str | Path | None, device: Device, dtype: Dtype | None
    ) -> Router:  # fmt: skip
        run = load_run(folder)
        record = run.record
        if record.method != "proto_route":
            raise InputError(f"{folder}: expected a run of proto_route, got one of {record.method}")
        if record.base is None:
            raise InputError(f"{folder / RECORD}: expected the run's variants, found none; run it again")
        flags = dict(vars(run.settings)) | {"device": device, "dtype": dtype or record.base.dtype}
        named = flags["base_model"] or (record.base.name if Path(record.base.name).is_absolute() else None)
        flags["base_model"] = base_model or (record.located(named) if named and named != EMBEDDED else named)
        flags["chat_template"] = folder / TEMPLATE if TEMPLATE in record.files else None
        for key in ("dataset_filepaths", "output_folder", "engine"):
            del flags[key]
        router = cls.from_library(*map(record.located, flags.pop("adapters")), method="proto_route", **flags)
        _check_base(router._base, folder, record.base.sha256, record.base.configuration)
        if router.candidates != run.names:
            other = sorted(set(router.candidates) ^ set(run.names)) or router.candidates
            raise InputError(f"{folder}: expected the adapters of the run, got others: {', '.join(other)}")
        for adapter in router._method.adapters:
            if not record.adapters[adapter.name].is_of(adapter):
                raise InputError(f"{folder}: {adapter.where} is another one now; run again")
        router._decide(run.weights, run.clusters)
        paths = [folder / VARIANTS / name if name else None for name in folder_names(router.variants)]
        for n, (path, made) in enumerate(zip(paths, record.variants, strict=False)):
            if path and path.exists() and (content_of(path) or None) != made.sha256:
                raise InputError(
                    f"{path}: expected the variant that the run wrote, got another; run it again"
                )
            router.variants[n] = replace(router.variants[n], sha256=made.sha256)
        if all(path.exists() for path in paths if path):  # else nobody can serve them
            router._measure(folder / VARIANTS)
        router._proto.known = [Frame(*frame) for frame in run.evidence.frames] if run.evidence else ()
        router._proto.prepare()  # now, not with the first request
        router._read_templates(folder)
        return router

    def _read_templates(self, folder: Path) -> None:
        """Reads the templates that the variants in a router's or a run's folder bring."""
        for number in range(len(self.variants)):
            if template := brought(self._base.tokenizer, folder / VARIANTS / str(number)):
                self.templates[number] = template

    @property
    def _base(self) -> Base:
        return self._method.base

    @property
    def _proto(self) -> ProtoRoute:
        if not isinstance(self._method, ProtoRoute):
            raise ValueError(f"method {self._method.name}: expected proto_route, which can be saved")
        return self._method

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        return self._base.tokenizer

    @property
    def base_model(self) -> str:
        """The base model's id on the hub, or its folder."""
        return self._base.name

    @_one_at_a_time
    def route(self, texts: Sequence[Prompt]) -> pd.DataFrame:
        """The weights of each text or conversation, which sum to 1: a row for each, a column per candidate.

        Args:
            texts: prompts, or lists of messages, `{"role": ..., "content": ...}`. Weights have the index of a
                Series.

        Raises:
            ValueError: one of them is neither.
        """
        queries = _queries(texts, None)
        routing = self._method.route(queries, self._method.encoded(queries))
        index = texts.index if isinstance(texts, pd.Series) else None
        return pd.DataFrame(routing.weights, index, self.candidates)

    @_one_at_a_time
    def choose(self, texts: Sequence[Prompt]) -> list[Choice]:
        """How each text or conversation is decided, and which of the variants answers it.

        Calibrates nothing: a text in a frame that is not known yet counts as bare, a chat as in the template.
        """
        queries = _queries(texts, None)
        turns = self._proto.turns(queries, new=0, asked=self._asked)
        routing = decided(self._judged([read for reads in turns for read in reads]), turns)
        evidence = routing.evidence
        names = self.candidates
        assert evidence is not None  # proto_route keeps it
        groups = [None] * len(queries)
        if self._centres is not None:
            groups = nearest(routing.weights, self._centres, self._firsts).tolist()
        choices = []
        for row, mix_row, margin, group, (*_, last) in zip(
            routing.weights, mixes(routing.weights), evidence.margin.tolist(), groups, turns, strict=True
        ):
            shares = {names[n]: float(row[n]) for n in np.argsort(-row, kind="stable") if row[n] > 0.005}
            mix = {names[n]: float(mix_row[n]) for n in np.flatnonzero(mix_row[:-1])}
            fits = bool(mix) and (group is None or bool(self.variants[group].weights))
            frame = (last.shared or last.frame).name
            choices.append(Choice(group, shares, margin, margin < LOW_MARGIN, fits, mix, frame))
        return choices

    @property
    def wanted(self) -> Frame | None:
        """A system message that many requests came under and that is no frame yet; None if there is none.

        None, too, once all frames together fill their memory.
        """
        new = next((frame for frame in self._often if frame not in self._proto.known), None)
        return None if self._proto.elsewhere or self._proto.full else new

    @property
    def _often(self) -> list[Frame]:
        return [frame for frame, count in self._asked.most_common() if count >= SHARED]

    @property
    def busy(self) -> list[Frame]:
        """The frames that were calibrated here and that most requests came in, at most FRAMES."""
        return [frame for frame in self._often if frame in self._proto.known][:FRAMES]

    def calibrate(self, frame: Frame) -> None:
        """Makes a frame of a system message; texts that other threads ask about wait for a batch at most."""
        self._asked[frame] = 0  # if it fails, others come first
        fitted = self._proto.learned(frame)
        with self._lock:
            self._proto.fits[frame] = fitted
            self._proto.known = [*self._proto.known, frame]
        self._asked[frame] = SHARED

    @property
    def frames(self) -> list[Frame]:
        """The frames that texts are compared in, of a loaded router in its order."""
        return list(self._proto.known)

    def read_by(self, read: Callable[[Fitted, Rows], Probed]) -> None:
        """Has another program's copy of the base model read what `unread` tells, such as an engine's.

        Args:
            read: gives what `Fitted.probe` would.
        """
        self._proto.elsewhere = read

    @_one_at_a_time
    def unread(self, text: Prompt) -> list[tuple[Frame, tuple[int, ...]]]:
        """The tokens of a text that `choose` needs the base model to read, by frame; none that it knows."""
        (turns,) = self._proto.turns(_queries([text], None), new=0)
        new = [read for read in turns if _key(read) not in self._known]
        parts = [(read.frame, read.ids) for read in new]
        parts += [(read.shared, read.under) for read in new if read.shared]
        return [(frame, tuple(truncated([ids])[0])) for frame, ids in dict.fromkeys(parts)]

    def _judged(self, reads: Sequence[Read]) -> Routing:
        """The routing of what was read; what was read lately, as earlier turns were, is known."""
        keys = list(map(_key, reads))
        every = dict(zip(keys, reads, strict=True))
        if new := {key: read for key, read in every.items() if key not in self._known}:
            routed = self._proto.judged(list(new.values()))
            self._known |= {key: routed.rows(np.array([n])) for n, key in enumerate(new)}
        routing = joined([self._known[key] for key in keys])
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return routing

    @_one_at_a_time
    def fit(self, texts: Sequence[Prompt], n_variants: int | None = None) -> Self:
        """Decides the variants from a sample of the queries to come, such as yesterday's; no labels.

        Args:
            n_variants: how many; None takes what `from_library` was given, or else as few as the sample's
                weights allow. One that is the base model comes to them if there is none, for texts that no
                adapter fits.

        Raises:
            ValueError: the router was loaded from a saved one, which has no adapters to make variants of.
        """
        self._check_adapters()
        queries = _queries(texts, None)
        n_variants = n_variants.item() if isinstance(n_variants, np.generic) else n_variants
        try:
            typed(kinds()["n_variants"], n_variants, strict=True)
        except ValueError as error:
            raise ValueError(f"n_variants: {error}, got {n_variants!r:.40}") from error
        method = self._method
        before, method.known = method.known, ()  # no frames of an earlier sample
        try:
            routing = method.route(queries, method.encoded(queries))
        except BaseException:
            method.known = before
            raise
        method.known = [Frame(*frame) for frame in routing.evidence.frames] if routing.evidence else ()
        many = method.n_variants if n_variants is None else n_variants
        groups = cluster(routing.weights, many, method.settings.seed, method.sharp)
        self._decide(routing.weights, groups)
        return self

    def _check_adapters(self) -> None:
        if self._folder is not None:
            raise ValueError(
                "a saved router has no adapters to make variants of; use from_library, or copy its folder"
            )

    def _decide(self, weights: Array, clusters: Clusters) -> None:
        """Keeps the groups of a sample and one for the base model, which has no folder and costs nothing."""
        self._forget()
        self._written, self.templates = None, {}
        first = firsts(weights, clusters)
        self._centres = with_base(clusters.weights)
        more = len(self._centres) - len(first)  # one that the base model answers, or none
        self._firsts = np.pad(first, ((0, more), (0, 0)))
        self._firsts[len(first) :, -1] = True
        self.variants = decide(self._centres, self.candidates[:-1])

    @_one_at_a_time
    def save(self, folder: str | Path) -> Path:
        """Writes the router and its variants into a folder, which `load` needs beside the base model alone.

        All is written before the first file takes the place of an earlier router's.

        Raises:
            ValueError: `fit` was not called, the method is not proto_route, or the router was loaded from a
                saved one, whose folder can be copied.
            InputError: the folder holds files of these names that no router left there, or the router's
                adapters, another process writes there, a variant is too large for the base model's dtype, or
                an adapter has other weights now.
        """
        folder = Path(folder)
        proto = self._proto
        self._check_adapters()
        if self._centres is None:
            raise ValueError("expected variants to save; call fit with a sample of the queries to come")
        check_apart(
            [("adapter", adapter.folder.path) for adapter in self._method.adapters], folder / VARIANTS
        )
        with alone_in(folder), replacing_router(folder) as work:
            try:
                names = self._method.write_variants(self.variants, work / VARIANTS)
            except OverflowError as error:
                raise InputError(f"a variant's {error}; pass dtype='float32'") from error
            self.variants = hashed(self.variants, names, work / VARIANTS)
            self._measure(work / VARIANTS)
            proto.prepare()
            state.save([proto.fits[frame] for frame in proto.known], work)
            if proto.template.source:
                (work / TEMPLATE).write_text(proto.template.source, "utf-8", newline="")
            base = self._base
            settings = {key: getattr(proto.settings, key) for key in SETTINGS}
            dtype: Any = str(base.model.dtype).removeprefix("torch.")
            Saved(
                FORMAT, own_version(), base.name, base.revision, base.sha256, base.configuration,
                base.name == EMBEDDED_ID and base.revision is None, dtype, self.candidates, settings,
                self.variants, self._centres.tolist(), [np.flatnonzero(row).tolist() for row in self._firsts],
                hashes(work),
            ).write(work)  # fmt: skip
        return folder

    def _measure(self, folder: Path) -> None:
        """Keeps what each of the variants in a folder says to the canary."""
        base = self._base
        measured = list[Variant]()
        rows = padded(encode(base.tokenizer, [CANARY]), base.tokenizer.pad_token_id, base.model.device)
        with applied(base, self._method.settings.apply) as models, torch.inference_mode():
            for variant, name in zip(self.variants, folder_names(self.variants), strict=True):
                model = models.activate(folder / name if name else None)
                measured.append(replace(variant, canary=float(confidence_of(forward(model, *rows))[0])))
        self.variants = measured

    @_one_at_a_time
    def answer(self, texts: Sequence[Prompt], choices: Sequence[Sequence[str]] | None = None) -> list[str]:
        """Answers texts or conversations, in order: with generated text or, given choices, the likeliest.

        Once `fit` or `load` has decided the variants, these answer; before, they are made for the texts at
        hand. They are written to a temporary folder, which goes when the router does; `save` and
        `python -m router.main` keep them.

        Args:
            choices: the choices of each text, at least one each.

        Returns:
            The answers; `unknown` where the model's output was not finite or a text did not fit into memory
            or the model's context.
        """
        queries = _queries(texts, choices)
        if self._centres is None:
            with tempfile.TemporaryDirectory() as work:
                answers = self._method.answer(queries, Path(work)).answers
        else:
            answers, _ = self.answered(queries)
        return [
            answer.text if choices is None or answer.failed else query.choices[int(answer.text)]
            for query, answer in zip(queries, answers, strict=True)
        ]

    def _variants(self) -> Path:
        """The folder of the variants, which are written once."""
        if self._folder is not None:
            self._check_there()
            return self._folder / VARIANTS
        if self._written is None or not self._written.is_dir():  # a cleaner of old files may have come
            folder = Path(tempfile.mkdtemp())
            self._forget = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._method.write_variants(self.variants, folder)
            self._written = folder
        return self._written

    def _check_there(self) -> None:
        """Refuses a loaded router that is gone, or in whose place another one was saved since."""
        folder = cast(Path, self._folder)
        if not is_still(folder / ABOUT, self._seen):
            raise InputError(f"{folder}: this router is gone, or another was saved there; load it again")

    @_one_at_a_time
    def answered(self, queries: Sequence[Query]) -> tuple[list[Answer], list[int]]:
        """The answers as a run has them, in order, and the number of each one's variant.

        Raises:
            ValueError: there are no variants.
            InputError: the router was loaded, and another one was saved in its place since.
        """
        if self._centres is None:
            raise ValueError("expected variants; call fit with a sample of the queries to come")
        method = self._method
        rows = self._method.encoded(queries)
        folder = self._variants()
        routing = method.route(queries, rows)
        labels = nearest(routing.weights, self._centres, self._firsts, method.sharp)
        clusters = Clusters(labels, self._centres)
        folders = folder_names(self.variants)
        decision = Decision(self._base, method.adapters, routing, clusters, self.variants, folders)
        return method.predict(queries, rows, decision, folder), clusters.labels.tolist()


def _check_base(base: Base, folder: Path, sha256: str, configuration: str) -> None:
    """Refuses a base model of other weights than a router's or a run's, and warns of one read otherwise."""
    if base.sha256 != sha256:
        raise InputError(
            f"--base_model {base.name}: expected the weights that {folder} was made for (sha256 "
            f"{sha256[:12]}), got others ({base.sha256[:12]}); pass the base model that was used, or make "
            f"{folder} anew from the adapters"
        )
    if base.configuration != configuration:
        log.warning(
            "%s: the base model's configuration or tokenizer is not the one that this was made with, so it "
            "may choose otherwise", printable(str(folder)),
        )  # fmt: skip


def _key(read: Read) -> bytes:
    """A name of what was read."""
    return hashlib.sha256(repr(read).encode("utf-8", "surrogatepass")).digest()


def _queries(texts: Sequence[Prompt], choices: Sequence[Sequence[str]] | None) -> list[Query]:
    """Queries, numbered from 0."""
    texts = _listed(texts, "a list of texts")
    kind = GENERATION if choices is None else MULTIPLE_CHOICE
    given = [()] * len(texts) if choices is None else choices
    options = [_listed(text_choices, "for each text a list of choices") for text_choices in given]
    if not texts or len(options) != len(texts):
        raise ValueError("expected at least one text, and a list of choices for each or for none")
    queries = []
    for n, (text, text_choices) in enumerate(zip(texts, options, strict=True)):
        text = text.tolist() if isinstance(text, np.ndarray) else text  # as pandas reads a list
        if not isinstance(text, (str, list, tuple)):
            hint = "; put a chat into a list: [messages]" if isinstance(text, Mapping) else ""
            raise InputError(f"text {n + 1}: expected a text or a list of messages, got {text!r:.40}{hint}")
        asked = {"messages": text} if isinstance(text, (list, tuple)) else {"input": text}
        row = {"id": str(n), "eval_type": kind, "answer_choices": text_choices}
        queries.append(query_of(row | asked, f"text {n + 1}"))
    return queries


def _listed(values: Any, what: str) -> list[Any]:
    """The elements of a list, a tuple, an array or a Series."""
    arrays = np.ndarray, pd.Series, pd.Index, pd.api.extensions.ExtensionArray
    if isinstance(values, str) or not isinstance(values, (Sequence, *arrays)):
        hint = "; put it into a list" if isinstance(values, str) else ""
        raise ValueError(f"expected {what}, got a {type(values).__name__}{hint}")
    return [one.item() if isinstance(one, np.generic) else one for one in values]
