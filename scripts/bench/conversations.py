"""What of a conversation tells its adapter: `python -m scripts.bench.conversations`.

Routes the conversations of the development libraries by four readings, and writes the table of
docs/serving.md: shares of the conversations whose candidate is the right one. Nothing is answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

from router.constants import BASE_COLUMN
from router.library.adapters import load_library
from router.methods.proto_route import ProtoRoute
from router.model.base import load_base
from router.model.frames import Frame, Parts
from router.pipeline.context import Context
from router.queries.submission import GENERATION, Query
from router.settings import Settings
from scripts.bench.development import CHATS, Labelled, libraries
from scripts.bench.markdown import header, insert, row

PAGE = Path("docs/serving.md")
SPLITS = {"turns": "a job after others", "follow": "a follow-up", "change": "a foreign question after a job"}


def whole(method: ProtoRoute, query: Query) -> list[Parts]:
    """All of a conversation in one text."""
    before, after = method.template.frame
    text = method.template.text(query.conversation)
    start = len(before) if text.startswith(before) else 0
    return [Parts(text[:start], text[start : len(text) - len(after)], after, Frame(before, after))]


READINGS: dict[str, Callable[[ProtoRoute, Query], list[Parts]]] = {
    "the whole conversation": whole,
    "the first message": lambda method, query: method.template.turns(query.conversation)[:1],
    "the last message": lambda method, query: method.template.turns(query.conversation)[-1:],
    "each message, and stay": lambda method, query: method.template.turns(query.conversation),
}


def measured(of: Labelled) -> Iterator[tuple[str, dict[str, float]]]:
    """By reading, the share of each split whose candidate is the right one."""
    rows = of.rows[of.rows["split"].isin(SPLITS)]
    file = of.adapters.parent / "template.jinja"
    settings = Settings(chat_template=file if file.exists() else None)
    base, adapters = load_base(of.base), load_library([str(of.adapters)])
    names = [*(adapter.name for adapter in adapters), BASE_COLUMN]
    talks = zip(rows["id"], rows["messages"], strict=True)
    queries = [Query(own, json.dumps(json.loads(text)), GENERATION, (), text) for own, text in talks]
    method = ProtoRoute("proto_route", base, adapters, Context(settings))
    for reading, parts in READINGS.items():
        with patch("router.pipeline.reading.parts_of", lambda query, *_, parts=parts: parts(method, query)):
            tops = method.route(queries, ()).weights.argmax(1)
        right = rows.assign(right=[names[top] for top in tops] == rows["adapter"].to_numpy())
        shares = right.groupby("split")["right"].mean()
        yield reading, {split: float(shares[split]) for split in SPLITS}


def main() -> None:
    """Measures, and writes the table."""
    lines = header(["library", "read", *SPLITS.values()], texts=2)
    for of in libraries():
        if of.name in CHATS:
            for reading, shares in measured(of):
                lines.append(row(of.name, reading, *(f"{shares[split]:.2f}" for split in SPLITS)))
    insert(PAGE, "conversations", lines)


if __name__ == "__main__":
    main()
