"""`proto_route`: prototypes of the adapters' subspaces, gated softly by calibrated cosine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.model.answer import by_length, encode
from router.model.device import tokens_at_once
from router.model.frames import BARE, Frame, Parts, bare, parts_of_text, usual, within
from router.model.passes import truncated
from router.pipeline.result import Routing
from router.pipeline.steps import Routed
from router.queries.submission import Query
from router.routing.calibration import Calibration
from router.routing.evidence import joined as evidence_of
from router.routing.fitted import Fitted
from router.routing.probe import Probed
from router.routing.prototypes import ModulePrototypes, prototypes
from router.system.errors import InputError

ENDS = 1 << 14  # characters at either end of a text, which hold more tokens than routing reads of it

SWITCH = 2.0  # standard deviations by which another candidate has to lead that of the turn before
FRAMES = 8  # that one batch of queries may bring
SHARED = 16  # queries under one system message, which is then a frame; it costs as much as 220


class Read(NamedTuple):
    """What is read of a query.

    Attributes:
        ids: the tokens.
        frame: in which it is compared with generic text.
        shared: the frame with a system message that many queries have, if it has one.
    """

    ids: tuple[int, ...]
    frame: Frame
    shared: Frame | None = None


def joined(parts: Sequence[Routing]) -> Routing:
    """The routing of several parts of the queries as one."""
    evidence = [part.evidence for part in parts if part.evidence]
    return Routing(np.concatenate([part.weights for part in parts]), evidence_of(evidence))


def rows_of(routing: Routing, rows: NDArray[np.int64]) -> Routing:
    """The routing of some of the queries."""
    return Routing(routing.weights[rows], routing.evidence and routing.evidence.rows(rows))


def decided(routing: Routing, turns: Sequence[int]) -> Routing:
    """The routing of conversations, from that of their turns.

    A conversation stays with its candidate until another one, the base model included, leads it by SWITCH.

    Args:
        turns: how many each conversation has.
    """
    if len(routing.weights) == len(turns):
        return routing
    assert routing.evidence is not None  # the gate keeps it
    scores, rows, start = np.nan_to_num(routing.evidence.candidates, nan=-np.inf), [], 0
    for count in turns:
        row = start
        for turn in range(start + 1, start + count):
            best, now = scores[turn].argmax(), scores[row].argmax()
            if scores[turn, best] - scores[turn, now] > SWITCH or best == now:
                row = turn
        rows.append(row)
        start += count
    return rows_of(routing, np.array(rows))


class ProtoRoute(Routed):
    """Routes by how strongly the base model's activations align with each adapter's input subspace.

    A query that stands out no more than generic text in the same frame goes to the base model; docs/method.md
    has the equations.
    """

    @cached_property
    def fits(self) -> dict[Frame, Fitted]:
        """The library in each frame that came so far."""
        return {}

    @cached_property
    def prototypes(self) -> dict[str, ModulePrototypes]:
        """The adapters' prototypes by module."""
        with self.stages("prototypes"):
            return prototypes(self.adapters, str(self.base.model.device), self.base.model.dtype)

    def fitted(self, frame: Frame = BARE) -> Fitted:
        """Prototypes, and a gate that is calibrated on generic text in a frame; made on first use."""
        if frame not in self.fits:
            self.fits[frame] = self._fitted(frame)
        return self.fits[frame]

    def _fitted(self, frame: Frame) -> Fitted:
        bare = None if frame == BARE else self.fitted()
        protos = bare.prototypes if bare else self.prototypes
        with self.stages("calibrate"):
            calibration = Calibration(self.base, self.settings.max_seq_len, frame)
            means = calibration.means(list(protos))
            if bare:
                reference = calibration.responses(self.adapters, protos, means, len(bare.names))
                return bare.in_frame(frame, calibration.prefix, means, reference, calibration.confidence())
            protos = {module: protos[module] for module in means}
            present = {owner for proto in protos.values() for owner in proto.owners.tolist()}
            for number, adapter in enumerate(self.adapters):
                if number not in present:
                    raise InputError(
                        f"adapter {adapter.name} ({adapter.folder.path}): expected an update of what reads "
                        "text, got zero at every such module; was it trained? Leave it out of --adapters"
                    )
            reference = calibration.responses(self.adapters, protos, means)
            how = {key: getattr(self.settings, key) for key in ("temperature", "top_k", "false_alarm")}
            return Fitted.learn(
                self.adapters, protos, means, reference, calibration.confidence(), frame,
                calibration.prefix, **how,
            )  # fmt: skip

    def parts(self, query: Query) -> list[Parts]:
        """A query in what is its own and what stands around it; of a conversation each of its turns."""
        frame = self.settings.frame
        if query.messages:
            return self.template.turns(query.conversation, query.id)
        if frame == "none":
            return [bare(query.input)]
        if frame:
            return [within(query.input, frame)]
        return [parts_of_text(query.input, self.template.frame if self.template.known else None)]

    def turns(
        self, queries: Sequence[Query], rows: Sequence[Sequence[int]] = (), new: int = FRAMES
    ) -> list[list[Read]]:
        """What is read of each query: one text, or one for each of the user's messages in a conversation.

        Of a very long one the middle is left out before it is tokenised, since its ends alone are read.

        Args:
            rows: token ids of each query's prompt, if they are known; those of a bare prompt are read.
            new: at most so many frames of each kind that are not known yet; a text in another one is taken as
                it is.
        """
        parts, limit = [self.parts(query) for query in queries], self.settings.max_seq_len
        parts = self._in_frames(parts, new, {n for n, query in enumerate(queries) if query.messages})
        known = {n: tuple(row) for n, row in enumerate(rows) if parts[n][0].common == BARE}
        texts = [one.read for n, turns in enumerate(parts) for one in turns if n not in known]
        if limit is None:  # else the end of what is read may be in the middle
            texts = [text if len(text) <= 2 * ENDS else text[:ENDS] + text[-ENDS:] for text in texts]
        ids = iter(encode(self.tokenizer, texts, limit) if texts else [])
        counts = Counter(turns[-1].own for turns in parts if turns[-1].own != turns[-1].common)
        shared = {frame for frame, count in counts.most_common(new) if count >= SHARED} | self.fits.keys()
        return [
            [
                Read(
                    known[n] if n in known else tuple(next(ids)),
                    one.common,
                    one.own if one.own in shared and one.own != one.common else None,
                )
                for one in turns
            ]
            for n, turns in enumerate(parts)
        ]

    def _in_frames(self, parts: list[list[Parts]], new: int, talks: set[int]) -> list[list[Parts]]:
        """The parts of queries, of which few are in a frame that is not known yet.

        Args:
            talks: the numbers of conversations, whose template is a frame in any case.
        """
        plain = {n for n, turns in enumerate(parts) if turns[0].common == BARE} - talks
        edges = [frame for frame in self.fits if frame != BARE]
        if new and self.settings.frame is None:
            edges.append(usual([parts[n][0].text for n in plain], SHARED))
        counts = Counter(turns[0].common for n, turns in enumerate(parts) if n not in talks)
        allowed = {BARE, *self.fits, *(frame for frame, _ in counts.most_common(new))}
        for n, (one, *_) in enumerate(parts):
            if n in plain:
                found = (bare(one.text, edge) for edge in edges)
                parts[n] = [next((part for part in found if part.own != BARE), one)]
            elif n not in talks and one.common not in allowed:
                parts[n] = [bare(one.read)]
        return parts

    def prepare(self) -> None:
        """Fits the frames that a request may come in at any time: none, and the template."""
        self.fitted()
        if self.template.known:
            self.fitted(self.template.frame)

    def route(self, queries: Sequence[Query], rows: Sequence[Sequence[int]]) -> Routing:
        """Prototypes, probe and gate; no labels, no training, no pass with an adapter."""
        turns = self.turns(queries, rows)
        return decided(self.judged([read for reads in turns for read in reads]), list(map(len, turns)))

    def judged(self, reads: Sequence[Read]) -> Routing:
        """The routing of what was read.

        Under a system message that many queries share, an adapter is chosen as anywhere else. Whether it
        fits is the mean of two leads: one with the system message as a part of the query, and one with it as
        a part of the frame. It tells which adapter is likely, and stands above queries that none fits, too.
        """
        routing = self._judged([read._replace(shared=None) for read in reads])
        under = [n for n, read in enumerate(reads) if read.shared]
        if not under or routing.evidence is None:
            return routing
        again = [Read(read.ids, read.shared) for read in reads if read.shared]
        framed = self._judged(again, "framed").evidence
        assert framed is not None
        base_score = routing.evidence.base_score.copy()
        base_score[under] += (routing.evidence.lead[under] - framed.lead) / 2
        evidence = evidence_of([replace(routing.evidence, base_score=base_score), framed.rows(slice(0))])
        weights = routing.weights.copy()
        scores = np.nan_to_num(evidence.candidates[under].astype(np.float64), nan=-np.inf)
        weights[under] = self.fitted().gate.weights(scores)
        return Routing(weights, evidence)

    def _judged(self, reads: Sequence[Read], name: str = "part") -> Routing:
        """The routing of what was read, by `frame` alone; the same text is probed once.

        Args:
            name: under which the journal keeps its parts.
        """
        frames = {frame: n for n, frame in enumerate(dict.fromkeys(read.frame for read in reads))}
        prompts = sorted(dict.fromkeys(reads), key=lambda read: frames[read.frame])
        with self.context.processes.first():  # the others find prototypes and calibration on disk
            for frame in frames:
                self.fitted(frame)
        chunks = list(self._chunks(prompts))
        routing = joined([self._part(chunk, n, len(chunks), name) for n, chunk in enumerate(chunks)])
        if prompts == list(reads):  # as they are, without a copy
            return routing
        distinct = {read: n for n, read in enumerate(prompts)}
        return rows_of(routing, np.array([distinct[read] for read in reads]))

    def _chunks(self, prompts: Sequence[Read]) -> Iterator[list[Read]]:
        """Prompts of one frame, as many as are probed together."""
        chunk: list[Read] = []
        for read in prompts:
            if chunk and (read.frame != chunk[0].frame or len(chunk) == self.fitted(read.frame).at_once):
                yield chunk
                chunk = []
            chunk.append(read)
        if chunk:
            yield chunk

    def _part(self, prompts: Sequence[Read], number: int, of: int, name: str) -> Routing:
        """The routing of some prompts of one frame; their responses, which are large, go with it."""
        if kept := self.kept(f"{name}-{number}", len(prompts)):
            return kept
        fitted = self.fitted(prompts[0].frame)
        title = f"probe {number + 1}/{of}" if of > 1 else "probe"
        with self.stages("probe"):
            probed = self._probed(fitted, [read.ids for read in prompts], title)
        with self.stages("gate"):
            routing = Routing(*fitted.decide(probed))
        if of > 1:
            self.keep(f"{name}-{number}", routing)
        return routing

    def _probed(self, fitted: Fitted, prompts: Sequence[Sequence[int]], title: str) -> Probed:
        """Probes the prompts. Each process takes whole batches, which are the same as in one process."""
        model, pad = self.base.model, self.tokenizer.pad_token_id
        lengths = [len(row) for row in truncated(prompts)]
        mine = sorted(
            n
            for batch in by_length(lengths, tokens_at_once(model.device, model.dtype))
            if self.context.processes.takes(sum(lengths[n] for n in batch))
            for n in batch
        )
        own = fitted.probe(model, [prompts[n] for n in mine], pad, title)
        numbers, parts = zip(*self.context.processes.gathered((mine, own)), strict=True)
        place = np.argsort(np.concatenate(numbers))
        return Probed(*(np.concatenate(arrays)[place] for arrays in zip(*parts, strict=True)))
