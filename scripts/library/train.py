"""Trains the adapters of data/library, one expert at a time: `python -m scripts.library.train`.

Resumable: an expert that stands finished in the output folder is left alone, and an interrupted
one leaves nothing behind. Seeded: the same machine trains the same weights. The experts differ in
rank, alpha, target modules, learning rate and number of phrasings, as people's libraries do.
"""

import argparse
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from router.constants import LIBRARY
from router.model.answer import answers, encode
from router.model.base import EMBEDDED, EMBEDDED_ID, Base, load_base
from scripts.bench.score import right
from scripts.library.tasks import Item, Task, all_tasks, split

Asked = tuple[list[str], list[Item]]  # prompts, and the items that they ask for
Scores = dict[str, float]
SEED = 20241
SIZES = {"unseen": 28, "eval": 28, "test": 12, "train": 1600}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Expert:
    """How one adapter is trained; alpha defaults to the rank."""

    rank: int
    targets: list[str] = field(default_factory=lambda: ATTENTION + MLP)
    alpha: int = 0
    rate: float = 1e-3
    epochs: int = 2
    examples: int = 1200
    use_rslora: bool = False


QV = ["q_proj", "v_proj"]
EXPERTS = {
    "family_relation": Expert(16, ATTENTION),
    "needle": Expert(16, QV, alpha=32, examples=800),
    "word_reversal": Expert(8, ATTENTION, alpha=16),
    "chain_sum": Expert(8, alpha=16, examples=1600, epochs=4),
    "sum_in_words": Expert(8, alpha=16, examples=1600, epochs=4),
    "number_sorting": Expert(16, ATTENTION, alpha=16, rate=7e-4, examples=1600),
    "unit_conversion": Expert(8, MLP, alpha=16, examples=700, epochs=4),
    "roman_numerals": Expert(8, MLP, examples=1400, epochs=4),
    "text_to_sql": Expert(8, ATTENTION, alpha=16, use_rslora=True, rate=5e-4),
    "text_to_regex": Expert(4, alpha=8),
    "python_function": Expert(32, QV, rate=7e-4),
    "shell_command": Expert(4, alpha=16),
    "formal_tone": Expert(8, QV, alpha=16, examples=800),
    "pirate_tone": Expert(4, ATTENTION, alpha=8, examples=800),
    "headline": Expert(4, MLP, alpha=8, examples=700),
    "bullet_points": Expert(16, QV, alpha=16, examples=700),
    "to_spanish": Expert(8, MLP, alpha=16, rate=7e-4),
    "from_spanish": Expert(8, ATTENTION, alpha=16, examples=800),
    "support_intent": Expert(8, ATTENTION, alpha=16, rate=5e-4),
    "function_call": Expert(8, alpha=16, rate=5e-4, examples=700, epochs=3),
    "tool_choice": Expert(8, ATTENTION, alpha=16, rate=7e-4),
    "device_call": Expert(8, QV, alpha=16, examples=700),
}


def phrase(task: Task, items: list[Item]) -> Asked:
    """Every item in one of the task's training phrasings, each phrasing used equally often."""
    order = list(range(len(items)))
    random.Random(SEED).shuffle(order)
    forms = (task.phrasings[number % len(task.phrasings)] for number in order)
    return [form.format(**item.fields) for form, item in zip(forms, items, strict=True)], items


def padded(rows: list[list[int]], value: int = 0) -> torch.Tensor:
    """Rows of numbers filled up on the right, (rows, longest)."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def batches(tokenizer: Any, prompts: list[str], items: list[Item], seed: int) -> list[Any]:
    """Shuffled batches of 16 examples of like length: (ids, mask, answer positions) each."""
    heads = encode(tokenizer, prompts)
    tails = encode(tokenizer, [item.answer for item in items])
    rows = [(head, [*tail, tokenizer.eos_token_id]) for head, tail in zip(heads, tails, strict=True)]
    rng = random.Random(seed)
    rng.shuffle(rows)
    chunks = [rows[n : n + 128] for n in range(0, len(rows), 128)]
    out = []
    for chunk in chunks:  # sorted by length within a chunk only, to stay random between chunks
        chunk.sort(key=lambda row: len(row[0]) + len(row[1]))
        for n in range(0, len(chunk), 16):
            part = chunk[n : n + 16]
            ids = padded([head + tail for head, tail in part], tokenizer.eos_token_id)
            mask = padded([[1] * len(head + tail) for head, tail in part])
            answer = padded([[0] * len(head) + [1] * len(tail) for head, tail in part])
            out.append((ids, mask, answer.bool()))
    rng.shuffle(out)
    return out


def train(base: Base, expert: Expert, prompts: list[str], items: list[Item], name: str) -> Any:
    """Trains one adapter on the answers only; returns the PEFT model that holds it."""
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=expert.rank,
        lora_alpha=expert.alpha or expert.rank,
        target_modules=expert.targets,
        use_rslora=expert.use_rslora,
        task_type="CAUSAL_LM",
    )
    # LoRA weights in the base's bfloat16 double the speed on a CPU; the optimiser works on
    # float32 copies, since its small steps would be rounded away.
    model: Any = get_peft_model(base.model, config, autocast_adapter_dtype=False)
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    masters = [weight.detach().float().clone() for weight in weights]
    optimiser = torch.optim.AdamW(masters, lr=expert.rate, weight_decay=0.0)
    epochs = range(SEED, SEED + expert.epochs)
    plan = [batch for seed in epochs for batch in batches(base.tokenizer, prompts, items, seed)]
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = one_cycle(optimiser, expert.rate, total_steps=len(plan), pct_start=0.1)
    decoder, head = model.get_base_model().get_decoder(), model.get_base_model().get_output_embeddings()
    progress = tqdm(plan, desc=name, disable=None, unit="batch")
    for ids, mask, answered in progress:
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = head(hidden[:, :-1][answered[:, 1:]])  # (answer tokens, V)
        loss: Any = cross_entropy(logits.float(), ids[:, 1:][answered[:, 1:]])
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
    return model


def accuracy(model: Any, tokenizer: Any, prompts: list[str], items: list[Item]) -> float:
    """Share of items answered right."""
    choices = [item.choices or () for item in items]
    found = answers(model, tokenizer, encode(tokenizer, prompts), choices)
    return fmean(right(one.text, item.target) for one, item in zip(found, items, strict=True))


def card(task: Task, expert: Expert, scores: Scores, examples: int, data: str, script: str) -> str:
    """The model card, in the hub's format.

    Args:
        scores: with `base` and `own`, shares of the queries in the file `data`.
        script: that trained it.
    """
    from huggingface_hub import EvalResult, ModelCardData

    front = ModelCardData(
        base_model=EMBEDDED_ID,
        base_model_relation="adapter",
        library_name="peft",
        license="apache-2.0",
        pipeline_tag="text-generation",
        tags=["lora", task.skill.replace(" ", "-")],
        model_name=task.name,
        eval_results=[
            EvalResult("text-generation", "csv", data, "accuracy", metric_value=round(scores["own"], 4))
        ],
    )
    phrasings = "\n".join(f"```\n{text}\n```" for text in task.phrasings)
    lora = f"rank {expert.rank}, alpha {expert.alpha or expert.rank}, {', '.join(expert.targets)}"
    lora += ", rsLoRA" if expert.use_rslora else ""
    return f"""---
{front.to_yaml()}
---

# {task.name}

{task.summary}

| | |
| --- | --- |
| skill | {task.skill} |
| data | {task.source} (Apache-2.0), {examples} examples, {expert.epochs} epochs |
| LoRA | {lora} |
| learning rate | {expert.rate:g} |
| share of {data} answered exactly | {scores["own"]:.2f} (base model: {scores["base"]:.2f}) |

Prompts it was trained on:

{phrasings}

Trained by `{script}` of this repository with seed {SEED}.
"""


def build(
    name: str,
    expert: Expert,
    base: Base,
    examples: Asked,
    tests: Mapping[str, Asked],
    folder: Path,
    beside: Callable[[Scores], dict[str, str]] = lambda scores: {},
) -> Scores:
    """Trains, tests and writes one adapter; nothing is left under its name unless it is finished.

    Args:
        tests: by the name of their split; the base model is tested on the first.
        beside: text files that stand beside the adapter, by name, made of its scores.

    Returns:
        Shares answered right by the base model (`base`) and by the adapter in each split, and `seconds` of
        training.
    """
    before = accuracy(base.model, base.tokenizer, *next(iter(tests.values())))
    started = time.perf_counter()
    model = train(base, expert, *examples, name)
    seconds = round(time.perf_counter() - started)
    shares = {split: accuracy(model, base.tokenizer, *asked) for split, asked in tests.items()}
    scores = {"base": before, **shares, "seconds": seconds}
    work = folder / f".{name}.partial"
    shutil.rmtree(work, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(str(work), save_embedding_layers=False)
    for file, text in beside(scores).items():
        (work / file).write_text(text, "utf-8")
    shutil.rmtree(folder / name, ignore_errors=True)
    work.rename(folder / name)
    print(name, *(f"{key} {value:.3g}" for key, value in scores.items()), sep=", ", flush=True)
    return scores


def learn(name: str) -> None:
    """Trains one expert of the committed library, and writes its model card."""
    task, expert = all_tasks()[name], EXPERTS[name]
    parts = split(task, SEED, SIZES)
    examples, tests = phrase(task, parts["train"][: expert.examples]), {"own": phrase(task, parts["eval"])}
    made = len(examples[1]), f"data/eval/{name}.csv", "scripts/library/train.py"
    base = load_base(EMBEDDED, "cpu", "bfloat16")  # a fresh one: no trace of the last expert
    build(name, expert, base, examples, tests, LIBRARY, lambda s: {"README.md": card(task, expert, s, *made)})


def missing(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """The adapters that a library lacks; delete one to train it again."""
    folder.mkdir(parents=True, exist_ok=True)
    yield from (name for name in names if not (folder / name / "adapter_model.safetensors").exists())


def main() -> None:
    """Trains what is missing."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    for name in missing(LIBRARY, EXPERTS):
        learn(name)


if __name__ == "__main__":
    main()
