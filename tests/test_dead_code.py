"""Nothing in the code is unused. What is used from outside follows a rule, or stands in the list below."""

import json
import re

import vulture

from helpers import ROOT

FROM_OUTSIDE = {
    "__getattr__",  # Python's own
    "_render_traceback_",  # IPython's
    "filters", "base_model_name_or_path",  # jinja2's, PEFT's
    "redirect_slashes", "send_400_response",  # Starlette's and uvicorn's
    "hook", "async_pre_call_hook", "user_api_key_dict", "call_type",  # LiteLLM's
    "required_tasks", "proto_route_load", "proto_route_take",  # vLLM's
    # The starter kit's contract, for methods that were written for it.
    "architecture", "get_name", "save_model", "_load_tokenizer", "_load_huggingface_models_and_configs",
    "all_merge_handlers",
}  # fmt: skip


def in_notebooks():
    """Every word of the notebooks' code."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield from re.findall(r"\w+", "".join(cell["source"]))


def test_nothing_is_unused():
    found = vulture.Vulture()
    found.scavenge([str(ROOT / name) for name in ("router", "merge", "scripts", "tests")])
    expected = FROM_OUTSIDE | set(in_notebooks())
    unused = [
        f"{item.filename}:{item.first_lineno}: {item.typ} {item.name}"
        for item in found.get_unused_code(min_confidence=60)
        if ROOT / "tests" not in item.filename.parents  # pytest finds its fixtures and hooks by name
        and not (item.typ == "class" and item.filename.parent == ROOT / "router" / "methods")  # found by file
        and item.name not in expected
    ]
    assert not unused
