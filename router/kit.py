"""The starter kit's contract: what a method of the competition provides, and what it gets.

A method written for the kit goes into router/methods/; only its import line changes, to this module.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router.deadline import Deadline
from router.model.answer import FAILED, Answer, answer, encode
from router.model.base import EMBEDDED, load_base
from router.processes import Processes
from router.result import Result
from router.settings import Settings
from router.stages import Stages
from router.submission import GENERATION, MULTIPLE_CHOICE, Query

if TYPE_CHECKING:
    from router.journal import Journal

KIT_BATCH = 8  # queries handed to a kit method at once, unless --batch_size is given


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
        self.journal: Journal | None = None  # of a run that may be killed and go on
        self.deadline: Deadline | None = None  # of a run that must end in time
        self.processes = Processes()  # of a run that torchrun started; else this one alone
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
        self._ids: list[str] | None = None  # of the queries in the batch, for warnings; the kit has none

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

    @contextmanager
    def answering(self, queries: Sequence[Query]) -> Iterator[Result]:
        """Answers queries; their variants replace earlier ones once the block has ended without an error."""
        yield self.answer(queries)

    def answer(self, queries: Sequence[Query], folder: Path | None = None) -> Result:
        """Answers queries in order, batch by batch through the kit's two calls.

        Args:
            folder: where a method that routes writes its variants; None takes `settings.output_folder`.
        """
        if self.deadline:
            self.deadline.begin(sum(map(len, self.encoded(queries))) if self.tokenizer else 0)
        try:
            return Result(self._by_batches(queries))
        finally:
            self._ids = None

    def _by_batches(self, queries: Sequence[Query]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        size = self.settings.batch_size or KIT_BATCH
        kinds: dict[int, list[int]] = {}  # all queries of a kit batch have equally many choices
        for n, query in enumerate(queries):
            choices = len(query.choices) if query.eval_type == MULTIPLE_CHOICE else 0
            kinds.setdefault(choices, []).append(n)
        for choices, members in kinds.items():
            for start in range(0, len(members), size):
                part = members[start : start + size]
                self._ids = [queries[n].id for n in part]
                batch: dict[str, list[Any]] = {"input": [queries[n].input for n in part]}
                if choices:
                    batch["answer_choices"] = [list(queries[n].choices) for n in part]
                    indices, scores = self.predict_multiple_choice(batch)
                    for n, index, row in zip(part, indices, scores, strict=True):
                        answers[n] = (
                            Answer(str(int(index)), scores=tuple(map(float, row))) if index >= 0 else FAILED
                        )
                else:
                    for n, ids, text in zip(part, *self.generate(batch), strict=True):
                        found = Answer(text, tuple(ids))
                        # That is all that the kit's call can say of one that failed.
                        answers[n] = FAILED if (found.text, found.ids) == (FAILED.text, ()) else found
        return [answers[n] for n in range(len(queries))]

    def predict_multiple_choice(self, batch: Mapping[str, Sequence[Any]]) -> tuple[list[int], list[Any]]:
        """The 0-based index of the likeliest choice, -1 for none, and the choices' scores, for each input."""
        found = self._answer(
            [
                Query(own, text, MULTIPLE_CHOICE, tuple(choices))
                for own, text, choices in zip(
                    self._named(batch), batch["input"], batch["answer_choices"], strict=True
                )
            ]
        )
        indices = [-1 if answer.failed else int(answer.text) for answer in found]
        return indices, [answer.scores for answer in found]

    def generate(self, batch: Mapping[str, Sequence[Any]]) -> tuple[list[Sequence[int]], list[str]]:
        """The generated token ids and text for each input; no ids and `unknown` where there is no answer."""
        pairs = zip(self._named(batch), batch["input"], strict=True)
        found = self._answer([Query(own, text, GENERATION) for own, text in pairs])
        return [answer.ids for answer in found], [answer.text for answer in found]

    def _named(self, batch: Mapping[str, Sequence[Any]]) -> list[str]:
        """The ids of the queries in a batch, or their numbers where it did not come from a query file."""
        return self._ids or [str(n) for n in range(len(batch["input"]))]

    def _answer(self, queries: Sequence[Query]) -> list[Answer]:
        return self.answer_with(self.base_model, queries, self.encoded(queries))

    def encoded(self, queries: Sequence[Query]) -> list[list[int]]:
        """The token ids of each query's prompt, cut to `max_seq_len`."""
        return encode(
            self.tokenizer,
            [query.input for query in queries],
            self.prompt_tokens,
        )

    @property
    def new_tokens(self) -> int:
        """The most tokens of an answer."""
        return self.max_gen_len or self.settings.max_gen_len

    @property
    def prompt_tokens(self) -> int | None:
        """The most tokens of a prompt; None keeps all."""
        return self.max_seq_len or self.settings.max_seq_len

    def answer_with(
        self,
        model: Any,
        queries: Sequence[Query],
        rows: Sequence[Sequence[int]],
        progress: Callable[[int], object] = lambda done: None,
        keep: bool = True,
    ) -> list[Answer]:
        """Answers queries in order with one model.

        Args:
            rows: token ids of each query's prompt.
            progress: called after each batch with the tokens of its prompts.
            keep: whether the journal keeps the answers.
        """
        return answer(
            model,
            self.tokenizer,
            queries,
            rows,
            scoring=self.settings.scoring,
            max_new_tokens=self.new_tokens,
            batch_size=self.settings.batch_size,
            progress=progress,
            journal=self.journal if keep or self.journal is None else ChainMap({}, self.journal),
            deadline=self.deadline,
            takes=self.processes.takes,
        )

    def _load_base_model(self) -> None:
        """For kit methods: loads `base_model_name` into `base_model`, and its tokenizer."""
        name = self.settings.base_model or self.base_model_name or EMBEDDED
        if not self.settings.base_model and self.base_model_revision_id:
            name = f"{name}@{self.base_model_revision_id}"
        base = load_base(name, self.settings.device, self.settings.dtype)
        self.base_model, self.tokenizer = base.model, base.tokenizer

    def _load_tokenizer(self) -> None:
        """For kit methods: loads the tokenizer, which comes with the base model."""
        if self.tokenizer is None:
            self._load_base_model()

    def _load_huggingface_models_and_configs(self) -> None:
        """For kit methods: fills `loaded_models` and `loaded_configs` from `list_models`."""
        from peft import PeftConfig, load_peft_weights

        for name, revision in self.list_models:
            kwargs: dict[str, Any] = {"revision": revision} if revision else {}
            self.loaded_models[name] = load_peft_weights(name, device="cpu", use_safetensors=True, **kwargs)
            self.loaded_configs[name] = PeftConfig.from_pretrained(name, **kwargs)
