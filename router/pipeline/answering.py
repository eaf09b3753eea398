"""Has queries answered: what the journal has is not asked again, and past the deadline nothing is.

Here alone the model's batches meet the journal, the deadline, the other processes and the bar.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from router.model.answer import FAILED, Answer, Done, Rows, Tails, answer, batched, endings
from router.model.base import Base
from router.pipeline.context import Context
from router.queries.submission import MULTIPLE_CHOICE, Query
from router.system.errors import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Bar = Callable[[int], object]  # told how many tokens of prompts are done


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Query],
    rows: Rows,
    context: Context,
    bar: Bar = lambda tokens: None,
    ends: Sequence[int | None] | None = None,
) -> list[Answer]:
    """Answers queries in order, with whichever adapter is active.

    A query that cannot be answered has failed, and a warning names it. So has one that another process
    answers, and one that is left out for want of time.

    Args:
        ends: the token that ends a choice of each query; None is the tokenizer's end-of-sequence token.
    """
    processes = context.processes
    settings = context.settings
    known = known_to(context)
    tails, most = _tails(tokenizer, queries, ends), settings.max_gen_len
    batches, left_out = batched(model, rows, tails, most, settings.batch_size)
    for n, why in left_out.items():
        if not processes.rank:
            warn(queries[n], why)
    mine = [batch for batch in batches if processes.takes(batch.tokens)]
    todo = [batch for batch in mine if any(queries[n] not in known for n in batch.numbers)]
    if context.deadline:  # what costs least first, so that most are answered in time
        todo.sort(key=lambda batch: (not batch.chooses, batch.tokens / len(batch.numbers)))
    asked = {n for batch in todo for n in batch.numbers}
    done = answer(model, tokenizer, rows, tails, todo, max_new_tokens=most, scoring=settings.scoring)
    return kept(done, queries, rows, asked, context, bar)


def answered_by_vllm(
    base: Base,
    queries: Sequence[Query],
    rows: Rows,
    variants: Sequence[Path | None],
    context: Context,
    bar: Bar = lambda tokens: None,
    ends: Sequence[int | None] | None = None,
) -> list[Answer]:
    """As `answered`, by vLLM, each query with the adapter in a folder; None is the base model."""
    from router.model.vllm import answer as ask

    known, settings = known_to(context), context.settings
    asked = [n for n, query in enumerate(queries) if query not in known]
    done = ask(
        base, rows, _tails(base.tokenizer, queries, ends), variants, asked, scoring=settings.scoring,
        max_new_tokens=settings.max_gen_len,
    )  # fmt: skip
    return kept(done, queries, rows, set(asked), context, bar)


def known_to(context: Context) -> MutableMapping[Query, Answer]:
    """The answers so far; the journal, if there is one, keeps what is added."""
    return {} if context.journal is None else context.journal


def choices_of(queries: Sequence[Query]) -> list[tuple[str, ...]]:
    """The choices of each query; none where text is to be written, whatever the query has."""
    return [query.choices if query.eval_type == MULTIPLE_CHOICE else () for query in queries]


def _tails(
    tokenizer: PreTrainedTokenizerBase, queries: Sequence[Query], ends: Sequence[int | None] | None
) -> Tails:
    """The choices of each query as token ids."""
    pairs = zip(choices_of(queries), ends or [None] * len(queries), strict=True)
    return [endings(tokenizer, options, end) for options, end in pairs]


def kept(
    batches: Iterator[Done],
    queries: Sequence[Query],
    rows: Rows,
    asked: set[int],
    context: Context,
    bar: Bar = lambda tokens: None,
) -> list[Answer]:
    """Keeps the answers of batches as they are finished, until the deadline; returns those to all queries.

    A batch is answered when it is taken. What failed is not kept, since there may be more memory next time.

    Args:
        asked: the numbers of the queries in the batches.
    """
    bar(sum(len(row) for n, row in enumerate(rows) if n not in asked))
    left, known = set(asked), known_to(context)
    while not (context.deadline and context.deadline.over()) and (done := next(batches, None)):
        for n, outcome in zip(done.numbers, done.answers, strict=True):
            if outcome.failed:
                warn(queries[n], done.why)
            else:
                known.setdefault(queries[n], outcome)  # the same query has the same answer
        left.difference_update(done.numbers)
        bar(sum(len(rows[n]) for n in done.numbers))
    if context.deadline:
        context.deadline.unanswered += [queries[n] for n in left if queries[n] not in known]
    return [known.get(query, FAILED) for query in queries]


def warn(query: Query, why: str) -> None:
    """Says that a query has no answer. Its id and the reason may be a stranger's text."""
    log.warning("%s", printable(f"query {query.id}: {why}, so it has no answer"))
