"""What a method is: the starter kit's contract, and the shorter one of the methods that route.

A method is one file in router/methods/. It subclasses either `Merges`, as in the competition's
starter kit, so that a kit user's file drops in with its import line changed; or `Routed`, and
then it says one thing only: which weights each query gets; or `Static`, and then it says how all
adapters' updates of one module become one; or `PerToken` of router/per_token.py, and then it says
how strongly a token calls each adapter of a module.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merge.factors import Factors
from merge.folders import write_adapter
from router.adapters import Adapter, base_of, check_against_base, load_library
from router.base import EMBEDDED, EMBEDDED_ID, Base, linear_shapes, load_base
from router.clusters import Array, Clusters, cluster
from router.constants import COMPETITION, COMPETITION_BASE
from router.evidence import Evidence
from router.model_card import write_card
from router.predict import Answer, answer, encode
from router.progress import progress
from router.settings import Settings
from router.stages import Stages
from router.submission import GENERATION, MULTIPLE_CHOICE, Query
from router.variants import Hotswap, Variant, complete, decide, limited, swap_order, write_variant

KIT_BATCH = 8  # queries handed to a kit method at once, where --batch_size says nothing


class Merges:
    """The starter kit's contract (llm-merging/LLM-Merging, `merging/Merges.py`).

    A subclass sets `list_models`, `base_model_name` and so on, and its `merge` fills
    `base_model` and `merged_model`. A batch is a dictionary of lists: `input`, and for multiple
    choice `answer_choices`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.settings = Settings()
        self.stages = Stages()
        self.list_models: list[tuple[str, str | None]] = []
        self.loaded_models: dict[str, Any] = {}
        self.loaded_configs: dict[str, Any] = {}
        self.merged_model: dict[str, Any] = {}
        self.base_model_name: str | None = None
        self.base_model_revision_id: str | None = None
        self.base_model: Any = None
        self.tokenizer: Any = None
        self.max_seq_len: int | None = None
        self.max_gen_len: int | None = None
        self.device: Any = None
        self.architecture = "decoder"

    def get_name(self) -> str:
        """The method's name."""
        return self.name

    def merge(self) -> Any:
        """Loads what it needs and returns the merged model."""
        raise TypeError(f"method {self.name} brings no merge()")

    def save_model(self, output_dir: str | Path) -> None:
        """Writes the merged weights as safetensors."""
        from safetensors.torch import save_file

        if not self.merged_model:
            raise ValueError(f"method {self.name}: nothing merged yet, call merge() first")
        save_file(self.merged_model, Path(output_dir) / "merged_model.safetensors")

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Answers queries in order, batch by batch through the kit's two calls."""
        answers: dict[int, Answer] = {}
        size = self.settings.batch_size or KIT_BATCH
        kinds: dict[int, list[int]] = {}  # the kit's batches have one number of choices throughout
        for n, query in enumerate(queries):
            choices = len(query.choices) if query.eval_type == MULTIPLE_CHOICE else 0
            kinds.setdefault(choices, []).append(n)
        for choices, members in kinds.items():
            for start in range(0, len(members), size):
                part = members[start : start + size]
                batch: dict[str, list[Any]] = {"input": [queries[n].input for n in part]}
                if choices:
                    batch["answer_choices"] = [list(queries[n].choices) for n in part]
                    indices, scores = self.predict_multiple_choice(batch)
                    for n, index, row in zip(part, indices, scores, strict=True):
                        answers[n] = Answer(str(int(index)), scores=tuple(map(float, row)))
                else:
                    for n, ids, text in zip(part, *self.generate(batch), strict=True):
                        answers[n] = Answer(text, tuple(ids))
        return [answers[n] for n in range(len(queries))]

    def predict_multiple_choice(self, batch: Mapping[str, Sequence[Any]]) -> tuple[list[int], list[Any]]:
        """The 0-based index of the likeliest choice, and the choices' scores, for each input."""
        pairs = zip(batch["input"], batch["answer_choices"], strict=True)
        found = self._answer(
            [Query(str(n), text, MULTIPLE_CHOICE, tuple(choices)) for n, (text, choices) in enumerate(pairs)]
        )
        return [int(answer.text) for answer in found], [answer.scores for answer in found]

    def generate(self, batch: Mapping[str, Sequence[Any]]) -> tuple[list[Sequence[int]], list[str]]:
        """The generated token ids and text for each input."""
        found = self._answer([Query(str(n), text, GENERATION) for n, text in enumerate(batch["input"])])
        return [answer.ids for answer in found], [answer.text for answer in found]

    def _answer(self, queries: Sequence[Query]) -> list[Answer]:
        return self._answer_with(self.base_model, queries)

    def _answer_with(
        self, model: Any, queries: Sequence[Query], progress: Callable[[int], object] = lambda done: None
    ) -> list[Answer]:
        return answer(
            model,
            self.tokenizer,
            queries,
            scoring=self.settings.scoring,
            max_new_tokens=self.max_gen_len or self.settings.max_gen_len,
            max_seq_len=self._max_seq_len,
            batch_size=self.settings.batch_size,
            progress=progress,
        )

    @property
    def _max_seq_len(self) -> int | None:
        return self.max_seq_len or self.settings.max_seq_len

    def _load_base_model(self) -> None:
        """For kit methods: loads `base_model_name` into `base_model`, and its tokenizer."""
        name = self.settings.base_model or self.base_model_name or EMBEDDED
        if not self.settings.base_model and self.base_model_revision_id:
            name = f"{name}@{self.base_model_revision_id}"
        base = load_base(name, self.settings.device, self.settings.dtype)
        self.base_model, self.tokenizer = base.model, base.tokenizer

    def _load_tokenizer(self) -> None:
        """For kit methods: the tokenizer comes with the base model."""
        if self.tokenizer is None:
            self._load_base_model()

    def _load_huggingface_models_and_configs(self) -> None:
        """For kit methods: fills `loaded_models` and `loaded_configs` from `list_models`."""
        from peft import PeftConfig, load_peft_weights

        for name, revision in self.list_models:
            kwargs: dict[str, Any] = {"revision": revision} if revision else {}
            self.loaded_models[name] = load_peft_weights(name, device="cpu", use_safetensors=True, **kwargs)
            self.loaded_configs[name] = PeftConfig.from_pretrained(name, **kwargs)


def default_base(settings: Settings, adapters: Sequence[Adapter]) -> str:
    """The base model where --base_model names none: the one that the adapters name.

    Raises:
        InputError: they name several, or none at all.
    """
    if settings.adapters == (COMPETITION,):
        return COMPETITION_BASE
    name = base_of(adapters)
    return EMBEDDED if name.casefold() == EMBEDDED_ID.casefold() else name


class Routed(Merges):
    """A method that gives every query its weights; clusters and variants do the rest.

    Attributes, after `merge`:
        base: the loaded base model.
        adapters: the library.
        shapes: (d_out, d_in) of the base model's linear layers.
    Attributes, after `answer`:
        weights: (queries, adapters + 1), the base model last.
        clusters, variants: what the queries were answered with.
        evidence: why, of a method that can tell; None of others.
    """

    base: Base
    adapters: list[Adapter]
    shapes: dict[str, tuple[int, int]]
    weights: Array
    clusters: Clusters
    variants: list[Variant]
    evidence: Evidence | None = None

    def merge(self) -> Any:
        """Loads the library, then the base model that it belongs to, and checks that they fit."""
        with self.stages("load"):
            self.adapters = load_library(self.settings.adapters)
            spec = self.settings.base_model or default_base(self.settings, self.adapters)
            self.attach(load_base(spec, self.settings.device, self.settings.dtype), self.adapters)
            is_folder = spec != EMBEDDED and Path(spec).is_dir()
            check_against_base(self.adapters, self.base.name, is_folder, self.shapes)
        return self.base.model

    def attach(self, base: Base, adapters: Sequence[Adapter]) -> None:
        """Takes a base model and a library that are loaded already, as `merge` would load them."""
        self.base, self.adapters = base, list(adapters)
        self.base_model, self.tokenizer = base.model, base.tokenizer
        self.shapes = linear_shapes(base.model)

    @abstractmethod
    def route(self, queries: Sequence[Query]) -> Array:
        """Weights, (queries, adapters + 1); rows sum to 1, the last column is the base model."""

    @property
    def n_variants(self) -> int | None:
        """How many variants to make; None: as few as the weights allow."""
        return self.settings.n_variants

    def folder(self, number: int) -> str | None:
        """The name of a variant's folder, None if it has none."""
        return str(number) if self.variants[number].weights else None

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Routes, clusters, materialises and answers, in this order."""
        settings, names = self.settings, [adapter.name for adapter in self.adapters]
        self.weights = self.route(queries)
        with self.stages("clusters"):
            self.clusters = cluster(self.weights, self.n_variants, settings.seed)
            self.variants = decide(self.clusters.weights, names)
        settings.output_folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".variants.", dir=settings.output_folder))
        try:
            with self.stages("variants"):
                self.save_model(work)
            with self.stages("predict"):
                answers = self._predict(queries, work)
            final = settings.output_folder / "variants"
            shutil.rmtree(final, ignore_errors=True)
            work.chmod(0o755)
            work.rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return answers

    _answer = answer  # the kit's two calls route the batch that they are given

    def save_model(self, output_dir: str | Path) -> None:
        """Writes each variant of the last answers as a PEFT folder, named by its number.

        A variant that is the plain base model has no folder.
        """
        for n, variant in enumerate(progress(self.variants, desc="variants", unit="variant")):
            if name := self.folder(n):
                path, rank = Path(output_dir) / name, self.settings.variant_rank
                write_variant(path, variant, self.adapters, self.base, self.shapes, rank)
                write_card(path, self, variant)

    def _progress(self, queries: Sequence[Query]) -> Any:
        """The bar of prediction, which counts the prompts' tokens."""
        bar = progress(desc="predict", unit="tok")
        if not bar.disable:
            rows = encode(self.tokenizer, [query.input for query in queries], self._max_seq_len)
            bar.reset(sum(map(len, rows)))
        return bar

    def _predict(self, queries: Sequence[Query], folder: Path) -> list[Answer]:
        answers: dict[int, Answer] = {}
        names = [self.folder(n) for n in range(len(self.variants))]
        folders = [folder / name if name else None for name in names]
        with self._progress(queries) as bar, Hotswap(self.base) as swap:
            for n in swap_order(folders):
                members = np.flatnonzero(self.clusters.labels == n).tolist()
                model = swap.show(folders[n])
                part = self._answer_with(model, [queries[m] for m in members], bar.update)
                answers.update(zip(members, part, strict=True))
        return [answers[n] for n in range(len(queries))]


class Static(Routed):
    """A method that merges all adapters into one variant, whatever is asked.

    An adapter that has no update for a module is absent there: `combine` is not shown a zero for
    it, so means and votes are among the adapters that changed the module.
    """

    @abstractmethod
    def combine(self, module: str, updates: list[Factors]) -> Factors:
        """The merged update of one module, from those of the adapters that have it, at least one.

        The result must not depend on the updates' order beyond rounding.
        """

    def route(self, queries: Sequence[Query]) -> Array:
        """The same weight for every adapter, hence one variant; its mathematics is in `combine`."""
        weights = np.zeros((len(queries), len(self.adapters) + 1))
        weights[:, :-1] = 1.0 / len(self.adapters)
        return weights

    def save_model(self, output_dir: str | Path) -> None:
        """Writes the one variant, number 0, as a PEFT folder in the base model's dtype.

        One module of all adapters is in memory at a time, besides what is already merged.
        """
        merged = {}
        for module in self.shapes:
            owners = [adapter for adapter in self.adapters if module in adapter.folder.shapes]
            if owners:
                update = self.combine(module, [adapter.read(module) for adapter in owners])
                update = limited(update, self.settings.variant_rank)
                merged[module] = Factors(update.a.float(), update.b.float())
        updates, base = complete(merged, self.shapes), self.base
        write_adapter(Path(output_dir) / "0", updates, base.name, base.revision, base.model.dtype)
        write_card(Path(output_dir) / "0", self)
