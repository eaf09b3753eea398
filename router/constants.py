"""Names and presets that several parts of the router share."""

from pathlib import Path
from typing import Literal

LIBRARY = Path("data/library")
Device = Literal["auto", "cpu", "cuda"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]  # how accelerate spreads a base model
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Apply = Literal["auto", "merged", "beside"]  # how a variant is applied: router/model/apply.py
Engine = Literal["transformers", "vllm"]  # what answers
# Of a choice: by all of its tokens, or by all but its first, as the kit does.
Scoring = Literal["full", "kit"]
# In a folder of a model or of an adapter, as transformers and TRL save them; the second may hold the first.
TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
ADDRESS = r"https?://([^\s/:]+|\[[\da-fA-F:.]+\])(:\d+)?(/\S*)?"  # of a server
CANARY = "The capital of France is"  # what every variant is asked for one token of, to see that it is served
SCRIPT = "serve.sh"  # what export writes beside variants, so for these alone
FORMAT = 14  # of runs and saved routers; raise it when a reader of the old one could not use the new one
TEMPERATURE, TOP_K, FALSE_POSITIVE_RATE = 0.7, 3, 0.05  # of the gate, unless they are set
BASE_COLUMN = "base"  # the null candidate in routing tables: the base model without any adapter

COMPETITION = "competition"
COMPETITION_BASE = "mistralai/Mistral-7B-v0.1"
# The adapters of the NeurIPS 2024 LLM Merging Competition.
COMPETITION_ADAPTERS = tuple(
    f"predibase/{name}"
    for name in (
        "magicoder conllpp dbpedia cnn agnews_explained gsm8k customer_support glue_qnli glue_mnli "
        "glue_sst2 glue_cola glue_stsb glue_mrpc glue_qqp tldr_headline_gen tldr_content_gen e2e_nlg "
        "wikisql hellaswag hellaswag_processed legal jigsaw bc5cdr covid drop drop_explained viggo"
    ).split()
)
