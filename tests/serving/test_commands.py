"""The commands of docs/serving.md as they stand, with few queries, and a small stub in place of vLLM."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

from helpers import ROOT

pytest.importorskip("uvicorn", reason="needs the extra serve")

VLLM = """#!{python}
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

base, words = sys.argv[2], sys.argv[3:]
names = [word.partition("=")[0] for word in words if word.startswith("variant-")]


async def models(_):
    return JSONResponse({{"data": [{{"id": base}}, *({{"id": name, "parent": base}} for name in names)]}})


async def complete(request):
    body = await request.json()
    return JSONResponse({{"model": body["model"], "choices": [{{"text": body["prompt"]}}]}})


routes = [Route("/v1/models", models), Route("/v1/completions", complete, methods=["POST"])]
uvicorn.run(Starlette(routes=routes), port=int(words[words.index("--port") + 1]), log_level="error")
"""
QUERIES = """id,input,eval_type,answer_choices
1,"Write 1984 as a Roman numeral.
Roman:",generation,
2,"Write 47 as a Roman numeral.
Roman:",generation,
3,Hello there!,generation,
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_six_commands_lead_to_an_answer(tmp_path):
    for port in (8000, 8080):
        with socket.socket() as one:
            if not one.connect_ex(("127.0.0.1", port)):
                pytest.skip(f"port {port} is in use")
    text = (ROOT / "docs" / "serving.md").read_text("utf-8")
    block = re.search(r"```\n(pip install .*?)```", text, re.S)[1]
    assert len(re.findall(r"^\w", block, re.M)) == 6
    before, curl, last = block.partition("curl ")
    wait = "until curl -sf http://127.0.0.1:8080/ready > ready; do sleep 1; done\n"
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, code in (
        ("pip", "#!/bin/sh\n"),
        ("proto-route", f'#!/bin/sh\nexec {sys.executable} -m router "$@"\n'),
        ("vllm", VLLM.format(python=sys.executable)),
    ):
        (tools / name).write_text(code)
        (tools / name).chmod(0o755)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "library").symlink_to(ROOT / "data" / "library")
    (tmp_path / "data" / "test.csv").write_text(QUERIES)
    script = f"trap 'kill $(jobs -p)' EXIT\n{before}{wait}{curl}{last}"
    found = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    answer = json.loads(found.stdout.splitlines()[-1])
    assert answer["model"] == answer["router"]["model"] and answer["model"].startswith("variant-")
    assert answer["choices"][0]["text"] == "Write 1984 as a Roman numeral.\nRoman:"
    assert max(answer["router"]["weights"], key=answer["router"]["weights"].get) == "roman_numerals"
