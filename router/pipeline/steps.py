"""The steps of a run that routes: load, route, group, write, answer. router/run.py takes them in this order.

A method that routes is one file in router/methods/. It subclasses `Method` and gives each query its weights;
or `Static` and merges all adapters' updates of one module into one; or `PerToken` (per_token.py) and scores a
module's adapters for each token.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from merge.factors import Factors
from merge.folders import write_adapter
from router.constants import COMPETITION, COMPETITION_BASE, TEMPLATE
from router.library.adapters import Adapter, base_of, check_against_base, load_library
from router.model.answer import FAILED, Answer, Rows, cut, cut_at, encode, positions
from router.model.apply import applied, swap_order
from router.model.base import EMBEDDED, EMBEDDED_ID, Base, linear_shapes, load_base
from router.model.frames import Frame
from router.model.template import Template, brought, template_for
from router.pipeline.answering import answered, answered_by_vllm, known_to
from router.pipeline.context import Context
from router.pipeline.model_card import Recipe, write_card
from router.pipeline.result import Decision, Result, Routing
from router.pipeline.served import hashed
from router.queries.submission import GENERATION, MULTIPLE_CHOICE, Query, refuse
from router.routing.clusters import Array, Clusters, cluster
from router.routing.variants import Variant, complete, decide, folder_names, limited, write_variant
from router.settings import Settings
from router.system.errors import InputError
from router.system.files import is_folder
from router.system.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def default_base(settings: Settings, adapters: Sequence[Adapter]) -> str:
    """The base model to load if --base_model is not given: the one that the adapters name.

    Raises:
        InputError: they name several, or none at all.
    """
    if settings.adapters == (COMPETITION,):
        return COMPETITION_BASE
    name = base_of(adapters)
    return EMBEDDED if name.casefold() == EMBEDDED_ID.casefold() else name


class Loaded(NamedTuple):
    """A library and the base model that it belongs to."""

    base: Base
    adapters: list[Adapter]
    left_out: list[str]  # with --skip_bad, why an adapter is not in the library, a line for each


def load(context: Context) -> Loaded:
    """Loads the library, then the base model that it belongs to, and checks that they fit.

    Raises:
        InputError: one of them is missing or broken, or they do not fit.
    """
    settings = context.settings
    bad: list[str] | None = [] if settings.skip_bad else None
    with context.stages("load"):
        adapters = load_library(settings.adapters, bad=bad)
        spec = settings.base_model or default_base(settings, adapters)
        base = load_base(spec, settings.device, settings.dtype, settings.device_map)
        local = spec != EMBEDDED and is_folder(spec)
        adapters = check_against_base(adapters, base.name, local, linear_shapes(base.model), bad)
    for reason in bad or []:
        log.warning("left out: %s", reason)
    return Loaded(base, adapters, bad or [])


def encoded(template: Template, queries: Sequence[Query], most: int | None) -> list[list[int]]:
    """The token ids of each query's prompt, `most` of them at most; a conversation's is in the template.

    Raises:
        InputError: the template does not take conversations, each of which is named, or what a user says.
    """
    prompts = iter(encode(template.tokenizer, [q.input for q in queries if not q.messages]))
    rows, problems = [], []
    for query in queries:
        try:
            rows.append(template.ids(query.conversation, query.id) if query.messages else next(prompts))
        except InputError as error:
            problems.append(str(error))
    refuse(problems)
    if any(query.messages for query in queries):
        _ = template.frame
    return [cut(row, most, bool(q.messages)) for row, q in zip(rows, queries, strict=True)]


class Method(ABC):
    """A method that gives every query its weights; clusters and variants do the rest.

    Args:
        name: as `-m` takes it.
        base: the loaded base model.
        adapters: the library.
        context: what the run has.

    Attributes:
        shapes: (d_out, d_in) of the base model's linear layers.
        known: the frames in which a query is compared, whichever others come with it; beside bare prompts,
            the template's and that of --frame.
        sharp: whether weights tell how likely each candidate is right, so that one may answer alone; else a
            query is answered with the mix that they are.
    """

    known: Sequence[Frame] = ()
    sharp = False

    def __init__(
        self, name: str, base: Base, adapters: Sequence[Adapter], context: Context | None = None
    ) -> None:
        self.name, self.base, self.adapters = name, base, list(adapters)
        self.context = context or Context()
        self.settings, self.stages = self.context.settings, self.context.stages
        self.tokenizer = base.tokenizer
        self.shapes = linear_shapes(base.model)

    @classmethod  # noqa: B027
    def check(cls) -> None:
        """Refuses a run for which something is missing, before anything is loaded."""

    @classmethod
    def reads(cls, adapters: Sequence[Adapter], settings: Settings) -> list[Path]:
        """The files on which the routing depends beside weights, prompts and templates: here, none."""
        return []

    @abstractmethod
    def route(self, queries: Sequence[Query], rows: Rows) -> Routing:
        """The weights of each query, with evidence if the method keeps any."""

    @property
    def n_variants(self) -> int | None:
        """How many variants to make; None makes as few as the weights allow."""
        return self.settings.n_variants

    @property
    def recipe(self) -> Recipe:
        """The method as a model card describes it."""
        about = " ".join((type(self).__doc__ or "").partition("\n\n")[0].split())
        return Recipe(self.name, about, self.settings)

    @cached_property
    def template(self) -> Template:
        """The template of conversations: --chat_template, the base model's own, or an adapter's."""
        folders = (adapter.folder.path for adapter in self.adapters)
        return template_for(self.tokenizer, self.settings.chat_template, folders)

    def encoded(self, queries: Sequence[Query]) -> list[list[int]]:
        """The token ids of each query's prompt, cut to --max_seq_len; a conversation's is in the template.

        Raises:
            InputError: the template refuses a conversation.
        """
        return encoded(self.template, queries, self.settings.max_seq_len)

    def kept(self, name: str, count: int) -> Routing | None:
        """The routing of `count` queries, if the journal kept one; the same in all processes."""
        journal = self.context.journal
        if journal is None:
            return None
        return self.context.processes.decided(lambda: journal.kept(name, count))

    def keep(self, name: str, routing: Routing) -> None:
        """Has the journal keep a routing, if there is one."""
        if self.context.journal is not None:
            self.context.journal.keep(name, routing)

    def write_variants(self, variants: Sequence[Variant], folder: Path) -> list[str | None]:
        """Writes each variant as a PEFT folder, named by its number; returns the names.

        A variant that is the plain base model has no folder and the name None. Each brings the chat
        template of most of its weight, if that is not the shared one.
        """
        names = folder_names(variants)
        pairs = zip(names, progress(variants, desc="variants", unit="variant"), strict=True)
        for name, variant in pairs:
            if name:
                path = folder / name
                rank = self.settings.variant_rank
                write_variant(path, variant, self.adapters, self.base, self.shapes, rank)
                write_card(path, self.recipe, self.base, self.adapters, variant)
                self._bring_template(path, variant)
        return names

    def _bring_template(self, folder: Path, variant: Variant) -> None:
        """Has a variant bring the chat template of most of its weight, if that is not the shared one."""
        shares: dict[str | None, float] = {None: variant.base}  # of the one that all share
        for adapter in self.adapters:
            if weight := variant.weights.get(adapter.name):
                template = brought(self.tokenizer, adapter.folder.path)
                source = template.source if template and template.jinja != self.template.jinja else None
                shares[source] = shares.get(source, 0.0) + weight
        most = max(shares, key=lambda source: round(shares[source], 6))  # of equal ones the shared one
        (folder / TEMPLATE).unlink(missing_ok=True)  # of a variant that was here before
        if most:
            (folder / TEMPLATE).write_text(most, "utf-8")

    def predict(self, queries: Sequence[Query], rows: Rows, decision: Decision, folder: Path) -> list[Answer]:
        """Answers each query with its variant, in order; what another process answers has failed.

        A conversation is written in the template that its variant's folder brings, see `write_variants`. Many
        adapters answer in no other. One that refuses the conversation is not used.

        Args:
            rows: the prompts in the template that all share.
            folder: holds the variants' folders.
        """
        labels = decision.clusters.labels
        context = self.context
        paths = [folder / name if name else None for name in decision.folders]
        variants = [paths[n] for n in labels]
        talks = {path for path, query in zip(variants, queries, strict=True) if path and query.messages}
        templates = {path: brought(self.tokenizer, path) for path in talks}
        brought_by = [templates.get(path) if path else None for path in variants]
        prompts, ends = list(rows), self._ends(queries)
        for n, (query, template) in enumerate(zip(queries, brought_by, strict=True)):
            if query.messages and template and (ids := template.tried(query.conversation, query.id)):
                prompts[n], ends[n] = cut(ids, self.settings.max_seq_len, ends=True), template.end
        answers = [FAILED] * len(queries)
        known = known_to(context)
        with progress(total=sum(map(len, prompts)), desc="predict", unit="tok") as bar:
            if self.settings.engine == "vllm":
                answers = answered_by_vllm(self.base, queries, prompts, variants, context, bar.update, ends)
                return self._ended(queries, answers, brought_by)
            with applied(self.base, self.settings.apply) as models:
                kinds = MULTIPLE_CHOICE, GENERATION
                turns = [{kind} for kind in kinds] if context.deadline else [set(kinds)]
                for turn, n in product(turns, swap_order(paths)):  # in short time, what costs least first
                    members = [
                        m for m in np.flatnonzero(labels == n).tolist() if queries[m].eval_type in turn
                    ]
                    if not members:  # a variant that was made for other queries
                        continue
                    part, asked = [queries[m] for m in members], [prompts[m] for m in members]
                    over = context.deadline and context.deadline.over()
                    idle = over or all(query in known for query in part)  # nothing is asked
                    model = self.base.model if idle else models.activate(paths[n])
                    part_answers = answered(
                        model, self.tokenizer, part, asked, context, bar.update, [ends[m] for m in members]
                    )
                    for m, new in zip(members, part_answers, strict=True):
                        answers[m] = new
        return self._ended(queries, answers, brought_by)

    def _ends(self, queries: Sequence[Query]) -> list[int | None]:
        """The token that ends an answer to each query in the template that all share; None for a prompt."""
        return [self.template.end if query.messages else None for query in queries]

    def _ended(
        self, queries: Sequence[Query], answers: Sequence[Answer], templates: Sequence[Template | None]
    ) -> list[Answer]:
        """Answers to conversations up to a template's end of turn, where the model has another one.

        One that states several knows its own: of gpt-oss each part of an answer ends as a message of the user
        does.
        """
        ended = list(answers)
        stated = getattr(self.base.model.generation_config, "eos_token_id", None)
        if isinstance(stated, (list, tuple)) and len(stated) > 1:
            return ended
        for n, (query, second) in enumerate(zip(queries, templates, strict=True)):
            for template in (self.template, second) if query.messages else ():
                if template and template.end in ended[n].ids:
                    ended[n] = cut_at(self.tokenizer, ended[n], template.end)
        return ended

    def answer(self, queries: Sequence[Query], folder: Path) -> Result:
        """Takes all steps at once; writes the variants into a folder."""
        rows, routing = route(self, queries)
        clusters, variants = group(self, routing)
        decision = write(self, routing, clusters, variants, folder)
        return answer(self, queries, rows, decision, folder)


def route(method: Method, queries: Sequence[Query]) -> tuple[list[list[int]], Routing]:
    """Tokenises each prompt, once, and weighs the candidates; what the journal kept is not routed again."""
    rows = method.encoded(queries)
    for shorter in _cuts(rows, method.settings, method.base.model):
        log.warning("%s", shorter)
    if (routing := method.kept("routing", len(queries))) is None:
        routing = method.route(queries, rows)
        shape = len(queries), len(method.adapters) + 1
        weights = np.asarray(getattr(routing, "weights", None))
        sound = weights.shape == shape and bool((weights >= 0).all())
        if not sound or not np.allclose(weights.sum(1), 1, atol=1e-3):
            raise InputError(
                f"-m {method.name}: expected a Routing with weights of shape {shape}, none below 0, which "
                f"sum to 1 in each row; got shape {weights.shape}, or other values"
            )
        method.keep("routing", routing)
    return rows, routing


def group(method: Method, routing: Routing) -> tuple[Clusters, list[Variant]]:
    """Groups queries of similar weights, and decides the variant of each group."""
    with method.stages("clusters"):
        clusters = method.context.processes.decided(
            lambda: cluster(routing.weights, method.n_variants, method.settings.seed, method.sharp)
        )
        return clusters, decide(clusters.weights, [adapter.name for adapter in method.adapters])


def write(
    method: Method, routing: Routing, clusters: Clusters, variants: list[Variant], folder: Path
) -> Decision:  # fmt: skip
    """Writes the variants into a folder.

    Raises:
        InputError: one of them is too large for the base model's dtype.
    """
    with method.stages("variants"):
        try:
            folders = method.context.processes.decided(lambda: method.write_variants(variants, folder))
        except OverflowError as error:
            raise InputError(f"a variant's {error}; pass --dtype float32, and --fresh") from error
        made = hashed(variants, folders, folder)
    return Decision(method.base, method.adapters, routing, clusters, made, folders)


def answer(
    method: Method, queries: Sequence[Query], rows: Rows, decision: Decision, folder: Path
) -> Result:  # fmt: skip
    """Answers each query with its variant, out of the folder that holds them."""
    deadline, processes = method.context.deadline, method.context.processes
    with method.stages("predict"):
        parts = processes.gathered(method.predict(queries, rows, decision, folder))
    answers = _joined(queries, parts)
    if deadline:  # another process may have answered the same query
        left = set(chain.from_iterable(processes.gathered(deadline.unanswered)))
        pairs = zip(queries, answers, strict=True)
        deadline.unanswered = [query for query, answer in pairs if answer.failed and query in left]
    return Result(answers, decision)


def _joined(queries: Sequence[Query], parts: Sequence[Sequence[Answer]]) -> list[Answer]:
    """The answers of all processes; the same query has the same answer, whoever answered it first."""
    known: dict[Query, Answer] = {}
    for query, *answers in zip(queries, *parts, strict=True):
        for answer in answers:
            if not answer.failed:
                known.setdefault(query, answer)
    return [known.get(query, FAILED) for query in queries]


def _cuts(rows: Rows, settings: Settings, model: PreTrainedModel) -> Iterator[str]:
    """Warnings: how many prompts are cut, and how many are longer than the base model's context."""
    limit = settings.max_seq_len
    if limit and (long := sum(len(row) >= limit for row in rows)):
        yield (
            f"{long} of {len(rows)} prompts reach --max_seq_len {limit}; what comes after, of a chat the "
            "middle, is not read"
        )
    context: int = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 0
    ends = context == positions(model)  # it cannot go beyond; the last new token is not read
    room = max(1, context + 1 - settings.max_gen_len) if ends else context
    if room and (long := sum(len(row) > room for row in rows)):
        why = "leaves room for, so answers are shorter, or missing" if ends else "was made for"
        yield (
            f"{long} of {len(rows)} prompts have more than the {room} tokens that the base model {why}; "
            f"--max_seq_len {room} reads the start of each alone, of a chat both ends"
        )


def evenly(queries: Sequence[Query], adapters: Sequence[Adapter]) -> Routing:
    """The same weight for every adapter, none for the base model."""
    return without_base(np.full((len(queries), len(adapters)), 1.0 / len(adapters)))


def without_base(weights: Array) -> Routing:
    """The routing by the adapters' weights, (queries, adapters); the base model has none."""
    return Routing(np.column_stack([weights, np.zeros(len(weights))]))


def largest(values: Array, k: int) -> NDArray[np.bool_]:
    """Which are among the k largest of their row, (queries, adapters); of equal ones the first.

    Example:
        >>> largest(np.array([[1.0, 3.0, 3.0, 2.0]]), 2).tolist()
        [[False, True, True, False]]
    """
    return np.asarray((-values).argsort(1, kind="stable").argsort(1) < k)


class Static(Method):
    """A method that merges all adapters into one variant, whatever the queries.

    An adapter without an update for a module is absent there: `combine` gets no zero in its place, so
    means and votes are among the adapters that change the module.
    """

    @abstractmethod
    def combine(self, module: str, updates: list[Factors]) -> Factors:
        """Merges the updates of one module, one from each adapter that changes it; there is at least one.

        The result must not depend on the updates' order beyond rounding.
        """

    def route(self, queries: Sequence[Query], rows: Rows) -> Routing:
        """Gives every adapter the same weight, hence one variant; the mathematics is in `combine`."""
        return evenly(queries, self.adapters)

    def write_variants(self, variants: Sequence[Variant], folder: Path) -> list[str | None]:
        """Writes the one variant, number 0, as a PEFT folder in the base model's dtype.

        Besides what is merged already, one module of all adapters is in memory at a time.
        """
        merged = {}
        rank = self.settings.variant_rank
        for module in self.shapes:
            owners = [adapter for adapter in self.adapters if module in adapter.folder.shapes]
            if owners:
                update = self.combine(module, [adapter.read(module) for adapter in owners])
                update = limited(update, rank)
                merged[module] = Factors(update.a.float(), update.b.float())
        for adapter in self.adapters:
            adapter.check_unchanged()
        updates = complete(merged, self.shapes)
        base = self.base
        write_adapter(folder / "0", updates, base.name, base.revision, base.model.dtype, rank)
        write_card(folder / "0", self.recipe, base, self.adapters)
        self._bring_template(folder / "0", variants[0])
        return ["0"]
