"""What each choice of the gate is worth: `python -m scripts.docs.ablate > docs/ablations.md`.

The labelled queries are measured anew for the rows that change what is measured. The other rows are settings
of the package's own gate. Reads labels, so nothing that routes may import it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.constants import BASE_COLUMN, LIBRARY
from router.library.adapters import Adapter, load_library
from router.model.answer import encode
from router.model.base import EMBEDDED, Base, load_base
from router.model.passes import truncated
from router.routing.calibration import Calibration
from router.routing.gate import PrototypeGate
from router.routing.probe import probe
from router.routing.prototypes import ModulePrototypes, prototypes
from scripts.bench.markdown import header, row
from scripts.bench.score import labelled, routed

Array = NDArray[np.float64]
SETS = ("eval", "eval_unseen")
END_WEIGHTS = (0.0, 0.5, 1.0)
FALSE_ALARMS = (0.05, 0.1, 0.2)
END = "the end of a prompt counts {:g} times its whole"
SETTINGS: dict[str, dict[str, Any]] = {  # of the gate, by the title of their row
    "**as it is**": {},
    **{f"at most {share:.0%} false alarms": {"false_alarm": share} for share in FALSE_ALARMS},
    **{END.format(weight): {"end_weight": weight} for weight in END_WEIGHTS},
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "first direction": lambda share: (share == share.max()).float(),
    "equal": torch.ones_like,
    "S^2": torch.square,
}


def reweighted(proto: ModulePrototypes, rule: Callable[[Tensor], Tensor]) -> ModulePrototypes:
    """The same directions, weighted otherwise within each adapter."""
    weights = torch.zeros_like(proto.weights)
    for owner in set(proto.owners.tolist()):
        mine = proto.owners == owner
        changed = rule(proto.weights[mine])
        weights[mine] = changed / changed.sum()
    return replace(proto, weights=weights)


def measure(base: Base, adapters: list[Adapter], rows: list[list[int]]) -> tuple[dict[str, Any], list[str]]:
    """Responses, (prompts, adapters, modules, 2), as they are and otherwise; and the modules."""
    protos = prototypes(adapters, str(base.model.device), base.model.dtype)
    means = Calibration(base).means(list(protos))

    def responses(protos: dict[str, ModulePrototypes], means: dict[str, Tensor], title: str) -> Any:
        pad = base.tokenizer.pad_token_id
        return probe(base.model, rows, pad, protos, means, len(adapters), title)

    found = {"**as it is**": responses(protos, means, "as it is")}
    nothing = {module: torch.zeros_like(mean) for module, mean in means.items()}
    found["statistic: mean, not centred"] = responses(protos, nothing, "not centred")
    for name, rule in WEIGHTS.items():
        changed = {module: reweighted(proto, rule) for module, proto in protos.items()}
        found[f"directions weighted: {name}"] = responses(changed, means, name)
    return found, list(protos)


def scores(responses: Any, reference: Any, **settings: Any) -> Array:
    """The scores of a gate with other settings, (prompts, adapters)."""
    return PrototypeGate(**settings).fit(reference).decision_function(responses)


def choices(responses: Any, reference: Any, **settings: Any) -> NDArray[np.int64]:
    """The candidates that a gate with other settings chooses, (prompts,); the last is the base model."""
    return PrototypeGate(**settings).fit(reference).predict(responses)


def main() -> None:
    """Measures and prints the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    base, adapters = load_base(EMBEDDED), load_library([str(LIBRARY)])
    candidates, n = [*(adapter.name for adapter in adapters), BASE_COLUMN], len(adapters)
    sets = {name: labelled(name) for name in SETS}
    labels = [label for rows in sets.values() for label in rows["adapter"]]
    texts = [text for rows in sets.values() for text in rows["input"]]
    of_set = np.repeat(SETS, [len(rows) for rows in sets.values()])
    calibration, rows = Calibration(base), truncated(encode(base.tokenizer, texts))
    generic = len(calibration.rows)
    measured, modules = measure(base, adapters, [*calibration.rows, *rows])
    has = np.array([label != BASE_COLUMN for label in labels])

    def told(title: str, top: NDArray[np.int64]) -> None:
        right = np.array([routed(candidates[k], label) for k, label in zip(top, labels, strict=True)])
        shares = [f"{right[(of_set == name) & has].mean():.3f}" for name in SETS]
        left = f"{right[(of_set == SETS[1]) & ~has].mean():.3f}" if (top == n).any() else ""
        print(row(title, *shares, left))

    def head(title: str) -> None:
        columns = ["gate", "own phrasing", "other phrasings", "no adapter"]
        print("", f"## {title}", "", *header(columns), sep="\n")

    print(f"""# What each choice of the gate is worth

The first two columns have the routing accuracy on `data/eval` (own phrasing) and `data/eval_unseen` (other
phrasings), over the queries that have an adapter. The last column has the share of queries without an adapter
that go to the base model, where it is a candidate. {n} adapters, {generic} generic prompts. Made by
`python -m scripts.docs.ablate`.""")
    head("Scores, among the adapters")
    for title, responses in measured.items():
        told(title, scores(responses[generic:], responses[:generic]).argmax(1))
    reference, responses = np.split(measured["**as it is**"], [generic])
    for weight in END_WEIGHTS:
        told(END.format(weight), scores(responses, reference, end_weight=weight).argmax(1))
    told("no calibration: largest mean cosine", np.nanmean(responses[..., 0], 2).argmax(1))
    depth = np.array([int(module.split(".")[2]) for module in modules])
    for share, what in ((1 / 3, "first third"), (2 / 3, "first two thirds")):
        some = depth < share * (depth.max() + 1)
        found = scores(responses[:, :, some], reference[:, :, some])
        told(f"only the {what} of the layers", found.argmax(1))
    for count in (20, 40, 80):
        fewer = reference[:: generic // count][:count]
        told(f"{count} generic prompts", scores(responses, fewer).argmax(1))
    told("calibrated against the queries themselves", scores(responses, responses).argmax(1))
    mine = np.array([label == candidates[0] for label in labels])
    skewed = np.concatenate([responses[mine], responses[~mine][::20]])
    told("the same, when most queries are from one task", scores(responses, skewed).argmax(1))

    head("The base model as a candidate")
    for title, changed in SETTINGS.items():
        told(title, choices(responses, reference, **changed))


if __name__ == "__main__":
    main()
