"""The routed pipeline: route, cluster, write variants, answer.

A method that routes is one file in router/methods/. It subclasses `Routed` and gives each query its weights;
or `Static` and merges all adapters' updates of one module into one; or `PerToken` (router/per_token.py) and
scores a module's adapters for each token.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge.factors import Factors
from merge.folders import write_adapter
from router.constants import COMPETITION, COMPETITION_BASE
from router.errors import InputError
from router.files import is_folder, remove_ours, work_folder
from router.kit import Merges
from router.library.adapters import Adapter, base_of, check_against_base, load_library
from router.model.answer import FAILED, Answer, positions
from router.model.apply import applied, swap_order
from router.model.base import EMBEDDED, EMBEDDED_ID, Base, linear_shapes, load_base
from router.progress import progress
from router.result import Decision, Result, Routing
from router.routing.clusters import Array, cluster
from router.routing.model_card import Recipe, write_card
from router.routing.variants import (
    Variant,
    complete,
    decide,
    folder_names,
    limited,
    replace_variants,
    write_variant,
)
from router.settings import Settings
from router.submission import Query

log = logging.getLogger(__name__)

WORK = ".variants."  # how the name of the folder begins in which variants are written


def default_base(settings: Settings, adapters: Sequence[Adapter]) -> str:
    """The base model to load if --base_model is not given: the one that the adapters name.

    Raises:
        InputError: they name several, or none at all.
    """
    if settings.adapters == (COMPETITION,):
        return COMPETITION_BASE
    name = base_of(adapters)
    return EMBEDDED if name.casefold() == EMBEDDED_ID.casefold() else name


class Routed(Merges):
    """A method that gives every query its weights; clusters and variants do the rest.

    Attributes, after `merge`:
        base: the loaded base model.
        adapters: the library.
        shapes: (d_out, d_in) of the base model's linear layers.
        left_out: with --skip_bad, why an adapter is not in the library, a line for each.
    """

    base: Base
    adapters: list[Adapter]
    shapes: dict[str, tuple[int, int]]
    left_out: Sequence[str] = ()

    def merge(self) -> Any:
        """Loads the library, then the base model that it belongs to, and checks that they fit."""
        bad: list[str] | None = [] if self.settings.skip_bad else None
        with self.stages("load"):
            adapters = load_library(self.settings.adapters, bad=bad)
            spec, how = self.settings.base_model or default_base(self.settings, adapters), self.settings
            self.attach(load_base(spec, how.device, how.dtype, how.device_map), adapters)
            local = spec != EMBEDDED and is_folder(spec)
            self.adapters = check_against_base(adapters, self.base.name, local, self.shapes, bad)
        self.left_out = bad or []
        for reason in self.left_out:
            log.warning("left out: %s", reason)
        return self.base.model

    def attach(self, base: Base, adapters: Sequence[Adapter]) -> None:
        """Takes a base model and a library that are loaded already, in place of `merge`."""
        self.base, self.adapters = base, list(adapters)
        self.base_model, self.tokenizer = base.model, base.tokenizer
        self.shapes = linear_shapes(base.model)

    @abstractmethod
    def route(self, queries: Sequence[Query], rows: Sequence[Sequence[int]]) -> Routing:
        """The weights of each query, with evidence if the method keeps any.

        Args:
            rows: token ids of each query's prompt.
        """

    @property
    def n_variants(self) -> int | None:
        """How many variants to make; None makes as few as the weights allow."""
        return self.settings.n_variants

    @property
    def recipe(self) -> Recipe:
        """What a model card says about the method."""
        about = " ".join((type(self).__doc__ or "").partition("\n\n")[0].split())
        return Recipe(self.get_name(), about, self.settings)

    def answer(self, queries: Sequence[Query], folder: Path | None = None) -> Result:
        """Routes, clusters, writes variants and answers, in this order."""
        with self.answering(queries, folder) as result:
            return result

    @contextmanager
    def answering(self, queries: Sequence[Query], folder: Path | None = None) -> Iterator[Result]:
        """As `answer`; the variants replace earlier ones once the block has ended without an error."""
        output, rows = folder or self.settings.output_folder, self.encoded(queries)
        for cut in _cuts(rows, self.prompt_tokens, self.new_tokens, self.base.model):
            log.warning("%s", cut)
        routing = self._routing(queries, rows)
        with self.stages("clusters"):
            clusters = self.processes.decided(
                lambda: cluster(routing.weights, self.n_variants, self.settings.seed)
            )
            variants = decide(clusters.weights, [adapter.name for adapter in self.adapters])
        work = self.processes.decided(lambda: work_folder(output, WORK))
        try:
            with self.stages("variants"):
                try:
                    folders = self.processes.decided(lambda: self.write_variants(variants, work))
                except OverflowError as error:
                    raise InputError(f"a variant's {error}; pass --dtype float32") from error
            decision = Decision(self.base, self.adapters, routing, clusters, variants, folders)
            if self.deadline:
                used = sum(folders[n] is not None for n in set(clusters.labels.tolist()))
                self.deadline.begin(sum(map(len, rows)), used)
            with self.stages("predict"):
                parts = self.processes.gathered(self.predict(queries, rows, decision, work))
            if self.deadline and self.deadline.to_base:
                decision = decision.with_base(self.deadline.to_base)
            yield Result(_joined(queries, parts), decision)
            if not self.processes.rank:
                replace_variants(work, output)
        finally:
            if not self.processes.rank:
                remove_ours(work)

    def _routing(self, queries: Sequence[Query], rows: Sequence[Sequence[int]]) -> Routing:
        """The routing that the journal kept, or else a new one, which it keeps."""
        if kept := self.kept("routing", len(queries)):
            return kept
        routing = self.route(queries, rows)
        if self.journal is not None:
            self.journal.keep("routing", routing)
        return routing

    def kept(self, name: str, count: int) -> Routing | None:
        """The routing of so many queries, if the journal kept one; the same in all processes."""
        journal = self.journal
        return None if journal is None else self.processes.decided(lambda: journal.kept(name, count))

    def _answer(self, queries: Sequence[Query]) -> list[Answer]:
        """The kit's two calls route the batch that they are given."""
        return self.answer(queries).answers

    def write_variants(self, variants: Sequence[Variant], folder: Path) -> list[str | None]:
        """Writes each variant as a PEFT folder, named by its number; returns the names.

        A variant that is the plain base model has no folder and the name None.
        """
        names = folder_names(variants)
        pairs = zip(names, progress(variants, desc="variants", unit="variant"), strict=True)
        for name, variant in pairs:
            if name:
                path, rank = folder / name, self.settings.variant_rank
                write_variant(path, variant, self.adapters, self.base, self.shapes, rank)
                write_card(path, self.recipe, self.base, self.adapters, variant)
        return names

    def predict(
        self,
        queries: Sequence[Query],
        rows: Sequence[Sequence[int]],
        decision: Decision,
        folder: Path,
    ) -> list[Answer]:
        """Answers each query with its variant, in the order of the queries; `FAILED` is another process's.

        Args:
            rows: token ids of each query's prompt.
            folder: holds the variants' folders.
        """
        answers: dict[int, Answer] = {}
        rest: list[int] = []
        paths = [folder / name if name else None for name in decision.folders]
        if self.settings.engine != "transformers":
            return self._predict_elsewhere(queries, rows, [paths[n] for n in decision.clusters.labels])
        with (
            progress(total=sum(map(len, rows)), desc="predict", unit="tok") as bar,
            applied(self.base, self.settings.apply) as models,
        ):
            for n in swap_order(paths):
                members = np.flatnonzero(decision.clusters.labels == n).tolist()
                if not members:  # a variant that was made for other queries
                    continue
                if paths[n] and self._spares([rows[m] for m in members]):
                    rest += members
                    continue
                with self.deadline.applying() if self.deadline and paths[n] else nullcontext():
                    model = models.activate(paths[n])
                part = self.answer_with(
                    model, [queries[m] for m in members], [rows[m] for m in members], bar.update
                )
                answers.update(zip(members, part, strict=True))
            if self.deadline and rest:
                base = models.activate(None)
                new = [n for n in rest if self.journal is None or queries[n] not in self.journal]
                part = self.answer_with(
                    base, [queries[n] for n in rest], [rows[n] for n in rest], bar.update, keep=False
                )
                answers.update(zip(rest, part, strict=True))
                self.deadline.to_base = [n for n in new if not answers[n].failed]
        return [answers[n] for n in range(len(queries))]

    def _spares(self, rows: Sequence[Sequence[int]]) -> bool:
        """Whether time is too short to apply a variant for these prompts; several processes apply all."""
        if self.deadline is None or self.processes.count > 1:
            return False
        return self.deadline.spares(sum(map(len, rows)), self.new_tokens)

    def _predict_elsewhere(
        self, queries: Sequence[Query], rows: Sequence[Sequence[int]], variants: Sequence[Path | None]
    ) -> list[Answer]:
        """Has vLLM answer each query with its variant."""
        settings = self.settings
        how: dict[str, Any] = {
            "scoring": settings.scoring, "journal": self.journal,
            "max_new_tokens": self.new_tokens,
        }  # fmt: skip
        with progress(total=sum(map(len, rows)), desc="predict", unit="tok") as bar:
            from router.engines import vllm  # needs vLLM

            return vllm.answer(self.base, queries, rows, variants, progress=bar.update, **how)


def _joined(queries: Sequence[Query], parts: Sequence[Sequence[Answer]]) -> list[Answer]:
    """The answers of all processes; the same query has the same answer, whoever answered it first."""
    found: dict[Query, Answer] = {}
    for query, *answers in zip(queries, *parts, strict=True):
        for answer in answers:
            if not answer.failed:
                found.setdefault(query, answer)
    return [found.get(query, FAILED) for query in queries]


def _cuts(rows: Sequence[Sequence[int]], limit: int | None, new: int, model: Any) -> Iterator[str]:
    """What is not read of long prompts, and which are longer than the base model's context.

    Args:
        limit: most tokens of a prompt; None keeps all.
        new: most tokens of an answer.
    """
    if limit and (long := sum(len(row) >= limit for row in rows)):
        yield f"{long} of {len(rows)} prompts reach --max_seq_len {limit}; what comes after is not read"
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context == positions(model):  # it cannot go beyond; the last new token is not read
        room = max(1, context + 1 - new)
        if long := sum(len(row) > room for row in rows):
            yield (
                f"{long} of {len(rows)} prompts leave no room for {new} new tokens in the {context} that the "
                f"base model can read, so answers are shorter, or missing; --max_seq_len {room} reads the "
                "start of each alone"
            )
    elif context and (long := sum(len(row) > context for row in rows)):
        yield (
            f"{long} of {len(rows)} prompts have more than the {context} tokens that the base model was made "
            f"for; --max_seq_len {context} reads the start of each alone"
        )


def evenly(queries: Sequence[Query], adapters: Sequence[Adapter]) -> Routing:
    """The same weight for every adapter, none for the base model."""
    weights = np.zeros((len(queries), len(adapters) + 1))
    weights[:, :-1] = 1.0 / len(adapters)
    return Routing(weights)


def largest(values: Array, k: int) -> NDArray[np.bool_]:
    """Which are among the k largest of their row, (queries, adapters); of equal ones the first.

    Example:
        >>> largest(np.array([[1.0, 3.0, 3.0, 2.0]]), 2).tolist()
        [[False, True, True, False]]
    """
    return np.asarray((-values).argsort(1, kind="stable").argsort(1) < k)


class Static(Routed):
    """A method that merges all adapters into one variant, whatever the queries.

    An adapter without an update for a module is absent there: `combine` gets no zero in its place, so
    means and votes are among the adapters that change the module.
    """

    @abstractmethod
    def combine(self, module: str, updates: list[Factors]) -> Factors:
        """Merges the updates of one module, one from each adapter that changes it; there is at least one.

        The result must not depend on the updates' order beyond rounding.
        """

    def route(self, queries: Sequence[Query], rows: Sequence[Sequence[int]]) -> Routing:
        """Gives every adapter the same weight, hence one variant; the mathematics is in `combine`."""
        return evenly(queries, self.adapters)

    def write_variants(self, variants: Sequence[Variant], folder: Path) -> list[str | None]:
        """Writes the one variant, number 0, as a PEFT folder in the base model's dtype.

        Besides what is merged already, one module of all adapters is in memory at a time.
        """
        merged, rank = {}, self.settings.variant_rank
        for module in self.shapes:
            owners = [adapter for adapter in self.adapters if module in adapter.folder.shapes]
            if owners:
                update = self.combine(module, [adapter.read(module) for adapter in owners])
                update = limited(update, rank)
                merged[module] = Factors(update.a.float(), update.b.float())
        updates, base = complete(merged, self.shapes), self.base
        write_adapter(folder / "0", updates, base.name, base.revision, base.model.dtype, rank)
        write_card(folder / "0", self.recipe, base, self.adapters)
        return ["0"]
