"""The libraries that choices are made on, with labelled queries: those of them that are at hand.

No constant is chosen by the libraries that it is shown on. `data/library` is in every clone, and so are the
foreign queries of data/eval_foreign that no adapter of any was made for. `families` and `otherbase` are made
by `python -m scripts.library.development`; `second`, `devset_b` and `devset_c` stand beside the repository,
and so do the FLAN queries. `devset_c` has a base model of its own, made by `base.sh` in its folder.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from router.constants import BASE_COLUMN, LIBRARY
from router.model.base import EMBEDDED
from router.queries.submission import GENERATION
from scripts.bench.score import labelled, read_texts
from scripts.library.tasks.conversations import ALPACA

COMMITTED = "committed"  # data/library
BUILT = Path("output/development")
SHARED = Path("../shared")
CHATS = ("chat", "chat_otherbase")
FOLDERS = {"second": SHARED / "devset"} | {name: SHARED / name for name in ("devset_b", "devset_c")}
FOLDERS |= {name: BUILT / name for name in ("families", "otherbase", *CHATS)}
GEMMA = BUILT / "otherbase/base"
BASES = {"devset_c": BUILT / "devset_c/base", "otherbase": GEMMA, CHATS[1]: GEMMA}
# Adapters of one base model that were trained on bare prompts, in an Alpaca frame, and on chats.
MIXED = "mixed"
# Of one adapter: own and other phrasings, multiple choice; and of conversations, a job after small talk or
# another job, and a message that says nothing itself after a job.
FITS = ("own", "unseen", "mc", "turns", "follow")
# Of none: no task of the library, of no library, FLAN's; and of conversations, a foreign question after a
# job, and under the system message of an adapter.
FOREIGN = ("none", "foreign", "flan", "change", "under")
SPLITS = (*FITS, *FOREIGN)
FORMS = ("bare", "Alpaca", "chat")  # of foreign queries, in turn
# FLAN's tasks that are an adapter's very skill: they are no foreign queries of these libraries.
KIN = {
    "second": ("sst2", "yelp_polarity_reviews", "e2e_nlg"),
    "devset_b": ("wmt16_translate_csen", "wmt16_translate_fien"),
    COMMITTED: ("wmt16_translate_csen", "wmt16_translate_fien"),
}


@dataclass(frozen=True)
class Labelled:
    """A library and queries of which the right adapter is known.

    Attributes:
        name: of the library.
        adapters: its folders; what else belongs to the library stands beside the first.
        base: what `load_base` takes.
        rows: one a query, with the columns id, task, split (of SPLITS), input, messages (JSON, or nothing),
            eval_type, answer_choices, target, metric, and adapter (`base` where none fits).
    """

    name: str
    adapters: tuple[Path, ...]
    base: str
    rows: pd.DataFrame


def libraries() -> Iterator[Labelled]:
    """Those at hand, the committed one last."""
    for name in FOLDERS:
        if _at_hand(name):
            yield _of_folder(name)
    if _at_hand("otherbase") and _at_hand(CHATS[1]):
        yield _mixed()
    own, unseen = labelled("eval"), labelled("eval_unseen")
    foreign = unseen["adapter"] == BASE_COLUMN
    rows = [own.assign(split="own"), unseen.assign(split=foreign.map({True: "none", False: "unseen"}))]
    yield _of(COMMITTED, LIBRARY, EMBEDDED, pd.concat(rows).assign(metric="exact"))


def _at_hand(name: str) -> bool:
    return (FOLDERS[name] / "labels.csv").exists() and (name not in BASES or BASES[name].is_dir())


def _of_folder(name: str) -> Labelled:
    """A library in a folder: library/, labels.csv, and queries.csv or queries.jsonl.

    Foreign queries are asked as conversations where the others are some.
    """
    folder = FOLDERS[name]
    rows = _asked(folder).merge(read_texts(folder / "labels.csv"), on="id")
    rows["adapter"] = rows["task"].where(rows["split"].isin(FITS), BASE_COLUMN)
    found = _of(name, folder / "library", str(BASES.get(name, EMBEDDED)), rows)
    if name in CHATS:
        outside = found.rows["split"].isin(["foreign", "flan"])
        talks = [json.dumps([{"role": "user", "content": text}]) for text in found.rows.loc[outside, "input"]]
        found.rows.loc[outside, "messages"] = talks
    return found


def _asked(folder: Path) -> pd.DataFrame:
    """The queries of a library."""
    if (file := folder / "queries.csv").exists():
        return read_texts(file)
    lines = [json.loads(line) for line in file.with_suffix(".jsonl").read_text("utf-8").splitlines()]
    rows = pd.DataFrame(lines, columns=["id", "input", "messages"]).fillna("").assign(eval_type=GENERATION)
    rows["messages"] = [json.dumps(talk) if talk else "" for talk in rows["messages"]]
    return rows


def _mixed() -> Labelled:
    """The bare and the other adapters of Gemma; foreign queries are asked in three forms."""
    bare, chats = _of_folder("otherbase"), _of_folder(CHATS[1])
    rows = pd.concat([chats.rows, bare.rows[bare.rows["split"].isin(FITS)]], ignore_index=True)
    rows["id"] = [f"{n} {own}" for n, own in enumerate(rows["id"])]  # two libraries number theirs alike
    for n, k in enumerate(rows.index[rows["split"] == "foreign"]):
        form = FORMS[n % len(FORMS)]
        rows.loc[k, "task"] = f"{form}: {rows.loc[k, 'task']}"
        if form != "chat":
            rows.loc[k, "messages"] = ""
        if form == "Alpaca":
            rows.loc[k, "input"] = ALPACA.format(rows.loc[k, "input"])
    return Labelled(MIXED, (*chats.adapters, *bare.adapters), chats.base, rows)


def _of(name: str, adapters: Path, base: str, rows: pd.DataFrame) -> Labelled:
    columns = ["id", "task", "split", "input", "messages", "eval_type", "answer_choices", "target", "metric"]
    parts = [rows, labelled("eval_foreign").assign(split="foreign")]
    if (folder := SHARED / "foreign48").is_dir():
        flan = read_texts(folder / "queries.csv").merge(read_texts(folder / "labels.csv"), on="id")
        flan["metric"] = flan["metric"].replace({"rouge": "rougeL", "bleu": "rougeL"})
        flan = flan[~flan["task"].isin(KIN.get(name, ()))]
        parts.append(flan.assign(id="flan " + flan["id"], split="flan", adapter=BASE_COLUMN))
    every = pd.concat(parts, ignore_index=True)
    for column in ("messages", "answer_choices"):
        every[column] = every.get(column, pd.Series("", every.index)).fillna("")
    return Labelled(name, (adapters,), base, every[[*columns, "adapter"]])
