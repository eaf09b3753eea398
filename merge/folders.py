"""Reads and writes LoRA adapters as PEFT folders: adapter_config.json and adapter_model.safetensors.

Only plain LoRA is accepted. What a merge would silently lose (DoRA magnitudes, biases, saved modules) is
refused with a message that names it. Data never becomes code: only JSON and safetensors are read.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from merge.factors import Factors, balanced, pad

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Ranks that vLLM accepts as max_lora_rank; a rank between two of them is padded up, unless that is too much.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes that are read
CONFIG_BYTES = 4 << 20  # of a configuration file, at most
LARGEST_RANK = 1 << 14
PATIENCE = 2.0  # seconds for the regular expressions of an adapter, on all its modules' names
LONGEST = 20_000  # characters of all of them, which take some tenths of a second to compile
LARGEST = torch.finfo(torch.float32).max  # a larger scale would be infinite

# Initialisations that change the base model's weights, so that the adapter needs a changed base.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Settings that make an adapter compute more than s * B A, each with its harmless value.
_PLAIN = {
    "use_dora": False, "use_qalora": False, "lora_bias": False, "bias": "none",
    "modules_to_save": None, "layer_replication": None, "trainable_token_indices": None,
    "target_parameters": None, "use_bdlora": None, "alora_invocation_tokens": None,
    "kasa_config": None, "velora_config": None, "monteclora_config": None,
    "arrow_config": None,
}  # fmt: skip


class AdapterError(ValueError):
    """An adapter folder cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class AdapterFolder:
    """A checked LoRA adapter on disk. Weights are read on demand, one module at a time.

    Attributes:
        path: the folder.
        config: adapter_config.json as it is.
        ranks: rank of each module's update, by module name ("model.layers.0.self_attn.q_proj").
        shapes: (d_out, d_in) of each module.
        scales: the factor s of each module's `s * B A`: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    path: Path
    config: dict[str, Any]
    ranks: dict[str, int]
    shapes: dict[str, tuple[int, int]]
    scales: dict[str, float]
    _keys: dict[str, tuple[str, str]] = field(repr=False)

    @property
    def base_model(self) -> str:
        """The base model that the adapter names, "" if it names none."""
        return str(self.config.get("base_model_name_or_path") or "")

    def read_all(self, modules: Sequence[str] | None = None) -> Iterator[tuple[str, Factors]]:
        """Each of these modules' updates in float32, its scale folded into `b`; None takes all, by name."""
        with safe_open(self.path / WEIGHTS_FILE, framework="pt") as file:
            for module in sorted(self._keys) if modules is None else modules:
                a, b = (file.get_tensor(key).float() for key in self._keys[module])
                yield module, Factors(a, b * self.scales[module])


_NAME = re.compile(r"[\w.]*")  # a module's name, as a regular expression
# Of groups or large, which multiply as regex writes them out, or a comment that might hide one.
_REPEATS = re.compile(r"#|\)\s*[+*{]|\{[^}]*\d{3}")


def _ends_with(module: str, name: str) -> bool:
    """Whether a module's name ends with a name, in which a dot stands for any character, as in PEFT.

    Example:
        >>> [_ends_with("layers.1.q_proj", name) for name in ("q_proj", "1.q_proj", "proj", "layers.1")]
        [True, True, False, False]
    """
    start = len(module) - len(name)
    if start < 0 or (start and module[start - 1] != "."):
        return False
    return all(letter in (".", other) for letter, other in zip(name, module[start:], strict=True))


class _Matcher:
    """Matches a stranger's regular expressions against modules' names, for PATIENCE seconds in all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.until = time.monotonic() + PATIENCE

    def match(self, pattern: str, module: str) -> Any:
        """The match of a pattern at the start of a module's name, None if there is none.

        Raises:
            AdapterError: it takes too long, as one does that was made to hang its reader; or within the
                pattern that it is put into, it is no regular expression.
        """
        try:
            if (left := self.until - time.monotonic()) <= 0:
                raise TimeoutError
            return regex.match(pattern, module, timeout=min(0.3, left))
        except (TimeoutError, regex.error) as error:
            raise AdapterError(
                f"{self.path}: expected patterns in {CONFIG_FILE} that match in {PATIENCE:g} seconds, but "
                f"{pattern!r:.80} takes too long on {module!r:.80}, or is none; simplify it"
            ) from error

    def by_pattern(self, patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
        """The value of the first pattern that matches the end of a module's name, as in PEFT."""
        for pattern, value in (patterns or {}).items():
            plain = _NAME.fullmatch(pattern)  # there may be one for each module, so this is quick
            if _ends_with(module, pattern) if plain else self.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def targeted(self, config: Mapping[str, Any], module: str) -> bool:
        """Whether PEFT would apply weights of a module, as its `check_target_module_exists` decides that."""
        targets, layers = config.get("target_modules"), config.get("layers_to_transform")
        if self.named(config.get("exclude_modules") or [], module):
            return False
        if targets is None or str(targets).lower() == "all-linear" or module in _listed(targets):
            return True
        if isinstance(targets, str) or layers in (None, []):
            return self.named(targets, module)
        patterns = _listed(config.get("layers_pattern") or r"[^.]*\.[^.]*")
        numbers = (self.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d{{1,9}})\.", module) for pattern in patterns)
        number = next((int(match["idx"]) for match in numbers if match), None)
        return self.named(targets, module) and number in _listed(layers)

    def named(self, names: str | list[str], module: str) -> bool:
        """Whether a pattern matches a module's name, or a list has its end."""
        if isinstance(names, str):
            return self.match(rf"(?:{names})\Z", module) is not None
        return any(module == name or module.endswith(f".{name}") for name in _listed(names))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def open_adapter(path: Path) -> AdapterFolder:
    """Checks a PEFT folder and lists its modules.

    Reads headers only; finiteness is checked when the weights are read.

    Raises:
        AdapterError: files are missing, the only weights are a pickle, the JSON is broken, the weights are
            truncated, it is not plain LoRA, or its factors do not fit together.
    """
    config = _read_config(path)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in path.glob(suffix))
        state = f"only the pickle {pickles[0]}, which could run code" if pickles else "no weights"
        whole = "is the folder complete? No pickles are fetched from the hub"
        advice = "convert it to safetensors where you trust it" if pickles else whole
        raise AdapterError(f"{path}: expected {WEIGHTS_FILE}, found {state}; {advice}")
    try:
        with safe_open(weights, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            odd = {key: kind for key, part in slices.items() if (kind := part.get_dtype()) not in FLOATS}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{weights}: expected a complete safetensors file, got an unreadable one ({error}); "
            "download or copy it again"
        ) from error
    for key, kind in odd.items():
        raise AdapterError(
            f"{weights}: expected weights in {', '.join(FLOATS)}, got {kind} in {key}; convert them"
        )
    keys = _pairs(weights, shapes)
    ranks = {module: shapes[a][0] for module, (a, _) in keys.items()}
    scales = _scales(path, config, ranks)
    widths = {module: (shapes[b][0], shapes[a][1]) for module, (a, b) in keys.items()}
    return AdapterFolder(path, config, ranks, widths, scales, keys)


def _scales(path: Path, config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Each module's scale, after checking that the configuration goes with the weights."""
    names = _Matcher(path)
    if left_out := [module for module in ranks if not names.targeted(config, module)]:
        raise AdapterError(
            f"{path}: {WEIGHTS_FILE} holds weights of {left_out[0]}, which target_modules in {CONFIG_FILE} "
            "leaves out, so PEFT would not apply them; the two files do not belong together"
        )
    scales = {}
    for module, rank in ranks.items():
        stated = names.by_pattern(config.get("rank_pattern"), module, config["r"])
        if rank != stated:
            raise AdapterError(
                f"{path}: {module} has rank {rank} in {WEIGHTS_FILE} but {stated} in {CONFIG_FILE}; "
                "the two files do not belong together"
            )
        alpha = names.by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        scales[module] = float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return scales


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not file.is_file():  # a pipe would wait for ever
        raise AdapterError(f"{path}: expected a PEFT folder with {CONFIG_FILE}, found none there")
    try:
        if file.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"more than {CONFIG_BYTES >> 20} MiB")
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: expected JSON that can be read, got something else ({error})") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file}: expected a JSON object, got a {type(config).__name__}")
    _check_kind(path, config)
    _check_values(file, config)
    return config


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses what is more than plain LoRA on the unchanged base model."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: expected a LoRA adapter, got peft_type {config.get('peft_type')!r}; "
            "leave it out of --adapters"
        )
    for key, plain in _PLAIN.items():
        value = config.get(key, plain)
        if value != plain and value not in (None, [], {}, False):
            raise AdapterError(
                f"{path}: expected plain LoRA, got {key} = {value!r:.80}, which would be lost in a merge; "
                "leave the adapter out of --adapters"
            )
    initial = str(config.get("init_lora_weights")).lower()
    if initial.startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{path}: expected an adapter of the unchanged base model, got init_lora_weights = "
            f"{initial!r:.80}, which changes the base's weights; leave the adapter out of --adapters, or, if "
            "nothing was quantised, load it with PEFT on that base, as it was trained, and call "
            "model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL), where INITIAL "
            "is the adapter as it was saved before training"
        )


def _check_values(file: Path, config: Mapping[str, Any]) -> None:
    """Refuses values that PEFT would not take, and patterns that would take seconds to compile."""
    numbers = {key: config.get(key) for key in ("r", "lora_alpha")}
    patterns: list[str] = []
    for key in ("rank_pattern", "alpha_pattern"):
        values = config.get(key) or {}
        if not isinstance(values, dict):
            raise AdapterError(f"{file}: expected {key} to be a JSON object, got {values!r:.80}")
        numbers |= {f"{key} of {pattern}": value for pattern, value in values.items()}
        patterns += values
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST:
            raise AdapterError(f"{file}: expected {key:.120} to be a positive number, got {value!r:.40}")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        names = config.get(key) or []
        if not all(isinstance(name, str) for name in _listed(names)):
            raise AdapterError(f"{file}: expected {key} to be names or a pattern, got {names!r:.80}")
        if isinstance(names, str) or key == "layers_pattern":  # any other list is of names
            patterns += _listed(names)
    layers = config.get("layers_to_transform")
    if layers is not None and not all(type(layer) is int for layer in _listed(layers)):
        raise AdapterError(f"{file}: expected layers_to_transform to be numbers, got {layers!r:.80}")
    patterns = [pattern for pattern in patterns if not _NAME.fullmatch(pattern)]
    total = sum(map(len, patterns))
    for pattern in patterns:
        bare = re.sub(r"\\.|\[\^?\]?[^]]*\]", "a", pattern, flags=re.DOTALL)  # escapes and sets are letters
        try:
            sound = total <= LONGEST and not _REPEATS.search(bare) and regex.compile(pattern)
        except (regex.error, RecursionError):
            sound = False
        if not sound:
            raise AdapterError(
                f"{file}: expected regular expressions of {LONGEST:,} characters in all, without repeated "
                f"groups, comments or counts above 99, got {pattern!r:.80}; simplify it"
            )


def _pairs(weights: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, str]]:
    """The keys of lora_A and lora_B by module name, in sorted order."""
    by_module: dict[str, dict[str, str]] = {}
    for key in sorted(shapes):
        match = re.fullmatch(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_([AB])\.(?:default\.)?weight", key)
        if match is None:
            raise AdapterError(
                f"{weights}: expected lora_A and lora_B of linear layers only, got {key}; "
                "leave the adapter out of --adapters"
            )
        module, letter = match.groups()
        if (other := by_module.setdefault(module, {}).setdefault(letter, key)) != key:
            raise AdapterError(f"{weights}: expected one lora_{letter} of {module}, got {other} and {key}")
    pairs = {}
    for module, keys in by_module.items():
        if len(keys) != 2:
            raise AdapterError(f"{weights}: {module} has lora_{next(iter(keys))} without its counterpart")
        a, b = shapes[keys["A"]], shapes[keys["B"]]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a or 0 in b:
            raise AdapterError(
                f"{weights}: {module}: expected factors (r, d_in) and (d_out, r) of a linear layer, "
                f"got {a} and {b}"
            )
        if a[0] > LARGEST_RANK:
            raise AdapterError(f"{weights}: {module}: expected a rank of at most {LARGEST_RANK}, got {a[0]}")
        pairs[module] = (keys["A"], keys["B"])
    if not pairs:
        raise AdapterError(f"{weights}: expected LoRA weights, the file holds none")
    return pairs


def served_rank(rank: int) -> int:
    """The smallest rank of at least `rank` that the serving engines accept.

    Above the largest accepted rank it is `rank` itself.

    Example:
        >>> [served_rank(rank) for rank in (3, 64, 65, 1000)]
        [8, 64, 128, 1000]
    """
    return next((served for served in SERVED_RANKS if served >= rank), rank)


def _targets(modules: Iterable[str]) -> list[str]:
    """Target modules by kind ("q_proj") if every layer has all kinds, else by full name.

    A kind that is a number (the layers of a `Sequential`) would be taken for a block's, too.
    """
    layers: dict[str, set[str]] = {}
    for module in modules:
        layer, _, kind = module.rpartition(".")
        layers.setdefault(re.sub(r"(\d+)\..*$", r"\1", layer), set()).add(kind)
    kinds = set.union(*layers.values())
    alike = all(layer_kinds == kinds for layer_kinds in layers.values()) and not any(map(str.isdigit, kinds))
    return sorted(kinds if alike else modules)


def write_adapter(
    path: Path,
    updates: Mapping[str, Factors],
    base_model: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    max_rank: int | None = None,
) -> int:
    """Writes updates as a PEFT folder that PEFT and the serving engines load as it is.

    All modules get one rank: updates of lower rank are padded with zeros. Alpha equals the rank, since
    every scale is in the factors. The pattern fields stay empty, since engines ignore them.

    Args:
        max_rank: what they are padded to at most, from their highest rank; None pads to a rank that engines
            accept as their own maximum.

    Returns:
        The uniform rank.

    Raises:
        OverflowError: a value is not finite in `dtype`.
    """
    rank = served_rank(max(update.rank for update in updates.values()))
    rank = rank if max_rank is None else min(rank, max_rank)
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model, "revision": revision,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "target_modules": _targets(updates),
        "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "bias": "none",
        "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    tensors = {}
    for module, update in updates.items():
        padded = pad(balanced(update) if dtype == torch.float16 else update, rank)
        for letter, factor in zip("AB", padded, strict=True):
            name = f"{module}.lora_{letter}.weight"
            tensors[PREFIX + name] = factor.to(dtype).contiguous()
            if not tensors[PREFIX + name].isfinite().all():
                raise OverflowError(f"{name} is too large for {dtype}")
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    shutil.copymode(path / CONFIG_FILE, path / WEIGHTS_FILE)  # safetensors writes for its owner alone
    return rank
