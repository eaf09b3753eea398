"""Reads of a query: the tokens, and the frame in which they are compared with generic text.

A prompt is read as it is, a conversation by each message of the user under its system message.
"""

import logging
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache

from router.model.answer import cut, encode
from router.model.frames import BARE, Frame, Parts, bare, framing, turns_of_text, usual, within
from router.model.passes import ENDS, MAX_TOKENS, ends_of, headed
from router.model.template import Template
from router.queries.submission import Query
from router.routing.calibration import generic_prompts
from router.settings import Settings
from router.system.errors import InputError

log = logging.getLogger(__name__)

FRAMES = 8  # that one batch of queries may bring
TURNS = 8  # of a conversation; each may be a pass of the base model
BRIEF = 6  # words; the lead in a message with fewer counts less, since "shorter, please" says little
COUNTED = 256  # frames whose requests are counted
SHARED = 16  # queries make their system message a frame; to calibrate one costs as much as 230 queries


@dataclass(frozen=True)
class Read:
    """A read of a query; it is the same wherever it stands."""

    ids: tuple[int, ...]  # the tokens
    frame: Frame  # in which it is compared with generic text
    shared: Frame | None = None  # the frame with a system message that many queries have, if it has one
    words: int = BRIEF  # of the message; a first one with more around it than the template counts as long
    later: int = field(default=0, compare=False, repr=False)  # how many messages of the user follow
    under: tuple[int, ...] = field(default=(), compare=False, repr=False)  # the tokens read in `shared`


def parts_of(query: Query, template: Template, settings: Settings) -> list[Parts]:
    """A query in what is its own and what stands around it; of a conversation each of its last turns."""
    if settings.frame == "none" and not query.messages:
        return [bare(query.input)]
    if settings.frame and not query.messages and (told := within(query.input, settings.frame)).common != BARE:
        return [told]
    if query.messages:
        turns = template.turns(query.conversation, query.id)
    else:
        text = template.undated(query.input.removeprefix(template.first))
        turns = turns_of_text(text, template.usable, template.format)
    return _telling([turn._replace(later=len(turns) - n) for n, turn in enumerate(turns, 1)])


def check_frame(queries: Sequence[Query], frame: str | None) -> None:
    """Warns of prompts that do not stand in --frame.

    Raises:
        InputError: none does.
    """
    plain = [query.input for query in queries if not query.messages]
    edge = framing(frame or "")
    if frame != "none" and (outside := sum(bare(text, edge).own != edge for text in plain)):
        said = f"{outside} of {len(plain)} prompts do not begin and end as --frame {frame!r} says"
        if outside == len(plain):
            raise InputError(f"{said}; in bash, $'\\n' is a line break; or leave --frame out")
        log.warning("%s; they count as bare text, or in a format that is known", said)


def _telling(turns: list[Parts]) -> list[Parts]:
    """At most TURNS of a conversation: the last ones, but of those before the end the briefest go first."""
    if len(turns) <= TURNS:
        return turns
    rank = sorted(range(len(turns) - 1), key=lambda n: min(turns[n].words, BRIEF))  # stable: older ones first
    return [turns[n] for n in sorted(rank[1 - TURNS :])] + turns[-1:]


def turns_of(
    queries: Sequence[Query],
    template: Template,
    settings: Settings,
    known: Collection[Frame],
    new: int,
    asked: Counter[Frame] | None,
) -> list[list[Read]]:
    """The reads of each query: one text, or one for each of the user's messages in a conversation.

    The middle of a very long one is left out before it is tokenised, since its ends alone are read. With
    --max_seq_len nothing is, since that limit cuts tokens.

    Args:
        known: the frames that came before.
        new: the most frames of each kind beside these; a text in one more is taken as it is.
        asked: counts the system messages and the like, each as a frame.
    """
    parts = [parts_of(query, template, settings) for query in queries]
    limit = settings.max_seq_len
    talks = {n for n, query in enumerate(queries) if query.messages}
    parts = _in_frames(parts, talks, known, new, settings.frame is None, template.usable or BARE)
    every = [one for turns in parts for one in turns]
    most = sys.maxsize if limit else ENDS
    texts = [ends_of(ends_of(one.head, most // 4) + one.text + one.tail, most) for one in every]
    ids = iter(encode(template.tokenizer, texts))
    counts = Counter(turns[-1].own for turns in parts if turns[-1].own != turns[-1].common)
    if asked is not None:
        _count(asked, counts)
    shared = {*known, *(frame for frame in _ranked(counts)[:new] if counts[frame] >= SHARED)}

    def read(n: int, one: Parts) -> Read:
        whole = next(ids)
        tokens = cut(whole, limit, n in talks)  # as it is asked
        head = heads(one.head) if one.head and (not limit or len(whole) < limit) else 0
        under = tuple(headed(tokens, head, frame=True))
        if one.head == one.common.before:
            tokens = list(under)
        elif len(tokens) > MAX_TOKENS:
            tokens = headed(tokens, head)
        under_message = one.own in shared and one.own != one.common
        frame, read_in_it = (one.own, under) if under_message else (None, ())
        told = one is parts[n][0] and not one.own == one.common == template.usable
        words = max(BRIEF, one.words) if told else one.words
        return Read(tuple(tokens), one.common, frame, words, one.later, read_in_it)

    heads = cache(lambda head: len(encode(template.tokenizer, [ends_of(head, most // 4)])[0]))
    return [[read(n, one) for one in turns] for n, turns in enumerate(parts)]


def _ranked(counts: Counter[Frame]) -> list[Frame]:
    """The most frequent first; of equally many in the order of their texts, whatever that of the queries."""
    return sorted(counts, key=lambda frame: (-counts[frame], frame))


def _count(asked: Counter[Frame], counts: Counter[Frame]) -> None:
    """Adds counts of frames; of very many the rarest are forgotten, since clients make them up."""
    asked.update({frame: count for frame, count in counts.items() if sum(map(len, frame)) <= 2 * ENDS})
    if len(asked) > COUNTED:
        rare = asked.most_common()[COUNTED // 2 :]
        for frame, _ in rare:
            del asked[frame]


def _in_frames(
    parts: list[list[Parts]], talks: set[int], known: Collection[Frame], new: int, finds: bool, talk: Frame
) -> list[list[Parts]]:
    """The parts of queries, of which few are in a frame that is not known yet."""
    plain = {n for n, turns in enumerate(parts) if turns[0].common == BARE} - talks
    edges = [frame for frame in known if frame != BARE] if finds else []
    if new and finds:
        new_edge = usual([parts[n][0].text for n in plain], SHARED)
        # What generic text has as well, such as a last line `Answer:`, needs no frame.
        edges += [new_edge] if all(bare(text, new_edge).own == BARE for text in generic_prompts()) else []
    mark = talk.after.strip()
    counts = Counter(turns[0].common for turns in parts if turns[0].common not in (BARE, talk))

    def odd(frame: Frame) -> bool:
        """Whether a few texts alone begin their answers so, in the template."""
        after = frame.after.strip()
        return bool(mark) and after.startswith(mark) and after != mark and counts[frame] < SHARED

    allowed = {BARE, talk, *known, *[frame for frame in _ranked(counts) if not odd(frame)][:new]}
    framed = list(parts)
    # A conversation in no other frame takes the template's: some templates write a system message after the
    # user's, so that each makes another frame. So does a prompt that ends like it.
    for n, (one, *_) in enumerate(parts):
        if n in plain:
            tried = (bare(one.text, edge) for edge in edges)
            framed[n] = [next((part for part in tried if part.own != BARE), one)]
        elif one.common not in allowed and n in talks:
            framed[n] = [part._replace(common=talk) for part in parts[n]]
        elif one.common not in allowed and mark and one.tail.strip().startswith(mark):
            framed[n] = [part._replace(common=talk, tail=talk.after) for part in parts[n]]
        elif one.common not in allowed:
            framed[n] = [bare(parts[n][-1].read)]
    return framed
