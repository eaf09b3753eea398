"""Answers prompts with whichever adapter is active: greedy generation and multiple choice.

Knows nothing of where the active adapter came from. No chat template is applied: a prompt reaches the model
exactly as it is in the CSV, as in the competition's starter kit.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from router.constants import Scoring as Scoring
from router.deadline import Deadline
from router.errors import out_of_memory, printable
from router.model.device import batch_tokens
from router.submission import GENERATION, MULTIPLE_CHOICE, UNKNOWN, Query

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Found = TypeVar("Found")


def encode(tokenizer: Any, prompts: Sequence[str], max_seq_len: int | None = None) -> list[list[int]]:
    """Token ids of each prompt, with the tokenizer's own special tokens.

    A prompt of more than `max_seq_len` tokens keeps its first ones, as the starter kit does.
    """
    ids: list[list[int]] = tokenizer([_whole(text) for text in prompts], verbose=False)["input_ids"]
    empty = [pad_id(tokenizer)]  # a model needs one token to start from
    return [(row[:max_seq_len] if max_seq_len else row) or empty for row in ids]


def _whole(text: str) -> str:
    """The text without halves of characters (lone surrogates), which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def by_length(lengths: Sequence[int], budget: float, rows: int | None = None) -> Iterator[list[int]]:
    """Yields batches of indices, longest first, so that padding is small and memory peaks at the start.

    Args:
        lengths: tokens per row.
        budget: at most this many tokens per batch, including padding; a longer row is a batch of its own.
        rows: at most this many rows per batch; None sets no limit.

    Example:
        >>> list(by_length([3, 9, 4, 2], budget=10))
        [[1], [2, 0], [3]]
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and ((len(batch) + 1) * lengths[batch[0]] > budget or len(batch) == rows):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def positions(model: Any) -> int:
    """How many positions the model has: as many as its table (OPT, GPT-2), or any number if it computes them.

    One with rotary positions, such as Llama, can go beyond the context that it was made for.
    """
    from torch.nn import Embedding

    words = model.get_input_embeddings()
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = [of for of in model.modules() if isinstance(of, Embedding) and of is not words]
    sizes = [
        of.num_embeddings - getattr(of, "offset", 0) for of in tables
    ]  # OPT's first rows are no positions
    # GPT-J has a table too, though of rotary positions.
    sizes += [len(of) for name, of in model.named_buffers() if name.endswith("embed_positions")]
    return context if context in sizes else sys.maxsize


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of a left-padded batch, both (B, T) int64."""
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, width - len(row) :] = torch.tensor(row)
        mask[n, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


@dataclass(frozen=True)
class Answer:
    """What a query was answered with.

    Attributes:
        text: the generated text, special tokens removed; for multiple choice the 0-based index.
        ids: generated token ids up to the end-of-sequence token; empty for multiple choice.
        scores: log-probability of each choice in nats; empty for generation.
        failed: whether there is no answer, since the model's output was not finite or the query did not fit
            into memory or the model's context; the text is then `unknown`.
    """

    text: str
    ids: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    failed: bool = False


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation config.

    There may be several (Gemma and Llama 3 end a turn with another token than a text), or none.
    """
    ids = [tokenizer.eos_token_id]
    for config in (getattr(model, "generation_config", None), model.config):
        stated = getattr(config, "eos_token_id", None)
        ids += stated if isinstance(stated, (list, tuple)) else [stated]
    return sorted({int(one) for one in ids if one is not None})


FAILED = Answer(UNKNOWN, failed=True)


def warn(query: Query, reason: str) -> None:
    """Says that a query has no answer. Its id and the reason may be a stranger's text."""
    log.warning("%s", printable(f"query {query.id}: {reason}, so it has no answer"))


def likeliest(scores: tuple[float, ...]) -> Answer:
    """The answer to multiple choice; among equal scores the first choice wins."""
    if not all(map(math.isfinite, scores)):
        return FAILED
    return Answer(str(scores.index(max(scores))), scores=scores)


def endings(tokenizer: Any, choices: Sequence[str]) -> list[list[int]]:
    """The tokens of each choice, at least one, with the end-of-sequence token, if there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tokenizer([_whole(text) for text in choices], add_special_tokens=False)["input_ids"]
    return [[*tokens, *end] or [pad_id(tokenizer)] for tokens in ids]


def generate(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
    """Greedy continuations of a batch of token rows: plain argmax, no penalties.

    Rows that have ended leave the batch.

    Args:
        model: a causal language model, plain or PEFT.
        rows: token ids of each prompt.
        max_new_tokens: generation stops here or at one of the `end_tokens`. The last of them is not read, so
            the longest prompt and one less have to fit into the model's `positions`.

    Returns:
        One answer per row, a failed one where the logits were not finite.
    """
    import torch

    from router.model.cache import keep_rows, read_prompts, read_token

    ends = end_tokens(model, tokenizer)
    stops = torch.tensor(ends, dtype=torch.long, device=model.device)
    ids, mask = pad_left(rows, pad_id(tokenizer), model.device)
    new = torch.full((len(rows), max_new_tokens), -1, device=model.device)  # -1: nothing written
    sound = torch.ones(len(rows), dtype=torch.bool, device=model.device)  # (N,) all logits finite so far
    writing = torch.arange(len(rows), device=model.device)  # (B,) which rows the batch still holds
    ended = torch.zeros_like(writing, dtype=torch.bool)  # (B,) which of these have ended
    with torch.inference_mode():
        logits, cache = read_prompts(model, ids, mask, max_new_tokens)
        for step in range(max_new_tokens):
            best, token = logits.max(-1)  # (B,); a NaN is the largest of its row
            new[writing, step] = token
            sound[writing] &= best.isfinite() | ended
            ended |= torch.isin(token, stops) | ~sound[writing]
            if step + 1 == max_new_tokens or ended.all():
                break
            if 4 * ended.sum() >= len(ended):  # removing rows copies the cache, so they leave together
                stay = (~ended).nonzero().squeeze(1)
                keep_rows(cache, stay)
                writing, token, mask = (x[stay] for x in (writing, token, mask))
                ended = ended[stay]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits = read_token(model, token, mask, cache)  # (B, V)
    answers = []
    for row, whole in zip(new.tolist(), sound.tolist(), strict=True):
        end = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
        written = [token for token in row[:end] if token >= 0]
        answers.append(Answer(continuation(tokenizer, written), tuple(written)) if whole else FAILED)
    return answers


def continuation(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of generated ids, without special tokens and without one leading blank.

    Llama's tokenizer drops the first blank of a text and others do not, so the ids are decoded after a
    letter.
    """
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    before, text = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (letter, [*letter, *ids])
    )
    return str(text.removeprefix(before).removeprefix(" "))


def score_choices(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    choices: Sequence[Sequence[str]],
    scoring: Scoring = "full",
) -> list[tuple[float, ...]]:
    """Log-probability of every choice after its prompt, in nats.

    Each prompt is read once, and its choices share its key-value cache.

    Args:
        rows: token ids of each prompt.
        choices: the choices of each prompt, at least one each.
        scoring: `full` sums over all of the choice's tokens and the end-of-sequence token, if there is one;
            `kit` leaves the first token out, as the competition's starter kit does.

    Returns:
        One score per prompt and choice.
    """
    import torch

    from router.model.cache import cache_argument, keep_rows, read_prompts

    ids, mask = pad_left(rows, pad_id(tokenizer), model.device)
    owner = torch.tensor(
        [n for n, options in enumerate(choices) for _ in options], device=model.device
    )  # (N,) which prompt a choice belongs to
    tails = endings(tokenizer, [text for options in choices for text in options])
    width = max(map(len, tails))
    tail = torch.full((len(tails), width), pad_id(tokenizer), dtype=torch.long)
    valid = torch.zeros_like(tail)
    for n, tokens in enumerate(tails):
        tail[n, : len(tokens)] = torch.tensor(tokens)
        valid[n, : len(tokens)] = 1
    tail, valid = tail.to(model.device), valid.to(model.device)

    with torch.inference_mode():
        logits, cache = read_prompts(model, ids, mask, width - 1)
        first = logits.float().log_softmax(-1)  # (B, V)
        keep_rows(cache, owner)
        start = mask.sum(1)[owner]  # (N,)
        scores = first[owner, tail[:, 0]]  # (N,)
        if scoring == "kit":
            scores = torch.zeros_like(scores)
        if width > 1:
            rest = model(
                input_ids=tail[:, :-1],
                attention_mask=torch.cat([mask[owner], valid[:, :-1]], 1),
                position_ids=start[:, None] + torch.arange(width - 1, device=model.device),
                use_cache=True,
                **{cache_argument(model): cache},
            ).logits  # (N, width - 1, V)
            # Row by row, since the float32 logits of all rows would be the largest thing in memory.
            logp = torch.stack(
                [
                    row.float().log_softmax(-1).gather(1, next_one[:, None]).squeeze(1)
                    for row, next_one in zip(rest, tail[:, 1:], strict=True)
                ]
            )  # (N, width - 1)
            scores = scores + (logp * valid[:, 1:]).sum(1)
    flat = iter(scores.tolist())
    return [tuple(next(flat) for _ in options) for options in choices]


def pad_id(tokenizer: Any) -> int:
    """The token that fills a batch up; nobody reads it, so any will do where the tokenizer names none."""
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in named if token is not None), 0)


def answer(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Query],
    rows: Sequence[Sequence[int]],
    *,
    scoring: Scoring = "full",
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    progress: Callable[[int], object] = lambda done: None,
    journal: MutableMapping[Query, Answer] | None = None,
    deadline: Deadline | None = None,
    takes: Callable[[int], bool] = lambda tokens: True,
) -> list[Answer]:
    """Answers queries in order.

    Batches hold queries of similar length. If one does not fit into memory, it and all batches after it are
    split into halves. A query that does not fit alone, or has more tokens than the model has `positions`, or
    for which the model's output is not finite, has no answer (`Answer.failed`), and a warning names it. One
    that leaves few positions free gets fewer new tokens.

    Args:
        rows: token ids of each query's prompt.
        batch_size: queries per batch, however long; None fills batches by tokens.
        progress: called after each batch with the tokens of its prompts.
        journal: a batch that is in it is not answered again; any other is added to it. Batches do not depend
            on it, so answers do not either.
        deadline: shortens answers, and leaves queries out, so that the run ends in time.
        takes: called for each batch, in the same order wherever it is called, with the most tokens of its
            answers and prompts. Whatever it declines is another process's, and has failed here.
    """
    answers: dict[int, Answer] = {}
    known: MutableMapping[Query, Answer] = {} if journal is None else journal
    most = positions(model)

    def generated(part: list[int], limit: int) -> list[Answer]:
        room = most + 1 - max(len(rows[n]) for n in part)
        return generate(model, tokenizer, [rows[n] for n in part], min(limit, room))

    def chosen(part: list[int], limit: int) -> list[Answer]:
        choices = [queries[n].choices for n in part]
        scored = score_choices(model, tokenizer, [rows[n] for n in part], choices, scoring)
        return [likeliest(scores) for scores in scored]

    reads = [  # tokens of each prompt and its longest choice
        len(row) + (_widest(tokenizer, query.choices) if query.eval_type == MULTIPLE_CHOICE else 0)
        for query, row in zip(queries, rows, strict=True)
    ]
    for n, query in enumerate(queries):
        if reads[n] > most:
            answers[n] = FAILED
            if takes(0):
                warn(query, f"does not fit into a context of {most} tokens")
            progress(len(rows[n]))
            if deadline:
                deadline.skip(len(rows[n]))
    readable = [n for n in range(len(queries)) if n not in answers]
    written = [n for n in readable if queries[n].eval_type == GENERATION]
    lengths = [reads[n] + max_new_tokens for n in written]
    write_tokens, choice_tokens = batch_tokens(model, model.device, model.dtype)
    ways = [(generated, written, lengths, write_tokens)]
    # Each choice needs a copy of its prompt's key-value cache and the logits of its own tokens.
    choosing = [n for n in readable if queries[n].eval_type == MULTIPLE_CHOICE]
    for count in sorted({len(queries[n].choices) for n in choosing}):
        part = [n for n in choosing if len(queries[n].choices) == count]
        ways.append((chosen, part, [reads[n] for n in part], choice_tokens // count))
    for way, part, lengths, budget in ways:
        tokens = math.inf if batch_size else budget
        batches = []
        prompts = [len(rows[n]) for n in part]
        for places in _apart(by_length(lengths, tokens, batch_size), prompts, lengths, most):
            batch = [part[k] for k in places]
            if takes(sum(lengths[k] for k in places)):
                batches.append(batch)
                continue
            answers.update(dict.fromkeys(batch, FAILED))
            elsewhere = sum(len(rows[n]) for n in batch)
            progress(elsewhere)
            if deadline:
                deadline.skip(elsewhere)
        while batches:
            batch, *rest = batches
            asked = [queries[n] for n in batch]
            limit = deadline.new_tokens(max_new_tokens) if deadline else max_new_tokens
            if all(query in known for query in asked):
                answers.update((n, known[queries[n]]) for n in batch)
                if deadline:
                    deadline.skip(sum(len(rows[n]) for n in batch))
                progress(sum(len(rows[n]) for n in batch))
                batches = rest
            elif deadline and not limit:
                answers.update((n, known.get(queries[n], FAILED)) for n in batch)
                deadline.unanswered += sum(query not in known for query in asked)
                batches = rest
            elif found := if_it_fits(partial(way, limit=limit), batch):
                known.update({q: a for q, a in zip(asked, found, strict=True) if q not in known})
                answers.update((n, known[queries[n]]) for n in batch)  # the same query, the same answer
                for n in batch:
                    if answers[n].failed:
                        warn(queries[n], "the model's output is not finite")
                progress(sum(len(rows[n]) for n in batch))
                if deadline:
                    share = limit / max_new_tokens if way is generated else 1.0
                    deadline.note(sum(len(rows[n]) for n in batch), share)
                    deadline.shortened += len(batch) if way is generated and limit < max_new_tokens else 0
                batches = rest
            elif len(batch) == 1:
                warn(asked[0], "does not fit into memory")
                answers[batch[0]], batches = FAILED, rest  # not kept: there may be more memory next time
            else:
                batches = [half for whole in batches for half in halves(whole)]
    return [answers[n] for n in range(len(queries))]


def _apart(
    batches: Iterator[list[int]], prompts: Sequence[int], lengths: Sequence[int], most: int
) -> Iterator[list[int]]:
    """Yields batches; of one that is wider than `most` tokens, since it is padded, each row for itself.

    Args:
        prompts: tokens of each row's prompt, which is padded on the left.
        lengths: these, and what comes after the prompt, which is padded on the right.
    """
    for batch in batches:
        width = max(prompts[n] for n in batch) + max(lengths[n] - prompts[n] for n in batch)
        yield from [batch] if width <= most else ([n] for n in batch)


def _widest(tokenizer: Any, choices: Sequence[str]) -> int:
    """Tokens of the longest choice."""
    texts = [_whole(text) for text in choices]
    return max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))


def if_it_fits(way: Callable[[list[int]], Found], batch: list[int]) -> Found | None:
    """What `way` finds for a batch; None if memory ran out."""
    import torch

    try:
        return way(batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def halves(batch: list[int]) -> list[list[int]]:
    """The two halves of a batch, or the batch itself if it has one query."""
    middle = len(batch) // 2
    return [half for half in (batch[:middle], batch[middle:]) if half]
