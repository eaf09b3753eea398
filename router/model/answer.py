"""Answers prompts with whichever adapter is active: greedy generation and multiple choice.

Knows nothing of where the active adapter came from, nor who asks. No chat template is applied: a prompt
reaches the model exactly as it is in the CSV, as in the competition's starter kit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from router.constants import Scoring as Scoring
from router.model.device import batch_tokens
from router.system.errors import InputError, out_of_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Found = TypeVar("Found")
Rows = Sequence[Sequence[int]]  # token ids of each prompt
Choices = Sequence[Sequence[str]]  # of each prompt; none where text is to be written
Tails = Sequence[Sequence[Sequence[int]]]  # the same as token ids, see `endings`
NO_ROOM = "does not fit into memory"
NOT_FINITE = "the model's output is not finite"


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_seq_len: int | None = None,
    special: bool = True,
) -> list[list[int]]:
    """Token ids of each prompt.

    A prompt of more than `max_seq_len` tokens keeps its first ones, as the starter kit does.

    Args:
        special: puts the tokenizer's own special tokens around each prompt.
    """
    if not prompts:
        return []
    texts = [_whole(text) for text in prompts]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    empty = [pad_id(tokenizer)]  # a model needs one token to start from
    return [cut(row, max_seq_len) or empty for row in ids]


def cut(row: list[int], most: int | None, ends: bool = False) -> list[int]:
    """The first tokens of a prompt; or the first and the last, since a conversation asks at its end."""
    if not most or len(row) <= most:
        return row
    return row[: most // 2] + row[most // 2 - most :] if ends else row[:most]


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


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens the model knows."""
    words: Any = model.get_input_embeddings()
    return int(words.num_embeddings)


def positions(model: PreTrainedModel) -> int:
    """How many positions the model has: as many as its table (OPT, GPT-2), or any number if it computes them.

    One with rotary positions, such as Llama, can go beyond the context that it was made for.
    """
    from torch.nn import Embedding

    words = model.get_input_embeddings()
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = [module for module in model.modules() if isinstance(module, Embedding) and module is not words]
    # OPT's first rows are no positions.
    sizes = [table.num_embeddings - getattr(table, "offset", 0) for table in tables]
    # GPT-J has a table too, though of rotary positions.
    sizes += [len(buffer) for name, buffer in model.named_buffers() if name.endswith("embed_positions")]
    return context if context in sizes else sys.maxsize


def alike_up_to(model: PreTrainedModel) -> int:
    """Up to how many tokens a row reads the same beside any other; any number for most models.

    LongRoPE (Phi 4 mini) and dynamic NTK turn positions by the longest row of a batch, once it is longer.
    """
    text = model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if kind.get("rope_type") in ("longrope", "dynamic"):
            return int(kind.get("original_max_position_embeddings") or text.max_position_embeddings)
    return sys.maxsize


def padded(
    rows: Rows, pad_id: int, device: Any, side: Literal["left", "right"] = "left"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of a padded batch, both (B, T) int64."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    how: dict[str, Any] = {"batch_first": True, "padding_side": side}
    mask = pad_sequence([torch.ones_like(row) for row in ids], **how)
    return pad_sequence(ids, padding_value=pad_id, **how).to(device), mask.to(device)


@dataclass(frozen=True)
class Answer:
    """The answer to a query.

    Attributes:
        text: the generated text, special tokens removed; for multiple choice the 0-based index.
        ids: generated token ids up to the end-of-sequence token; empty for multiple choice.
        scores: log-probability of each choice in nats; empty for generation.
        failed: whether there is no answer, since the model's output was not finite or the prompt did not fit
            into memory or the model's context; the text is then `unknown`.
    """

    text: str
    ids: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    failed: bool = False


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation config.

    There may be several (Gemma and Llama 3 end a turn with another token than a text), or none.

    Raises:
        InputError: one of them is no number.
    """
    ids = [tokenizer.eos_token_id]
    for config in (getattr(model, "generation_config", None), model.config):
        stated = getattr(config, "eos_token_id", None)
        ids += stated if isinstance(stated, (list, tuple)) else [stated]
    try:
        return sorted({int(one) for one in ids if one is not None})
    except (TypeError, ValueError) as error:
        raise InputError(f"--base_model: expected numbers for eos_token_id, got {ids!r:.80}") from error


FAILED = Answer("unknown", failed=True)


def likeliest(scores: tuple[float, ...]) -> Answer:
    """The answer to multiple choice; among equal scores the first choice wins."""
    if not all(map(math.isfinite, scores)):
        return FAILED
    return Answer(str(scores.index(max(scores))), scores=scores)


def endings(
    tokenizer: PreTrainedTokenizerBase, choices: Sequence[str], end: int | None = None
) -> list[list[int]]:
    """The tokens of each choice, at least one, with the one that ends an answer, if there is one.

    Args:
        end: that token; None takes the tokenizer's end-of-sequence token.
    """
    if not choices:
        return []
    last = tokenizer.eos_token_id if end is None else end
    after = [] if last is None else [last]
    ids = tokenizer([_whole(text) for text in choices], add_special_tokens=False)["input_ids"]
    return [[*tokens, *after] or [pad_id(tokenizer)] for tokens in ids]


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, max_new_tokens: int
) -> list[Answer]:
    """Greedy continuations of a batch of token rows: plain argmax, no penalties.

    Rows that have ended leave the batch.

    Args:
        model: a causal language model, plain or PEFT.
        max_new_tokens: generation stops here or at one of the `end_tokens`. The last of them is not read, so
            the longest prompt and one less have to fit into the model's `positions`.

    Returns:
        One answer per row, a failed one where the logits were not finite.
    """
    import torch

    from router.model.cache import keep_rows, read_prompts, read_token

    ends = end_tokens(model, tokenizer)
    stops = torch.tensor(ends, dtype=torch.long, device=model.device)
    ids, mask = padded(rows, pad_id(tokenizer), model.device)
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


def continuation(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of generated ids, without special tokens and without one leading blank.

    Llama's tokenizer drops the first blank of a text and others do not, so the ids are decoded after a
    letter.
    """
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    before, text = (
        str(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for part in (letter, [*letter, *ids])
    )
    return text.removeprefix(before).removeprefix(" ")


def cut_at(tokenizer: PreTrainedTokenizerBase, answer: Answer, end: int) -> Answer:
    """An answer up to a token in it, which ends it."""
    ids = answer.ids[: answer.ids.index(end)]
    return replace(answer, ids=(*ids, end), text=continuation(tokenizer, ids))


def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    tails: Tails,
    scoring: Scoring = "full",
) -> list[tuple[float, ...]]:
    """Log-probability of every choice after its prompt, in nats.

    Each prompt is read once, and its choices share its key-value cache.

    Args:
        tails: the choices of each prompt, at least one each.
        scoring: `full` sums over all of the choice's tokens and the one that ends it, if there is one; `kit`
            leaves the first token out, as the competition's starter kit does.

    Returns:
        One score per prompt and choice.
    """
    import torch

    from router.model.cache import cache_argument, keep_rows, read_prompts

    ids, mask = padded(rows, pad_id(tokenizer), model.device)
    # (N,) which prompt a choice belongs to
    owner = torch.tensor([n for n, options in enumerate(tails) for _ in options], device=model.device)
    tail, valid = padded(list(chain(*tails)), pad_id(tokenizer), model.device, "right")  # (N, width)
    width = tail.shape[1]
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
            pairs = zip(rest, tail[:, 1:, None], strict=True)
            logp = torch.stack([row.float().log_softmax(-1).gather(1, tokens)[:, 0] for row, tokens in pairs])
            scores = scores + (logp * valid[:, 1:]).sum(1)  # logp is (N, width - 1)
    flat = iter(scores.tolist())
    return [tuple(next(flat) for _ in options) for options in tails]


def pad_id(tokenizer: PreTrainedTokenizerBase, size: int = sys.maxsize) -> int:
    """The token that fills a batch up; nobody reads it, so any will do where the tokenizer names none.

    Args:
        size: how many tokens the model knows; some tokenizers name one beyond.
    """
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in named if token is not None and token < size), 0)


class Batch(NamedTuple):
    """Prompts that are read at once. All of them are written after, or all have as many choices."""

    numbers: list[int]  # of the prompts
    tokens: int  # of them and their longest answers
    chooses: bool  # whether they have choices


class Done(NamedTuple):
    """A batch that is finished."""

    numbers: list[int]  # of its prompts
    answers: list[Answer]  # to them, in order
    why: str  # those that failed did


def unanswerable(
    model: PreTrainedModel, row: Sequence[int], tails: Sequence[Sequence[int]], reads: int, most: float
) -> str:
    """Why a prompt has no answer; "" if it may have one.

    Args:
        row: its token ids.
        tails: those of its choices.
        reads: how many tokens the model reads at most.
        most: how many it can read.
    """
    known = vocabulary(model)
    if reads > most:
        return f"does not fit into a context of {most} tokens"
    if max(chain(row, *tails)) >= known:
        return f"spells a token beyond the {known} that the base model knows"
    return ""


def batched(
    model: PreTrainedModel, rows: Rows, tails: Tails, max_new_tokens: int, batch_size: int | None
) -> tuple[list[Batch], dict[int, str]]:
    """Batches of prompts of similar length, and why a prompt is in none: it has no answer.

    Args:
        max_new_tokens: the most tokens of a text.
        batch_size: prompts per batch, however long; None fills batches by tokens.
    """
    most = positions(model)
    reads = []
    left_out = {}
    for n, (row, options) in enumerate(zip(rows, tails, strict=True)):
        reads.append(len(row) + max((len(tail) - 1 for tail in options), default=0))  # the last is not read
        if why := unanswerable(model, row, options, reads[n], most):
            left_out[n] = why
    readable = [n for n in range(len(rows)) if n not in left_out]
    write_tokens, choice_tokens = batch_tokens(model, model.device, model.dtype)
    kinds = [(0, write_tokens)]
    # Each choice needs a copy of its prompt's key-value cache and the logits of its own tokens.
    kinds += [(count, choice_tokens // count) for count in sorted({len(some) for some in tails if some})]
    batches = []
    for count, budget in kinds:
        part = [n for n in readable if len(tails[n]) == count]
        lengths = [reads[n] + (0 if count else max_new_tokens) for n in part]
        prompts = [len(rows[n]) for n in part]
        limit = min(most, alike_up_to(model))
        for places in by_length(lengths, math.inf if batch_size else budget, batch_size):
            # Prompts are padded on the left, and what comes after them on the right.
            width = max(prompts[k] for k in places) + max(lengths[k] - prompts[k] for k in places)
            for fits in [places] if width <= limit else [[k] for k in places]:
                tokens = sum(lengths[k] for k in fits)
                batches.append(Batch([part[k] for k in fits], tokens, bool(count)))
    return batches, left_out


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    tails: Tails,
    batches: Sequence[Batch],
    *,
    max_new_tokens: int,
    scoring: Scoring = "full",
) -> Iterator[Done]:
    """Yields batches as they are finished, in order. One begins when it is asked for.

    A prompt that does not fit into memory alone, or for which the model's output is not finite, has no answer
    (`Answer.failed`). One that leaves few of the model's `positions` free gets fewer new tokens.

    Args:
        batches: as `batched` makes them.
        max_new_tokens: the most tokens of a text.
    """
    most = positions(model)

    def answered(part: list[int]) -> list[Answer]:
        prompts, options = [rows[n] for n in part], [tails[n] for n in part]
        if options[0]:
            scored = score_choices(model, tokenizer, prompts, options, scoring)
            return [likeliest(scores) for scores in scored]
        room = most + 1 - max(map(len, prompts))
        return generate(model, tokenizer, prompts, min(max_new_tokens, room))

    for numbers, batch_answers in fitting((batch.numbers for batch in batches), answered):
        yield Done(numbers, batch_answers or [FAILED], NOT_FINITE if batch_answers else NO_ROOM)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    choices: Choices,
    *,
    max_new_tokens: int = 64,
    scoring: Scoring = "full",
    batch_size: int | None = None,
) -> list[Answer]:
    """The answers to prompts, in order; see `batched` and `answer`."""
    tails = [endings(tokenizer, options) for options in choices]
    batches, _ = batched(model, rows, tails, max_new_tokens, batch_size)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "scoring": scoring}
    by_number: dict[int, Answer] = {}
    for done in answer(model, tokenizer, rows, tails, batches, **how):
        by_number.update(zip(done.numbers, done.answers, strict=True))
    return [by_number.get(n, FAILED) for n in range(len(rows))]


def if_it_fits(way: Callable[[list[int]], Found], batch: list[int]) -> Found | None:
    """The result of `way` for a batch; None if memory ran out."""
    import torch

    try:
        return way(batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def fitting(
    batches: Iterable[list[int]], way: Callable[[list[int]], Found]
) -> Iterator[tuple[list[int], Found | None]]:
    """Yields batches with what `way` finds for each; it is called when the batch is asked for.

    If one does not fit into memory, it and all batches after it are split into halves. For a prompt that does
    not fit alone, None is found.
    """
    waiting = list(batches)
    while waiting:
        batch, *rest = waiting
        result = if_it_fits(way, batch)
        if result is None and len(batch) > 1:
            waiting = [half for whole in waiting for half in halves(whole)]
        else:
            yield batch, result
            waiting = rest


def halves(batch: list[int]) -> list[list[int]]:
    """The two halves of a batch, or the batch itself if it has one prompt."""
    middle = len(batch) // 2
    return [half for half in (batch[:middle], batch[middle:]) if half]
