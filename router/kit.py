"""The starter kit's contract: what a method of the competition provides, and what it gets.

A method written for the kit goes into router/methods/; only its import line changes, to this module.
`StarterKitMethod` has it answer a run, and `Handler` shows the kit a method of this package.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from merge.folders import WEIGHTS_FILE
from router.library.sources import find
from router.model.answer import FAILED, Answer, Choices, Done, answers, encode
from router.model.base import EMBEDDED, load_base
from router.pipeline.answering import choices_of, kept, known_to
from router.pipeline.context import Context
from router.pipeline.steps import Method, load
from router.queries.submission import GENERATION, MULTIPLE_CHOICE, Query
from router.settings import Settings
from router.system.errors import InputError
from router.system.files import is_folder

KIT_BATCH = 8  # queries handed to a kit method at once, unless --batch_size is given
NO_ANSWER = "the method has none, perhaps for want of room or of finite numbers"


class Merges:
    """The starter kit's contract (llm-merging/LLM-Merging, `merging/Merges.py`).

    A subclass sets `list_models`, `base_model_name` and so on, and its `merge` fills
    `base_model` and `merged_model`. A batch is a dictionary of lists: `input`, and for multiple
    choice `answer_choices`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.settings = Settings()
        self.list_models: list[tuple[str, str | None]] = []
        self.loaded_models: dict[str, Any] = {}
        self.loaded_configs: dict[str, Any] = {}
        self.merged_model: dict[str, Any] = {}
        self.base_model_name: str | None = None
        self.base_model_revision_id: str | None = None
        self.is_peft = False
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

    def predict_multiple_choice(self, batch: Mapping[str, Sequence[Any]]) -> tuple[list[int], list[Any]]:
        """The 0-based index of the likeliest choice, -1 for none, and the choices' scores, for each input."""
        results = self._answer(batch["input"], batch["answer_choices"])
        indices = [-1 if answer.failed else int(answer.text) for answer in results]
        return indices, [answer.scores for answer in results]

    def generate(self, batch: Mapping[str, Sequence[Any]]) -> tuple[list[Sequence[int]], list[str]]:
        """The generated token ids and text for each input; no ids and `unknown` where there is no answer."""
        results = self._answer(batch["input"], [()] * len(batch["input"]))
        return [answer.ids for answer in results], [answer.text for answer in results]

    def _answer(self, texts: Sequence[str], choices: Choices) -> list[Answer]:
        settings = self.settings
        rows = encode(self.tokenizer, texts, self.max_seq_len or settings.max_seq_len)
        return answers(
            self.base_model, self.tokenizer, rows, choices, scoring=settings.scoring,
            max_new_tokens=self.max_gen_len or settings.max_gen_len, batch_size=settings.batch_size,
        )  # fmt: skip

    def _load_base_model(self) -> None:
        """For kit methods: loads `base_model_name` into `base_model`, and its tokenizer."""
        default = _spec(self.base_model_name or EMBEDDED, self.base_model_revision_id)
        base = load_base(self.settings.base_model or default, self.settings.device, self.settings.dtype)
        self.base_model, self.tokenizer = base.model, base.tokenizer

    def _load_tokenizer(self) -> None:
        """For kit methods: loads the tokenizer, which comes with the base model."""
        if self.tokenizer is None:
            self._load_base_model()

    def _load_huggingface_models_and_configs(self) -> None:
        """For kit methods: fills `loaded_models` and `loaded_configs` from `list_models`.

        These are adapters where `is_peft` is set, else whole models, in float32.
        """
        from peft import PeftConfig
        from safetensors.torch import load_file

        for name, revision in self.list_models:
            spec = _spec(name, revision)
            if self.is_peft:
                folder = find(spec)[0].path
                if not (folder / WEIGHTS_FILE).is_file():
                    what = f"expected {WEIGHTS_FILE} in {folder}; pickles, which could run code, are not read"
                    raise InputError(f"-m {self.name}: {what}")
                weights, config = load_file(folder / WEIGHTS_FILE), PeftConfig.from_pretrained(str(folder))
            else:
                model = load_base(spec, "cpu", "float32").model
                weights, config = model.state_dict(), model.config
            self.loaded_models[name], self.loaded_configs[name] = weights, config


def _spec(name: str, revision: str | None) -> str:
    """A model as flags name it; a folder has no revision."""
    return f"{name}@{revision}" if revision and not is_folder(name) else name


class StarterKitMethod:
    """A method that was written for the kit, merged: it neither routes nor makes variants.

    Args:
        make: its class.
        name: as `-m` takes it.
    """

    def __init__(self, make: type[Merges], name: str, context: Context) -> None:
        self.settings, self.kit = context.settings, make(name)
        self.kit.settings = context.settings
        with context.stages("merge"):
            self.kit.merge()

    def answer(self, queries: Sequence[Query], context: Context) -> list[Answer]:
        """Answers queries in order, batch by batch, through the kit's two calls."""
        known = known_to(context)
        batches = [batch for batch in self._batches(queries) if any(queries[n] not in known for n in batch)]
        done = (Done(batch, list(self._ask([queries[n] for n in batch])), NO_ANSWER) for batch in batches)
        return kept(done, queries, [()] * len(queries), {n for batch in batches for n in batch}, context)

    def _batches(self, queries: Sequence[Query]) -> Iterator[list[int]]:
        """The numbers of queries in batches; those of a batch of the kit have equally many choices."""
        size = self.settings.batch_size or KIT_BATCH
        kinds: dict[int, list[int]] = {}
        for n, options in enumerate(choices_of(queries)):
            kinds.setdefault(len(options), []).append(n)
        for members in kinds.values():
            yield from (members[start : start + size] for start in range(0, len(members), size))

    def _ask(self, part: Sequence[Query]) -> Iterator[Answer]:
        """Puts a batch to the kit's two calls."""
        batch: dict[str, list[Any]] = {"input": [query.input for query in part]}
        if part[0].eval_type == GENERATION:
            for ids, text in self._of_each(part, self.kit.generate(batch)):
                # No ids and `unknown` is all that the kit's call can say of one that failed.
                yield FAILED if (text, len(ids)) == (FAILED.text, 0) else Answer(text, tuple(map(int, ids)))
            return
        batch["answer_choices"] = [list(query.choices) for query in part]
        for index, scores in self._of_each(part, self.kit.predict_multiple_choice(batch)):
            known = tuple(map(float, scores)) if all(map(math.isfinite, scores)) else ()  # no JSON else
            yield Answer(str(int(index)), scores=known) if index >= 0 else FAILED

    def _of_each(self, part: Sequence[Query], lists: Any) -> Iterator[tuple[Any, Any]]:
        """The items of the two lists that a call of the kit's gives, query by query."""
        if (counts := [len(items) for items in lists]) != [len(part)] * 2:
            raise InputError(
                f"-m {self.kit.name}: expected two lists with an item for each of {len(part)} queries, got "
                f"{' and '.join(map(str, counts))} items"
            )
        return zip(*lists, strict=True)


class Handler(Merges):
    """A method that routes, behind the kit's contract: its two calls route the batch that they are given."""

    make: type[Method]

    def merge(self) -> Any:
        """Loads the library and the base model."""
        context = Context(self.settings)
        self.make.check()
        base, adapters, _ = load(context)
        self.method = self.make(self.name, base, adapters, context)
        self.base_model, self.tokenizer = base.model, base.tokenizer
        return base.model

    def _answer(self, texts: Sequence[str], choices: Choices) -> list[Answer]:
        kinds = [MULTIPLE_CHOICE if options else GENERATION for options in choices]
        asked = zip(texts, kinds, choices, strict=True)
        queries = [Query(str(n), text, kind, tuple(options)) for n, (text, kind, options) in enumerate(asked)]
        with TemporaryDirectory() as work:  # those in the output folder may be a run's
            return self.method.answer(queries, Path(work)).answers
