"""Has queries answered: what the journal has is not asked again, and what must end in time is cut.

Here alone the model's batches meet the journal, the deadline, the other processes and the bar.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from router.model.answer import FAILED, NO_ROOM, Answer, Done, answer, batched
from router.model.base import Base
from router.pipeline.context import Context
from router.queries.submission import MULTIPLE_CHOICE, Query
from router.system.errors import printable

log = logging.getLogger(__name__)
Rows = Sequence[Sequence[int]]  # token ids of each query's prompt


def answered(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Query],
    rows: Rows,
    context: Context,
    bar: Callable[[int], object] = lambda tokens: None,
) -> list[Answer]:
    """Answers queries in order, with whichever adapter is active.

    A query that cannot be answered has failed, and a warning names it. So has one that another process
    answers, and one that is left out for want of time.

    Args:
        bar: told how many tokens of prompts are done.
    """
    deadline, processes, settings = context.deadline, context.processes, context.settings
    known, options, most = _known(context), _options(queries), settings.max_gen_len
    batches, left_out = batched(model, tokenizer, rows, options, most, settings.batch_size)
    for n, why in left_out.items():
        if not processes.rank:
            warn(queries[n], why)
    mine = [batch for batch in batches if processes.takes(batch.tokens)]
    todo = [batch for batch in mine if any(queries[n] not in known for n in batch.numbers)]
    waiting = {n for batch in todo for n in batch.numbers}
    elsewhere = sum(len(row) for n, row in enumerate(rows) if n not in waiting)
    if elsewhere:
        bar(elsewhere)
    if deadline:
        deadline.skip(elsewhere)
    for done in answer(
        model, tokenizer, rows, options, todo, max_new_tokens=most, scoring=settings.scoring,
        allowed=(lambda: deadline.new_tokens(most)) if deadline else None,
    ):  # fmt: skip
        tokens = _keep(done, queries, rows, known)
        bar(tokens)
        if deadline:
            deadline.note(tokens, done.share)
        waiting -= set(done.numbers)
    if deadline:
        deadline.unanswered += sum(queries[n] not in known for n in waiting)
    return [known.get(query, FAILED) for query in queries]


def answered_by_vllm(
    base: Base,
    queries: Sequence[Query],
    rows: Rows,
    variants: Sequence[Path | None],
    context: Context,
    bar: Callable[[int], object] = lambda tokens: None,
) -> list[Answer]:
    """As `answered`, by vLLM, each query with the adapter in a folder; None is the base model."""
    from router.engines.vllm import answer as ask

    known, settings = _known(context), context.settings
    asked = list({query: n for n, query in enumerate(queries) if query not in known}.values())
    bar(sum(map(len, rows)) - sum(len(rows[n]) for n in asked))
    for done in ask(
        base, rows, _options(queries), variants, asked, scoring=settings.scoring,
        max_new_tokens=settings.max_gen_len,
    ):  # fmt: skip
        bar(_keep(done, queries, rows, known))
    return [known[query] for query in queries]


def _known(context: Context) -> MutableMapping[Query, Answer]:
    """The answers so far; the journal, if there is one, keeps what is added."""
    return {} if context.journal is None else context.journal


def _options(queries: Sequence[Query]) -> list[tuple[str, ...]]:
    """The choices of each query; none where text is to be written, whatever the query has."""
    return [query.choices if query.eval_type == MULTIPLE_CHOICE else () for query in queries]


def _keep(
    done: Done, queries: Sequence[Query], rows: Rows, known: MutableMapping[Query, Answer]
) -> int:  # fmt: skip
    """Keeps the answers of a batch and warns of what has none; returns the tokens of its prompts."""
    for n, found in zip(done.numbers, done.answers, strict=True):
        if found.failed:
            warn(queries[n], done.why)
        if done.why != NO_ROOM:  # else there may be more memory next time
            known.setdefault(queries[n], found)  # the same query has the same answer
    return sum(len(rows[n]) for n in done.numbers)


def warn(query: Query, why: str) -> None:
    """Says that a query has no answer. Its id and the reason may be a stranger's text."""
    log.warning("%s", printable(f"query {query.id}: {why}, so it has no answer"))
