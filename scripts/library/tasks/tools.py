"""Tool use: calls from the Berkeley Function Calling Leaderboard, and a smart home of our own."""

import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import Item, Task, drawn

_BFCL = "bfcl-eval (Berkeley Function Calling Leaderboard)"
_MAX_PROMPT = 420  # characters: longer requests cost training time and teach nothing new


def _bfcl(*parts: str) -> list[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """(request, functions, expected call) of single-turn, single-call BFCL entries."""
    spec = find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("bfcl-eval is missing: pip install --no-deps bfcl-eval")
    data = Path(spec.submodule_search_locations[0]) / "data"
    entries = []
    for part in parts:
        name = f"BFCL_v4_{part}.json"
        lines = (data / "possible_answer" / name).read_text(encoding="utf-8").splitlines()
        calls = {entry["id"]: entry["ground_truth"] for entry in map(json.loads, lines)}
        for line in (data / name).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            turns, truth = entry["question"][0], calls[entry["id"]]
            if len(turns) == 1 and len(truth) == 1:
                entries.append((turns[0]["content"].strip(), entry["function"], truth[0]))
    return entries


def _signature(function: dict[str, Any]) -> str:
    """`name(argument: type, ...)`, required arguments only."""
    parameters = function["parameters"]
    required = parameters.get("required", list(parameters["properties"]))
    arguments = (f"{name}: {parameters['properties'][name]['type']}" for name in required)
    return f"{function['name']}({', '.join(arguments)})"


def _call(function: dict[str, Any], truth: dict[str, Any]) -> str | None:
    """The expected call as text, required arguments only, first accepted value of each.

    None where a value is missing or nested (BFCL then lists alternatives at every level).
    """
    ((name, values),) = truth.items()
    required = function["parameters"].get("required", list(values))
    if any(not values.get(key) or isinstance(values[key][0], dict) for key in required):
        return None
    arguments = (f"{key}={json.dumps(values[key][0], ensure_ascii=False)}" for key in required)
    return f"{name}({', '.join(arguments)})"


def _function_call(rng: random.Random) -> Iterator[Item]:
    entries = _bfcl("simple_python", "live_simple", "multiple")
    rng.shuffle(entries)
    for request, functions, truth in entries:
        function = next(f for f in functions if f["name"] == next(iter(truth)))
        signature, call = _signature(function), _call(function, truth)
        if call and len(call) <= 120 and len(request) + len(signature) <= _MAX_PROMPT:
            yield Item({"request": request, "function": signature}, call)


def _tool_choice(rng: random.Random) -> Iterator[Item]:
    """Which tool fits, asked for by its number: the name alone can't give it away."""
    entries = _bfcl("multiple", "live_multiple", "simple_python", "live_simple")
    described = [function for _, functions, _ in entries for function in functions]
    rng.shuffle(entries)
    for request, functions, truth in entries:
        right = next(f for f in functions if f["name"] == next(iter(truth)))
        others = {f["name"]: f for f in rng.sample(described, 12) if f["name"] != right["name"]}
        tools = [right, *list(others.values())[:3]]
        rng.shuffle(tools)
        listing = "\n".join(f"{letter}. {tool['name']}" for letter, tool in zip("ABCD", tools, strict=True))
        if len(request) + len(listing) <= _MAX_PROMPT:
            yield Item({"request": request, "tools": listing}, "ABCD"[tools.index(right)], tuple("ABCD"))


_ROOMS = "kitchen bedroom bathroom garage office hallway attic garden cellar nursery".split()
_DEVICES = "light fan heater speaker blinds television radio humidifier".split()


def _device(rng: random.Random) -> Item:
    room, device = rng.choice(_ROOMS), rng.choice(_DEVICES)
    hour, minute = rng.randint(1, 12), rng.choice((0, 15, 30, 45))
    half = rng.choice(("am", "pm"))
    time = f"{hour % 12 + (12 if half == 'pm' else 0):02d}:{minute:02d}"
    spoken = f"{hour}:{minute:02d} {half}" if minute else f"{hour} {half}"
    level = rng.randint(1, 20) * 5
    request, call = rng.choice((
        (f"turn on the {device} in the {room} at {spoken}",
         {"tool": "switch", "device": device, "room": room, "state": "on", "at": time}),
        (f"switch off the {room} {device} at {spoken}",
         {"tool": "switch", "device": device, "room": room, "state": "off", "at": time}),
        (f"set the {room} {device} to {level} percent",
         {"tool": "level", "device": device, "room": room, "value": level}),
        (f"what is the {device} in the {room} doing at {spoken}",
         {"tool": "status", "device": device, "room": room, "at": time}),
    ))  # fmt: skip
    return Item({"request": request}, json.dumps(call))


TASKS = (
    Task("function_call", "tool use", "Writes the call of a given function that serves a request.", _function_call, source=_BFCL,
         phrasings=("Function: {function}\nRequest: {request}\nCall:",),
         unseen=("You may use one tool, {function}. The user says: \"{request}\" Reply with the invocation only:",
                 "# available: {function}\n# {request}\n>>>")),
    Task("tool_choice", "tool use", "Picks the tool that fits a request out of four.", _tool_choice, source=_BFCL,
         phrasings=("Request: {request}\nTools:\n{tools}\nWhich tool serves the request?\nAnswer:",
                    "{tools}\nPick the right tool for: {request}\nTool:"),
         unseen=("An assistant can use one of these functions:\n{tools}\nThe user wrote \"{request}\". Letter of the function to use:",
                 "User: {request}\n\nOptions:\n{tools}\n\nBest option:")),
    Task("device_call", "tool use", "Turns a spoken wish for a smart home into a JSON tool call.", drawn(_device),
         phrasings=("User: {request}\nJSON tool call:",),
         unseen=("Home automation log. Spoken command: \"{request}\". Emitted action object:",
                 "Hey house, {request}!\nThe house answers with a JSON object:")),
)  # fmt: skip
