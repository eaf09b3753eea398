"""One pass of the base model over prompts: how much each adapter responds to each prompt.

Hooks on the target modules turn the input of every token into one number per adapter and average it over the
prompt, and over its end (equation 1 in docs/method.md); no activation is kept. Padding is not counted, nor
what all prompts of a frame begin with, nor the first token, an attention sink whose norm is tens of times
that of other tokens. Knows no labels and no adapter's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.model.frames import BARE, Frame
from router.model.hooks import reading_inputs
from router.model.passes import batches, forward
from router.routing.prototypes import ModulePrototypes
from router.system.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

END = 2  # counted tokens that are the end of a prompt, just before the answer
BLOCK = 256  # tokens that a processor centres at once in float32, so that they stay in its caches


class Framing(NamedTuple):
    """The frame of prompts, and which of their tokens count.

    Attributes:
        frame: the texts around each.
        prefix: token ids with which all begin, which say nothing; see `counted_tokens`.
        end: how many counted tokens are the end of each.
    """

    frame: Frame = BARE
    prefix: Sequence[int] = ()
    end: int = END


def counted_tokens(ids: Tensor, mask: Tensor, prefix: Sequence[int]) -> Tensor:
    """Which positions count, (B, T) bool: no padding, no first token, and none that all prompts begin with.

    Of each prompt the last token counts.

    Args:
        ids, mask: of a left-padded batch, (B, T).
        prefix: token ids that the prompts of a frame have in common.
    """
    place = mask.cumsum(1)  # (B, T) 1 for a prompt's first token
    skipped = torch.ones_like(place[:, :1])  # (B, 1)
    if prefix:
        start = mask.shape[1] - mask.sum(1, keepdim=True)  # (B, 1)
        where = start + torch.arange(len(prefix), device=ids.device)  # (B, P)
        there = ids.gather(1, where.clamp_max(ids.shape[1] - 1))
        same = (there == torch.tensor(prefix, device=ids.device)) & (where < ids.shape[1])
        skipped = same.long().cumprod(1).sum(1, keepdim=True).clamp_min(1)
    return mask.bool() & ((place > skipped) | (place == mask.sum(1, keepdim=True)))


def input_means(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    modules: Sequence[str],
    prefix: Sequence[int] = (),
) -> tuple[dict[str, Tensor], Tensor]:
    """The mean input of each module over all counted tokens of the prompts, (d_in,) float32 by module.

    Also the base model's confidence at the end of each prompt, (prompts,) float32, see `confidence_of`.
    """
    totals: dict[str, Tensor] = {}
    confidence = torch.empty(len(rows), dtype=torch.float32)
    count = 0

    def read(ids: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], int, Tensor]:
        inputs = Inputs(counted_tokens(ids, mask, prefix))
        sums: dict[str, Tensor] = {}

        def visit(name: str, x: Tensor) -> None:
            sums[name] = inputs.tokens(name, x).double().sum(0)  # (d_in,)

        with reading_inputs(model, modules, visit):
            sure = confidence_of(forward(model, ids, mask))
        return sums, inputs.count, sure

    for batch, (sums, some, sure) in batches(model, rows, pad_id, "centre", read):
        totals = {name: totals[name] + part if totals else part for name, part in sums.items()}
        confidence[batch] = sure.cpu()
        count += some
    return {name: (total / count).float() for name, total in totals.items()}, confidence


class Inputs:
    """The inputs of a batch's counted tokens; one that several modules share is centred only once.

    Args:
        counted: which tokens they are, (B, T) bool; at least one.
    """

    def __init__(self, counted: Tensor) -> None:
        self.total = counted.numel()
        index = counted.flatten().nonzero()[:, 0]  # (T',)
        start = int(index[0])
        end = int(index[-1]) + 1
        self.count = len(index)
        # A single prompt's are in a row, and need no copy.
        self.places = slice(start, end) if end - start == self.count else index
        self.seen: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None

    def tokens(self, name: str, x: Tensor) -> Tensor:
        """The inputs of the counted tokens, (T', d_in).

        Args:
            x: a module's input, (B, T, d_in), or (B * T, d_in) as shared experts get it.

        Raises:
            InputError: it has other rows, as an expert that gets some of the tokens.
        """
        flat = x.flatten(0, -2)  # (B * T, d_in)
        if len(flat) != self.total:
            raise InputError(
                f"--adapters: expected adapters of modules that get every token, but {name} gets {len(flat)} "
                f"of {self.total}, as one of several experts"
            )
        if isinstance(self.places, slice):
            return flat[self.places]
        return flat.index_select(0, self.places)  # quicker than flat[self.places]

    def centred(self, name: str, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """The counted tokens less the mean, (T', d_in) in x's dtype; their squared norms, (T',) float32."""
        if self.seen is None or self.seen[0] is not x or not torch.equal(self.seen[1], mean):
            rows = self.tokens(name, x)  # (T', d_in)
            centred = torch.empty_like(rows)
            sizes = torch.empty(len(rows), device=x.device, dtype=torch.float32)
            block = BLOCK if x.device.type == "cpu" else len(rows)
            for some, out, size in zip(
                *(torch.split(tensor, block) for tensor in (rows, centred, sizes)), strict=True
            ):
                less = some.float() - mean
                out.copy_(less)
                size.copy_(less.norm(dim=1))
            self.seen = x, mean, (centred, sizes.clamp_min(1e-6).square())
        return self.seen[2]


class Probed(NamedTuple):
    """The base model's measurements of prompts."""

    # (prompts, adapters, modules, 2) root mean square cosines of the prompt and of its end; NaN without a
    # prototype
    responses: NDArray[np.float32]
    confidence: NDArray[np.float32]  # (prompts,) of the base model, see `confidence_of`


def unreadable(probed: Probed, absent: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which prompts the model has no finite activations for, (prompts,).

    Args:
        absent: (adapters, modules, 2), where there is no prototype, so that no response is expected.
    """
    readable = (np.isfinite(probed.responses) | absent).all((1, 2, 3))
    return ~(readable & np.isfinite(probed.confidence))


def confidence_of(logits: Tensor) -> Tensor:
    """The log-probability, in nats, of the likeliest next token, (B,) float32, from logits (B, V)."""
    return logits.float().log_softmax(-1).amax(-1)


def probe(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    prototypes: Mapping[str, ModulePrototypes],
    means: Mapping[str, Tensor],
    n_adapters: int,
    title: str | None = "probe",
    framing: Framing = Framing(),  # noqa: B008
) -> Probed:
    """How strongly a prompt's activations align with an adapter's input subspace, module by module.

    The input of every counted token is centred with `means`. Its weighted squared cosine to a prototype is
    `sum_j w_j (v_j . x)^2 / norm(x)^2`, in [0, 1]. A prompt has two responses, each the root of a mean of
    these: over all of its counted tokens, and over its end, the last few of them.

    Args:
        prototypes: by module; the order of modules is that of the mapping.
        means: what to centre with, by module, (d_in,).
        n_adapters: in the library.
        title: of the bar; None shows none.
        framing: what of the prompts counts.
    """
    out = np.empty((len(rows), n_adapters, len(prototypes), 2), dtype=np.float32)
    confidence = np.empty(len(rows), dtype=np.float32)
    place = {name: m for m, name in enumerate(prototypes)}

    def read(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        counted = counted_tokens(ids, mask, framing.prefix)
        inputs = Inputs(counted)
        views = averages(counted, framing.end)
        # The dtype is named, since while transformers loads a model, another is torch's default.
        shape = len(prototypes), 2, len(ids), n_adapters
        squares = torch.zeros(shape, device=ids.device, dtype=torch.float32)

        def visit(name: str, x: Tensor) -> None:
            centred, size = inputs.centred(name, x, means[name])
            squares[place[name]] = squared_cosines(prototypes[name], centred, size, views, n_adapters)

        with reading_inputs(model, list(prototypes), visit):
            sure = confidence_of(forward(model, ids, mask))
        return squares, sure

    for batch, (squares, sure) in batches(model, rows, pad_id, title, read):
        out[batch] = squares.sqrt().permute(2, 3, 0, 1).cpu().numpy()
        confidence[batch] = sure.cpu().numpy()
    for m, proto in enumerate(prototypes.values()):
        columns = np.bincount(proto.owners.cpu().numpy(), minlength=n_adapters)
        out[:, columns == 0, m] = np.nan
    return Probed(out, confidence)


def squared_cosines(
    proto: ModulePrototypes, centred: Tensor, size: Tensor, views: Tensor, n_adapters: int
) -> Tensor:
    """The mean weighted squared cosines of inputs to the prototypes, (2, B, adapters) float32.

    Means are taken direction by direction, then summed by adapter: there are fewer of them than tokens.

    Args:
        centred: (T, d_in) inputs of a module less their mean.
        size: (T,) their squared norms.
        views: (2, B, T) weights of the tokens, see `averages`.
    """
    along = (centred.to(proto.directions.dtype) @ proto.directions).float().square_()  # (T, K)
    means = along.T @ (views / size).flatten(0, 1).T  # (K, 2 B)
    return proto.sums(means, n_adapters).T.reshape(*views.shape[:2], n_adapters)


def averages(counted: Tensor, end: int) -> Tensor:
    """The weight of each counted token in the two responses of each prompt, (2, B, T')."""
    prompt = counted.nonzero()[:, 0]  # (T',) which prompt of the batch a token is in
    mine = prompt == torch.arange(len(counted), device=counted.device)[:, None]  # (B, T')
    left = counted.flip(1).cumsum(1).flip(1)[counted]  # (T',) 1 for a prompt's last counted token
    views = torch.stack([mine, mine & (left <= end)]).float()
    return views / views.sum(2, keepdim=True)
