"""A server in place of the model in this process: the same answers, and what it says in bad weather."""

import json
import shutil
import threading

import pytest

httpx = pytest.importorskip("httpx", reason="needs the extra serve")

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402

from helpers import arguments, read_by_id, write_queries, write_tiny_library  # noqa: E402
from merge.folders import WEIGHTS_FILE  # noqa: E402
from router.engines import openai  # noqa: E402
from router.errors import ServerError  # noqa: E402
from router.main import main  # noqa: E402
from router.model.answer import encode  # noqa: E402
from router.submission import Query  # noqa: E402


class Server(httpx.MockTransport):
    """What vLLM does, with transformers and PEFT: completions, echoed prompts, adapters at run time.

    Args:
        base: a loaded base model.
        loads: whether adapters can be loaded at run time.
        fails: how many completions fail first.
    """

    def __init__(self, base, loads=True, fails=0, status=503):
        super().__init__(self.handle)
        self.base, self.loads, self.fails, self.status = base, loads, fails, status
        self.adapters, self.seen, self.most, self.now = {}, [], 0, 0
        self.lock, self.counter = threading.Lock(), threading.Lock()

    def handle(self, request):
        body = json.loads(request.content or b"{}")
        with self.counter:
            self.now += 1
            self.most = max(self.most, self.now)
            self.seen.append((request.url.path, body, request.headers))
        try:
            with self.lock:
                return self.answered(request.url.path, body)
        finally:
            with self.counter:
                self.now -= 1

    def answered(self, path, body):
        if path == "/v1/models":
            own = [{"id": name, "root": str(folder), "parent": "b"} for name, folder in self.adapters.items()]
            return httpx.Response(200, json={"data": [{"id": "b", "parent": None}, *own]})
        if path.endswith("_lora_adapter"):
            if not self.loads:
                return httpx.Response(404, json={"detail": "Not Found"})
            if path == "/v1/load_lora_adapter":
                self.adapters[body["lora_name"]] = body["lora_path"]
            else:
                del self.adapters[body["lora_name"]]
            return httpx.Response(200, text="done")
        if self.fails > 0:
            self.fails -= 1
            return httpx.Response(self.status, json={"error": "busy"})
        return httpx.Response(200, json={"choices": self.completed(body)[::-1]})

    def completed(self, body):
        model = self.base.model
        if body["model"] != "b":
            model = PeftModel.from_pretrained(model, self.adapters[body["model"]])
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        found = []
        for n, prompt in enumerate(prompts):
            with torch.inference_mode():
                if body.get("echo"):
                    logp = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
                    each = [None, *(float(logp[k, token]) for k, token in enumerate(prompt[1:]))]
                    found.append({"index": n, "text": "", "logprobs": {"token_logprobs": each}})
                else:
                    assert body["temperature"] == 0
                    ids = model.generate(
                        torch.tensor([prompt]), max_new_tokens=body["max_tokens"], do_sample=False
                    )[0, len(prompt) :]
                    text = self.base.tokenizer.decode(ids, skip_special_tokens=True)
                    found.append({"index": n, "text": text})
        if body["model"] != "b":
            model.unload()
        return found


@pytest.fixture()
def patient(monkeypatch):
    """No pauses between two tries."""
    waited = []
    monkeypatch.setattr(openai.time, "sleep", waited.append)
    return waited


@pytest.fixture()
def asked(base):
    """A way to ask a server for the answers to two queries."""
    queries = [
        Query("g", "What is two and two?", "generation"),
        Query("m", "Which is a fruit? ", "multiple_choice", ("stone", "pear", "")),
    ]
    rows = encode(base.tokenizer, [query.input for query in queries])

    def ask(server, variants=(None, None), **how):
        return openai.answer(
            "http://server",
            base.tokenizer,
            queries,
            rows,
            variants,
            max_new_tokens=4,
            transport=server,
            **how,
        )

    return ask


CLIENT = httpx.Client


def run(monkeypatch, server, out, words):
    monkeypatch.setattr(openai.httpx, "Client", lambda **how: CLIENT(**how | {"transport": server}))
    return main([*words, "--engine", "openai", "--upstream", "http://server", "--output_folder", str(out)])


@pytest.fixture()
def words(tmp_path, tiny_base, tiny_library):
    queries = write_queries(tmp_path / "queries.csv")
    flags = ("--false_alarm", 0.9, "--temperature", 3.0)
    return arguments("proto_route", [queries], tiny_library, tiny_base, tmp_path / "here", *flags)


def test_a_run_has_the_same_results_as_in_this_process(monkeypatch, tmp_path, base, words, capsys):
    assert main(words) == 0
    server = Server(base)
    assert run(monkeypatch, server, tmp_path / "there", words) == 0
    here, there = (read_by_id(tmp_path / name / "queries.csv") for name in ("here", "there"))
    assert here == there and len(here) == 6
    assert not server.adapters  # unloaded again
    named = {body["model"] for path, body, _ in server.seen if path == "/v1/completions"}
    assert len(named) > 1 and server.most > 1
    record = json.loads((tmp_path / "there" / "run.json").read_text())
    assert record["flags"]["engine"] == "openai"


@pytest.mark.parametrize("scoring", ["full", "kit"])
def test_choices_have_the_scores_of_this_process(base, asked, scoring):
    from router.model.answer import score_choices

    found = asked(Server(base), scoring=scoring)[1]
    rows = encode(base.tokenizer, ["Which is a fruit? "])
    (expected,) = score_choices(base.model, base.tokenizer, rows, [("stone", "pear", "")], scoring)
    assert found.scores == pytest.approx(expected, abs=1e-4) and not found.failed


def test_a_busy_server_is_asked_again_and_later_each_time(base, asked, patient):
    expected = asked(Server(base))
    assert asked(Server(base, fails=3, status=429)) == expected
    assert patient and set(patient) <= {1.0, 2.0, 4.0}


def test_a_server_that_stays_broken_ends_the_run_which_can_go_on(
    monkeypatch, tmp_path, base, words, capsys, patient
):
    class Dying(Server):
        def answered(self, path, body):
            if path == "/v1/completions" and sum(one[0] == path for one in self.seen) > 3:
                raise httpx.ConnectError("refused")
            return super().answered(path, body)

    monkeypatch.setattr(openai, "AT_ONCE", 1)
    assert run(monkeypatch, Dying(base), tmp_path / "there", words) == 2
    told = capsys.readouterr().err
    assert "expected an answer at /v1/completions, got none in 5 tries (ConnectError: refused)" in told
    assert not (tmp_path / "there" / "run.json").exists()
    server = Server(base)
    assert run(monkeypatch, server, tmp_path / "there", words) == 0
    assert sum(path == "/v1/completions" for path, *_ in server.seen) == 3  # of six; three were there
    main(words)
    here, there = (read_by_id(tmp_path / name / "queries.csv") for name in ("here", "there"))
    assert here == there


def test_a_query_that_is_refused_has_no_answer_and_the_others_have_theirs(base, asked, caplog):
    class Choosy(Server):
        def answered(self, path, body):
            if body.get("echo"):
                return httpx.Response(400, text="maximum context length is 8 tokens")
            return super().answered(path, body)

    first, second = asked(Choosy(base))
    assert not first.failed and second.failed and second.text == "unknown"
    assert "query m: the server refused it (400: maximum context length" in caplog.text


def test_a_server_without_run_time_loading_must_have_the_same_variants(base, tmp_path, asked):
    library = write_tiny_library(tmp_path / "some")
    variant = tmp_path / "variants" / "0"
    variant.parent.mkdir()
    (library / "mlp").rename(variant)
    expected = asked(Server(base), (variant, variant))
    server = Server(base, loads=False)
    with pytest.raises(ServerError, match=r"to load 0, got 404.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        asked(server, (variant, variant))
    server.adapters["variant-0"] = variant
    assert asked(server, (variant, variant)) == expected
    server.adapters["variant-0"] = library / "everything"  # another run's
    assert (variant / WEIGHTS_FILE).is_file()
    with pytest.raises(ServerError, match="to load 0"):
        asked(server, (variant, variant))


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (httpx.Response(401, text="wrong key"), "got 401: wrong key; set PROTO_ROUTE_UPSTREAM_KEY"),
        (httpx.Response(200, text="<html>"), "expected completions, got 200: <html>"),
        (
            httpx.Response(200, json={"choices": [{"index": n, "text": "x"} for n in range(3)]}),
            "cannot score",
        ),
        (httpx.Response(200, json={"choices": []}), "expected completions, got 200"),
        (httpx.Response(200, json={"choices": [{"index": 0}]}), "expected completions, got 200"),
        (
            httpx.Response(200, json={"choices": [{"index": 0, "text": None}]}),
            "expected completions, got 200",
        ),
        (
            httpx.Response(200, json={"choices": [{"index": 0, "text": "x", "logprobs": "a"}]}),
            "expected completions, got 200",
        ),
        (
            httpx.Response(
                200,
                json={"choices": [{"index": 0, "text": "x", "logprobs": {"token_logprobs": [None] * 99}}]},
            ),
            "cannot score",
        ),
    ],
)
def test_what_a_person_can_fix_is_said(base, asked, answer, cause):
    class Odd(Server):
        def answered(self, path, body):
            return answer if path == "/v1/completions" else super().answered(path, body)

    with pytest.raises(ServerError, match=cause):
        asked(Odd(base))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_lost_the_variants_or_refuses_the_key_costs_no_answer(
    monkeypatch, tmp_path, base, words, capsys, status
):
    class Changed(Server):
        def answered(self, path, body):
            if path == "/v1/completions" and sum(one[0] == path for one in self.seen) > 3:
                return httpx.Response(status, text="no")
            return super().answered(path, body)

    monkeypatch.setattr(openai, "AT_ONCE", 1)
    assert run(monkeypatch, Changed(base), tmp_path / "there", words) == 2
    assert "the same command goes on where it was" in capsys.readouterr().err
    assert (tmp_path / "there" / ".journal" / "routing.safetensors").exists()
    server = Server(base)
    assert run(monkeypatch, server, tmp_path / "there", words) == 0
    assert sum(path == "/v1/completions" for path, *_ in server.seen) == 3  # of six; three were there


def test_where_the_server_refuses_every_query_the_run_says_so(monkeypatch, tmp_path, base, words, capsys):
    class Refusing(Server):
        def answered(self, path, body):
            if path == "/v1/completions":
                return httpx.Response(400, text="maximum context length is 8 tokens")
            return super().answered(path, body)

    assert run(monkeypatch, Refusing(base), tmp_path / "there", words) == 2
    said = capsys.readouterr().err
    assert "the server refused each of them" in said and "dtype" not in said


@pytest.fixture()
def variants(tmp_path):
    """Makes folders of the same variant, as several runs write it."""

    def write(name):
        path = tmp_path / name / "0"
        shutil.copytree(write_tiny_library(tmp_path / f"{name}-library") / "mlp", path)
        return path, path

    return write


def test_a_run_takes_no_adapter_from_another_one_on_the_same_server(monkeypatch, base, asked, variants):
    class Shared(Server):
        other = None

        def handle(self, request):
            if request.url.path == "/v1/completions" and not self.other:
                self.other = True
                self.other = asked(self, variants("other"))  # begins and ends while the first one asks
            return super().handle(request)

    monkeypatch.setattr(openai, "AT_ONCE", 1)
    expected = asked(Server(base), variants("alone"))
    server = Shared(base)
    assert asked(server, variants("first")) == expected == server.other
    assert not server.adapters


def test_what_a_killed_run_left_loaded_is_unloaded_and_what_others_use_is_not(
    base, tmp_path, asked, variants
):
    own, beside = variants("out/.variants.b"), variants("out/.variants.c")[0]
    others = {"mix-c": str(beside), "mix-d": str(tmp_path / "else" / ".variants.d" / "0"), "theirs": "gone"}
    server = Server(base)
    server.adapters = {"mix-a": str(tmp_path / "out" / ".variants.a" / "0"), **others}
    assert asked(server, own) == asked(Server(base), own)
    assert server.adapters == others


def test_the_servers_key_is_brought(base, asked, monkeypatch):
    monkeypatch.setenv("PROTO_ROUTE_UPSTREAM_KEY", "theirs")
    server = Server(base)
    asked(server)
    assert {headers["authorization"] for *_, headers in server.seen} == {"Bearer theirs"}


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--engine", "openai"], "--upstream: expected an address"),
        (["--upstream", "http://server"], "--upstream: expected --engine openai"),
        (["--engine", "openai", "--upstream", "http://server", "--time_limit", "9"], "--time_limit"),
        (["--engine", "openai", "--upstream", "http://server", "-m", "arrow"], "makes variants, got arrow"),
    ],
)
@pytest.mark.parametrize("plan", [(), ("--plan",)])
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(words, flags, plan, cause, capsys):
    assert main([*words, *flags, *plan]) == 2
    assert cause in capsys.readouterr().err
