"""The base model reads prompts and writes a few tokens: how much each adapter responds to each prompt.

Hooks on the target modules turn the input of every token into one number per adapter and average it over the
prompt, and over its end and what is written next; no activation is kept. Padding is not counted, and neither
is the first token, an attention sink whose norm is tens of times that of other tokens. Knows no labels and no
adapter's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import is_not
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.errors import InputError
from router.model.answer import positions
from router.model.cache import read_prompts, read_token
from router.model.device import batch_tokens, tokens_at_once
from router.model.hooks import reading_inputs
from router.model.passes import batches, forward
from router.routing.prototypes import ModulePrototypes

END = 2  # counted tokens that are the end of a prompt, just before the answer
AHEAD = 8  # tokens that the base model writes after a prompt, where the settings do not say otherwise
KEPT = 512  # tokens that are written, at most, whose inputs at all modules are kept until they are needed
BLOCK = 256  # tokens that a processor centres at once in float32, so that they stay in its caches
SHARE = 0.5  # of what it writes in the second response; the end of the prompt has the rest


def counted_tokens(mask: Tensor) -> Tensor:
    """Which positions count, (B, T) bool: no padding, and no first token unless it is the only one."""
    first = (mask.cumsum(1) == 1) & (mask.sum(1, keepdim=True) > 1)
    return mask.bool() & ~first


def input_means(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, modules: Sequence[str]
) -> dict[str, Tensor]:
    """The mean input of each module over all counted tokens of the prompts, (d_in,) float32."""
    totals: dict[str, Tensor] = {}
    count = 0

    def read(ids: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], int]:
        counted = _Counted(counted_tokens(mask))
        sums: dict[str, Tensor] = {}

        def visit(name: str, x: Tensor) -> None:
            sums[name] = counted.tokens(name, x).double().sum(0)  # (d_in,)

        with reading_inputs(model, modules, visit):
            forward(model, ids, mask)
        return sums, counted.count

    with torch.inference_mode():
        for _, (sums, some) in batches(model, rows, pad_id, "centre", read):
            totals = {name: totals[name] + part if totals else part for name, part in sums.items()}
            count += some
    return {name: (total / count).float() for name, total in totals.items()}


class _Counted:
    """Picks the inputs of a batch's counted tokens.

    Args:
        counted: which they are, (B, T) bool; at least one.
    """

    def __init__(self, counted: Tensor) -> None:
        self.of = counted.numel()
        index = counted.flatten().nonzero()[:, 0]  # (T',)
        start, end, self.count = int(index[0]), int(index[-1]) + 1, len(index)
        # A single prompt's are in a row, and need no copy.
        self.places = slice(start, end) if end - start == self.count else index

    def tokens(self, name: str, x: Tensor) -> Tensor:
        """The inputs of the counted tokens, (T', d_in).

        Args:
            x: a module's input, (B, T, d_in), or (B * T, d_in) as shared experts get it.

        Raises:
            InputError: it has other rows, as an expert that gets some of the tokens.
        """
        flat = x.flatten(0, -2)  # (B * T, d_in)
        if len(flat) != self.of:
            raise InputError(
                f"--adapters: expected adapters of modules that get every token, but {name} gets {len(flat)} "
                f"of {self.of}, as one of several experts"
            )
        if isinstance(self.places, slice):
            return flat[self.places]
        return flat.index_select(0, self.places)  # quicker than flat[self.places]


class _Inputs:
    """Centres the inputs of a batch's modules; one that several share (queries, keys, values) only once."""

    def __init__(self, counted: Tensor) -> None:
        self.counted = _Counted(counted)
        self.seen: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None

    def centred(self, name: str, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """The counted tokens minus the mean, (T', d_in) in x's dtype, and their norms, (T',) float32."""
        if self.seen is None or self.seen[0] is not x or not torch.equal(self.seen[1], mean):
            rows = self.counted.tokens(name, x)  # (T', d_in)
            centred = torch.empty_like(rows)
            sizes = torch.empty(len(rows), device=x.device, dtype=torch.float32)
            block = BLOCK if x.device.type == "cpu" else len(rows)
            for some, out, size in zip(
                *(torch.split(of, block) for of in (rows, centred, sizes)), strict=True
            ):
                less = some.float() - mean
                out.copy_(less)
                size.copy_(less.norm(dim=1))
            self.seen = x, mean, (centred, sizes.clamp_min(1e-6))
        return self.seen[2]


class Probed(NamedTuple):
    """What the base model tells of prompts."""

    # (prompts, adapters, modules, 2) root mean square cosines, of the prompt, and of its end and what is
    # next; NaN without a prototype
    responses: NDArray[np.float32]
    confidence: NDArray[np.float32]  # (prompts,) of the base model, see `confidence_of`


def telling(absent: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The number of an adapter that has a prototype, (modules, 2); -1 where none has.

    The adapters at a module share its input, so one of them tells whether a prompt is readable.

    Args:
        absent: (adapters, modules, 2), where there is no prototype, so that no response is expected.
    """
    return np.where(absent.all(0), -1, absent.argmin(0))


def unreadable(probed: Probed, told_by: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which prompts the model has no finite activations for, (prompts,); told_by: see `telling`."""
    modules, views = np.nonzero(told_by >= 0)
    told = probed.responses[:, told_by[modules, views], modules, views]  # (prompts, modules and views)
    return ~(np.isfinite(told).all(1) & np.isfinite(probed.confidence))


def together(model: Any, ahead: int = AHEAD) -> int:
    """How many tokens of prompts are probed together, including padding, see `passes.batches`.

    The model reads them in passes of its own size; a step in which it writes then counts for many prompts.
    """
    return (
        batch_tokens(model, model.device, model.dtype)[0]
        if ahead
        else tokens_at_once(model.device, model.dtype)
    )


def confidence_of(logits: Tensor) -> Tensor:
    """The log-probability, in nats, of the likeliest next token, (B,) float32, from logits (B, V)."""
    return logits.float().log_softmax(-1).amax(-1)


def base_confidence(model: Any, rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """The confidence of the base model at the end of each prompt, (prompts,) float32."""
    found = torch.empty(len(rows), dtype=torch.float32)

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        return confidence_of(forward(model, ids, mask)).cpu()

    with torch.inference_mode():
        for batch, some in batches(model, rows, pad_id, "confidence", read):
            found[batch] = some
    return found


def probe(
    model: Any,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    prototypes: Mapping[str, ModulePrototypes],
    means: Mapping[str, Tensor],
    n_adapters: int,
    title: str | None = "probe",
    ahead: int = AHEAD,
) -> Probed:
    """How strongly a prompt's activations align with an adapter's input subspace, module by module.

    The input of every counted token is centred with `means`. Its weighted squared cosine to a prototype is
    `sum_j w_j (v_j . x)^2 / norm(x)^2`, in [0, 1]. A prompt has two responses, each the root of a mean of
    these: of the mean over all of its counted tokens; and of the one halfway between the mean over its end,
    the last END of them, and the mean over the next tokens that the model writes, the likeliest each time,
    past an end of sequence too.

    Args:
        model: the base model.
        rows: token ids of each prompt.
        prototypes: by module; the order of modules is that of the mapping.
        means: what to centre with, by module, (d_in,).
        n_adapters: the number of adapters in the library.
        ahead: how many tokens the model writes, from 0, where the second response is the mean over the end.

    Returns:
        The responses, and what the same pass tells of the base model.

    Raises:
        InputError: the model has too few `positions` for a prompt and what is written after it.
    """
    if (longest := max(map(len, rows), default=0)) + ahead > (most := positions(model)):
        raise InputError(
            f"--max_seq_len: expected prompts of at most {most - ahead} tokens, since the base model has "
            f"positions for {most} and --ahead takes {ahead}, got one of {longest}; pass less of either"
        )
    share = SHARE if ahead else 0.0
    out = np.empty((len(rows), n_adapters, len(prototypes), 2), dtype=np.float32)
    confidence = np.empty(len(rows), dtype=np.float32)

    def read(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        found = _Responses(model, prototypes, means, n_adapters, len(ids))
        reading = found.of_prompts(counted_tokens(mask), 1 - share)
        logits, cache = read_prompts(model, ids, mask, ahead, reading)
        sure, every = confidence_of(logits), torch.ones_like(mask[:, :1])
        left = ahead
        while left:
            steps = min(left, max(1, KEPT // len(ids)))
            left -= steps
            with found.of_written(steps, share / ahead):
                for _ in range(steps):
                    mask = torch.cat([mask, every], 1)
                    logits = read_token(model, logits.argmax(-1), mask, cache)
        return found.sums, sure

    with torch.inference_mode():
        for batch, (sums, sure) in batches(model, rows, pad_id, title, read, together(model, ahead)):
            out[batch] = sums.sqrt().permute(2, 3, 0, 1).cpu().numpy()
            confidence[batch] = sure.cpu().numpy()
    for m, proto in enumerate(prototypes.values()):
        columns = np.bincount(proto.owners.cpu().numpy(), minlength=n_adapters)
        out[:, columns == 0, m] = np.nan
    return Probed(out, confidence)


class _Responses:
    """The squared responses of a batch, added up as the model reads it.

    Attributes:
        sums: (modules, 2, B, adapters) float32, weighted means of squared cosines.
    """

    def __init__(
        self,
        model: Any,
        prototypes: Mapping[str, ModulePrototypes],
        means: Mapping[str, Tensor],
        n_adapters: int,
        prompts: int,
    ) -> None:
        self.model, self.prototypes, self.means = model, prototypes, means
        self.place = {name: m for m, name in enumerate(prototypes)}
        # The dtype is named everywhere: while transformers loads a model, another is torch's default.
        shape = len(prototypes), 2, prompts, n_adapters
        self.sums = torch.zeros(shape, device=model.device, dtype=torch.float32)

    def of_prompts(self, counted: Tensor, share: float) -> Callable[[slice], AbstractContextManager[None]]:
        """What `read_prompts` reads these rows of the batch in, see `_averages`; counted: (B, T)."""
        return lambda part: self.added(part, counted[part], _averages(counted[part], share))

    def added(self, part: slice, counted: Tensor, views: Tensor) -> AbstractContextManager[None]:
        """Inside the block, adds the squared cosines of what the model reads.

        Args:
            part: the rows of the batch that it reads, b of them.
            counted: which of their positions count, (b, T); T' of them in all.
            views: the weight of each counted token in the two responses of each row, (2, b, T').
        """
        inputs = _Inputs(counted)

        def visit(name: str, x: Tensor) -> None:
            self.sums[self.place[name], :, part] += views @ self._squares(name, x, inputs).T

        return reading_inputs(self.model, list(self.prototypes), visit)

    @contextmanager
    def of_written(self, tokens: int, share: float) -> Iterator[None]:
        """Inside the block the model writes a token of each prompt at a time; adds their squares at its end.

        Inputs are kept until then: one product of many tokens is quicker than many products of a few. No
        model changes an input later, or it could not be trained.

        Args:
            tokens: how many it writes for each prompt.
            share: the weight of each in the second response.
        """
        kept: dict[str, list[Tensor]] = {}  # in the order in which the modules run
        with reading_inputs(
            self.model, list(self.prototypes), lambda name, x: kept.setdefault(name, []).append(x)
        ):
            yield
        prompts = self.sums.shape[2]
        inputs = _Inputs(torch.ones(tokens, prompts, dtype=torch.bool, device=self.sums.device))
        parts: list[Tensor] = []
        for name, own in kept.items():
            if len(own) != len(parts) or any(map(is_not, own, parts)):  # several modules share their inputs
                parts, x = own, torch.cat([part.flatten(0, -2) for part in own])  # (tokens * B, d_in)
            squares = self._squares(name, x, inputs)  # (adapters, tokens * B)
            self.sums[self.place[name], 1] += share * squares.view(-1, tokens, prompts).sum(1).T

    def _squares(self, name: str, x: Tensor, inputs: _Inputs) -> Tensor:
        """The squared cosines of a module's inputs to the adapters' prototypes, (adapters, T')."""
        proto = self.prototypes[name]
        centred, size = inputs.centred(name, x, self.means[name])  # (T', d_in), (T',)
        along = centred.to(proto.directions.dtype) @ proto.directions  # (T', K)
        rows = along.T.to(torch.float32, memory_format=torch.contiguous_format)  # (K, T'), in one copy
        return proto.sums(rows.square_(), self.sums.shape[-1]) / size.square()


def _averages(counted: Tensor, share: float) -> Tensor:
    """The weight of each counted token in the two responses of each prompt, (2, B, T').

    Those in the second sum to `share`, since what the model writes has the rest.
    """
    prompt = counted.nonzero()[:, 0]  # (T',) which prompt of the batch a token is in
    mine = prompt == torch.arange(len(counted), device=counted.device)[:, None]  # (B, T')
    left = counted.flip(1).cumsum(1).flip(1)[counted]  # (T',) 1 for a prompt's last counted token
    views = torch.stack([mine, mine & (left <= END)]).float()
    of_view = torch.tensor([1, share], device=views.device, dtype=torch.float32)[:, None, None]
    return of_view * views / views.sum(2, keepdim=True)
