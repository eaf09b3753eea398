"""`proto_route`: prototypes of the adapters' subspaces, gated softly by calibrated cosine."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from router.model.answer import Rows, by_length
from router.model.device import tokens_at_once
from router.model.frames import ALPACA, BARE, Frame, framing
from router.model.passes import truncated
from router.pipeline.calibration import Calibration
from router.pipeline.evidence import joined as together
from router.pipeline.fitted import Fitted
from router.pipeline.reading import BRIEF, FRAMES, Read, turns_of
from router.pipeline.result import Routing, joined
from router.pipeline.steps import Method
from router.queries.submission import Query
from router.routing.calibration import generic_prompts
from router.routing.gate import PrototypeGate
from router.routing.homes import EVERY, LEAST
from router.routing.probe import Probed
from router.routing.prototypes import ModulePrototypes, prototypes
from router.system.errors import InputError

FRAMES_BYTES = 1 << 29  # of what gates keep of generic text; beyond, no frame is added
ONE = 0.75  # share of the queries in a frame that one adapter hears best, above which it is that adapter's
SWITCH = 2.0  # standard deviations by which another candidate has to lead that of the turn before; and
TO_BASE = 1.0  # where one of them is the base model, since foreign questions are wrong with any adapter


def decided(routing: Routing, turns: Sequence[Sequence[Read]]) -> Routing:
    """The routing of conversations, from that of their turns.

    A conversation stays with its candidate until another one leads it by SWITCH, or TO_BASE; in a message of
    n words, fewer than BRIEF, by BRIEF / n times as much. So has a brief first message, or the
    conversation begins with the base model.

    Args:
        turns: what is read of each conversation.
    """
    routing = _begun(routing, turns)
    if len(routing.weights) == len(turns):
        return routing
    reads_of = [read for reads in turns for read in reads]
    assert routing.evidence is not None  # the gate keeps it
    scores = routing.evidence.candidates
    rows = list[int]()
    start = 0
    low = np.fmin.reduce(scores[:, :-1], axis=1, keepdims=True)  # who is not on the shortlist has no more
    scores = np.nan_to_num(np.where(np.isnan(scores), low, scores), nan=-np.inf)
    for reads in turns:
        row = start
        for turn, read in enumerate(reads[1:], start + 1):
            best, now = scores[turn].argmax(), scores[row].argmax()
            needed = TO_BASE if scores.shape[1] - 1 in (best, now) else SWITCH
            lead = (scores[turn, best] - scores[turn, now]) * min(1, read.words / BRIEF)
            agrees = best == now and read.words >= BRIEF  # "ok" makes nobody surer, or less sure
            if lead > needed or agrees:
                row = turn
        rows.append(row)
        start += len(reads)
    deciding = routing.rows(np.array(rows))
    later = np.array([reads_of[row].later for row in rows], np.float32)
    return Routing(deciding.weights, deciding.evidence and replace(deciding.evidence, later=later))


def _begun(routing: Routing, turns: Sequence[Sequence[Read]]) -> Routing:
    """The routing of turns in which a brief first message, such as "hi", has to lead by more."""
    starts = np.cumsum([0, *map(len, turns)])[:-1]
    brief = np.array([reads[0].words for reads in turns]) / BRIEF
    starts, brief = starts[brief < 1], brief[brief < 1]
    if routing.evidence is None or not len(starts):
        return routing
    lead = routing.evidence.lead[starts]
    short = (lead > 0) & (lead * brief <= TO_BASE)
    rows, lead, brief = starts[short], lead[short], brief[short]
    weights, base_score = routing.weights.copy(), routing.evidence.base_score.copy()
    weights[rows] = np.eye(weights.shape[1])[-1]
    base_score[rows] += lead - lead * brief + TO_BASE  # by what the lead lacks
    return Routing(weights, replace(routing.evidence, base_score=base_score))


class ProtoRoute(Method):
    """Routes by how strongly the base model's activations align with each adapter's input subspace.

    A query that stands out no more than generic text in the same frame goes to the base model; docs/method.md
    has the equations.

    Attributes:
        elsewhere: reads prompts in place of the base model here, whose copy is another program's; gives what
            `Fitted.probe` does.
    """

    sharp = True
    elsewhere: Callable[[Fitted, Rows], Probed] | None = None

    @cached_property
    def fits(self) -> dict[Frame, Fitted]:
        """The library in each frame that came so far, also in those that are not known."""
        return {}

    @property
    def forms(self) -> list[Frame]:
        """In which adapters are usually trained, beside bare prompts; form n is the n-th, from 1 on."""
        template = self.template.usable
        alike = template is not None and template.after.strip() == ALPACA.after.strip()
        return [*([] if alike else [ALPACA]), *filter(None, [template])]

    @cached_property
    def prototypes(self) -> dict[str, ModulePrototypes]:
        """The adapters' prototypes by module."""
        with self.stages("prototypes"):
            return prototypes(self.adapters, str(self.base.model.device), self.base.model.dtype)

    def fitted(self, frame: Frame = BARE) -> Fitted:
        """Prototypes, and a gate that is calibrated on generic text in a frame; made on first use."""
        if frame not in self.fits:
            self.fits[frame] = self.learned(frame)
        return self.fits[frame]

    def learned(self, frame: Frame) -> Fitted:
        """Fits the library in a frame, whether or not `fits` holds it."""
        bare = None if frame == BARE else self.fitted()
        protos = bare.prototypes if bare else self.prototypes
        with self.stages("calibrate"):
            calibration = Calibration(self.base, self.settings.max_seq_len, frame)
            means = calibration.means(list(protos))
            if bare:
                generic = calibration.measured(self.adapters, protos, means, len(bare.names))
                ends = [form.after.strip() for form in self.forms]
                end = frame.after.strip()
                return bare.in_frame(generic, 1 + ends.index(end) if end in ends else 0)
            protos = {module: protos[module] for module in means}
            present = {owner for proto in protos.values() for owner in proto.owners.tolist()}
            for number, adapter in enumerate(self.adapters):
                if number not in present:
                    raise InputError(
                        f"adapter {adapter.name} ({adapter.folder.path}): expected an update of what reads "
                        "text, got zero at every such module; was it trained? Leave it out of --adapters"
                    )
            generic = calibration.measured(self.adapters, protos, means)
            enough = len(self.adapters) >= 2 * LEAST  # for two groups
            forms = [self._in_form(form, protos) for form in self.forms if enough]
            how = {name: getattr(self.settings, name) for name in PrototypeGate().get_params()}
            return Fitted.learn(self.adapters, protos, generic, forms, **how)

    def _in_form(self, form: Frame, protos: Mapping[str, ModulePrototypes]) -> NDArray[np.float32]:
        """The adapters' responses to some generic text in a form, (prompts, adapters, modules, 2)."""
        texts = [form.around(text) for text in generic_prompts()[::EVERY]]
        calibration = Calibration(self.base, self.settings.max_seq_len, form, texts)
        return calibration.responses(self.adapters, protos, calibration.means(list(protos)))

    def turns(
        self, queries: Sequence[Query], new: int = FRAMES, asked: Counter[Frame] | None = None
    ) -> list[list[Read]]:
        """The reads of each query, see `turns_of`; in no new frame once they fill their memory."""
        known = list(dict.fromkeys([*self.known, *self._named]))
        if self.full:
            for frame in self.fits.keys() - {BARE, *known}:  # of other queries
                del self.fits[frame]
        return turns_of(queries, self.template, self.settings, known, 0 if self.full else new, asked)

    @property
    def _named(self) -> list[Frame]:
        """The frame that --frame names, if it names one."""
        frame = self.settings.frame
        return [framing(frame)] if frame not in (None, "none") else []

    @property
    def full(self) -> bool:
        """Whether all frames together take FRAMES_BYTES."""
        return sum(fitted.gate.reference_.nbytes for fitted in list(self.fits.values())) >= FRAMES_BYTES

    def prepare(self) -> None:
        """Fits the frames that are known, and those of any request: none, the template's, and --frame."""
        usable = filter(None, [self.template.usable])
        self.known = list(dict.fromkeys([BARE, *usable, *self._named, *self.known]))
        for frame in self.known:
            self.fitted(frame)

    def route(self, queries: Sequence[Query], rows: Rows) -> Routing:
        """Prototypes, probe and gate; no labels, no training, no pass with an adapter."""
        turns = self.turns(queries)
        return decided(self.judged([read for reads in turns for read in reads]), turns)

    def judged(self, reads: Sequence[Read]) -> Routing:
        """The routing of what was read.

        Under a system message that many queries share, an adapter is chosen as anywhere else. Whether it
        fits is the mean of two leads: one with the system message as a part of the query, and one with it as
        a part of the frame. A system message tells which adapter is likely, but foreign queries have it, too.
        """
        routing = self._judged([replace(read, shared=None) for read in reads])
        if routing.evidence is None:
            return routing
        of_one = self._of_one_adapter(reads, routing.evidence.best)
        under = [n for n, read in enumerate(reads) if read.shared and read.shared not in of_one]
        if not under:
            return routing
        again = [Read(reads[n].under, reads[n].shared or BARE) for n in under]
        in_frame = self._judged(again, "framed")
        framed = in_frame.evidence
        assert framed is not None
        base_score = routing.evidence.base_score.copy()
        base_score[under] += (routing.evidence.lead[under] - framed.lead) / 2
        evidence = replace(routing.evidence, base_score=base_score)
        around = {reads[n].shared: evidence.frames.index(list(reads[n].frame)) for n in under}
        thresholds = [  # means, as the lead is
            {
                rate: (value + evidence.thresholds[around[Frame(*frame)]][rate]) / 2
                for rate, value in by_rate.items()
            }
            for frame, by_rate in zip(framed.frames, framed.thresholds, strict=True)
        ]
        evidence = together([evidence, replace(framed.rows(slice(0)), thresholds=thresholds)])
        evidence.frame[under] = [evidence.frames.index(list(read.frame)) for read in again]
        weights = routing.weights.copy()
        scores = np.nan_to_num(evidence.candidates[under].astype(np.float64), nan=-np.inf)
        mixed = self.fitted().gate.weights(scores)
        unread = (weights[under, -1] == 1) & (in_frame.weights[:, -1] == 1)  # or as far from any adapter
        weights[under] = np.where(unread[:, None], weights[under], mixed)
        return Routing(weights, evidence)

    def _of_one_adapter(self, reads: Sequence[Read], best: NDArray[np.int64]) -> set[Frame]:
        """New frames of bare prompts that are an adapter's instruction: it hears most queries best."""
        under: dict[Frame, list[int]] = {}
        for read, adapter in zip(reads, best.tolist(), strict=True):
            if read.shared and read.frame == BARE and read.shared not in self.known:
                under.setdefault(read.shared, []).append(adapter)
        return {frame for frame, heard in under.items() if max(Counter(heard).values()) > ONE * len(heard)}

    def _judged(self, reads: Sequence[Read], name: str = "part") -> Routing:
        """The routing of what was read, by `frame` alone; the same text is probed once, kept as `name`."""
        by_frame: dict[Frame, list[Read]] = {}
        for read in dict.fromkeys(reads):
            by_frame.setdefault(read.frame, []).append(read)
        with self.context.processes.first():  # the others find prototypes and calibration on disk
            at_once = {frame: self.fitted(frame).at_once for frame in by_frame}
        chunks = [
            part[start : start + at_once[frame]]
            for frame, part in by_frame.items()
            for start in range(0, len(part), at_once[frame])
        ]
        routing = joined([self._part(chunk, n, len(chunks), name) for n, chunk in enumerate(chunks)])
        prompts = [read for chunk in chunks for read in chunk]
        if prompts == list(reads):  # as they are, without a copy
            return routing
        distinct = {read: n for n, read in enumerate(prompts)}
        return routing.rows(np.array([distinct[read] for read in reads]))

    def _part(self, prompts: Sequence[Read], number: int, count: int, name: str) -> Routing:
        """The routing of some prompts of one frame; their responses, which are large, go with it."""
        if kept := self.kept(f"{name}-{number}", len(prompts)):
            return kept
        fitted = self.fitted(prompts[0].frame)
        title = f"probe {number + 1}/{count}" if count > 1 else "probe"
        with self.stages("probe"):
            probed = self._probed(fitted, [read.ids for read in prompts], title)
        with self.stages("gate"):
            routing = Routing(*fitted.decide(probed))
        if count > 1:
            self.keep(f"{name}-{number}", routing)
        return routing

    def _probed(self, fitted: Fitted, prompts: Rows, title: str) -> Probed:
        """Probes the prompts. Each process takes whole batches, which are the same as in one process."""
        if self.elsewhere is not None:
            return self.elsewhere(fitted, truncated(prompts))
        model = self.base.model
        pad = self.tokenizer.pad_token_id
        lengths = [len(row) for row in truncated(prompts)]
        mine = sorted(
            n
            for batch in by_length(lengths, tokens_at_once(model.device, model.dtype))
            if self.context.processes.takes(sum(lengths[n] for n in batch))
            for n in batch
        )
        probed = fitted.probe(model, [prompts[n] for n in mine], pad, title)
        numbers, parts = zip(*self.context.processes.gathered((mine, probed)), strict=True)
        place = np.argsort(np.concatenate(numbers))
        return Probed(*(np.concatenate(arrays)[place] for arrays in zip(*parts, strict=True)))
