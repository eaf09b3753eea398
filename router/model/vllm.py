"""vLLM answers queries in this process, with the variants as its LoRA adapters.

It is sent token ids, and the ids that it returns are made text here, so that both are done as everywhere
else. Choices are scored by the log-probabilities of prompts that end with them.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from merge.folders import open_adapter, served_rank
from router.constants import Scoring
from router.model.answer import (
    FAILED,
    NOT_FINITE,
    Answer,
    Done,
    Rows,
    Tails,
    continuation,
    end_tokens,
    likeliest,
    unanswerable,
)
from router.model.base import Base
from router.system.errors import InputError

AT_ONCE = 256  # prompts, after which their answers can be kept
ENVIRONMENT = {  # where it does not say otherwise
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB; else nearly all of the memory where there is no GPU
}


def answer(
    base: Base,
    rows: Rows,
    tails: Tails,
    variants: Sequence[Path | None],
    asked: Sequence[int],
    *,
    scoring: Scoring = "full",
    max_new_tokens: int = 64,
) -> Iterator[Done]:
    """Yields prompts as they are answered, AT_ONCE at a time.

    One that does not fit into the base model's context has no answer (`Answer.failed`).

    Args:
        base: vLLM loads it anew from its folder. On a GPU, `base` itself waits in the main memory meanwhile.
        variants: the folder of each prompt's variant; None for the base model.
        asked: the numbers of the prompts to answer.

    Raises:
        InputError: vLLM cannot load the base model, or has no room for it and the variants.
    """
    model = base.model
    text = model.config.get_text_config(decoder=True)
    context: int | None = getattr(text, "max_position_embeddings", None)
    reads = {n: len(rows[n]) + max(map(len, tails[n]), default=0) for n in asked}
    # With a token of the answer; vLLM would end at what it cannot read.
    left_out = {n: unanswerable(model, rows[n], tails[n], reads[n] + 1, context or math.inf) for n in asked}
    for why in dict.fromkeys(filter(None, left_out.values())):
        part = [n for n in asked if left_out[n] == why]
        yield Done(part, [FAILED] * len(part), why)
    if not (asked := [n for n in asked if not left_out[n]]):
        return
    longest = max(reads[n] + (1 if tails[n] else max_new_tokens) for n in asked)
    paths = [path for path in dict.fromkeys(variants[n] for n in asked) if path]
    with _loaded(base, paths, min(longest, context or longest)) as llm:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        loras: dict[Path | None, Any] = {
            path: LoRARequest(path.name, k + 1, str(path.resolve())) for k, path in enumerate(paths)
        }
        stops = end_tokens(base.model, base.tokenizer)
        write = SamplingParams(
            temperature=0, max_tokens=max_new_tokens, stop_token_ids=stops, detokenize=False
        )
        score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)

        def read(n: int, outputs: list[Any]) -> Answer:
            if tails[n]:
                return likeliest(tuple(map(partial(_score, scoring=scoring), outputs, tails[n])))
            ids = tuple(outputs[0].outputs[0].token_ids)
            return Answer(continuation(base.tokenizer, ids), ids)

        for start in range(0, len(asked), AT_ONCE):
            part = list(asked[start : start + AT_ONCE])
            pairs = [(n, tail) for n in part for tail in tails[n] or [[]]]
            outputs = iter(
                llm.generate(
                    [{"prompt_token_ids": [*rows[n], *tail]} for n, tail in pairs],
                    [score if tails[n] else write for n, _ in pairs],
                    lora_request=[loras.get(variants[n]) for n, _ in pairs],
                    use_tqdm=False,
                )
            )
            yield Done(part, [read(n, list(islice(outputs, len(tails[n]) or 1))) for n in part], NOT_FINITE)


def _score(output: Any, tail: Sequence[int], scoring: Scoring) -> float:
    """The log-probability of a choice's tokens at the end of a prompt, in nats."""
    logprobs = output.prompt_logprobs[-len(tail) :]  # what each token could have been
    each = [float(likelihoods[token].logprob) for likelihoods, token in zip(logprobs, tail, strict=True)]
    return sum(each if scoring == "full" else each[1:])


@contextmanager
def _loaded(base: Base, variants: Sequence[Path], longest: int) -> Iterator[Any]:
    """vLLM with the base model, the variants, and room for `longest` tokens of a prompt and its answer."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch
    from vllm import LLM

    model: Any = base.model
    device = model.device
    how = {}
    if variants:
        ranks = [rank for path in variants for rank in open_adapter(path).ranks.items()]
        how = {
            "enable_lora": True,
            # One slot more than variants, since without it base rows were wrong on CPUs.
            "max_loras": len(variants) + 1,
            "max_lora_rank": served_rank(max(rank for _, rank in ranks)),
            # Named, since vLLM cannot tell prompts' log-probabilities where the output layer may have one.
            "lora_target_modules": sorted({module.rpartition(".")[2] for module, _ in ranks}),
        }
    if device.type == "cuda":  # of which vLLM takes nearly all
        model.to("cpu")
        torch.cuda.empty_cache()
    try:
        llm = LLM(
            model.name_or_path, dtype=str(model.dtype).removeprefix("torch."), max_model_len=longest,
            skip_tokenizer_init=True, enforce_eager=device.type == "cpu", **how,
        )  # fmt: skip
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"--engine vllm: expected it to load {base.name}, it says: {reason}. What was answered is kept: "
            "when it can, the same command goes on"
        ) from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        model.to(device)
