"""Conversations: read from JSON lines, routed and answered in the base model's template, refused by row."""

import json
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers import NAMES, PLAIN, choice_scores, method_of, read_table
from helpers import QUERIES as ROWS
from router.api import Router
from router.cli import main as cli
from router.constants import TEMPLATE
from router.kit import Merges
from router.methods.proto_route import TO_BASE, decided
from router.model.answer import Answer, cut_at
from router.model.frames import ALPACA, BARE, Frame, bare, usual
from router.model.passes import MAX_TOKENS, truncated
from router.model.template import Template, brought
from router.pipeline import calibration
from router.pipeline.evidence import Evidence
from router.pipeline.journal import Journal
from router.pipeline.reading import BRIEF, FRAMES, SHARED, TURNS, Read, check_frame
from router.pipeline.result import Routing
from router.queries.submission import Query, read_queries
from router.routing.variants import Variant
from router.serving.export import vllm
from router.serving.names import read_served
from router.system.errors import InputError

PROMPTS = [Query(*row[:3]) for row in ROWS if row[2] == "generation"]


def talk(text, system=None):
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": text}]


HI = talk("hi")
CHOICE = {"input": "x", "eval_type": "multiple_choice"}


def file_of(tmp_path, *lines):
    path = tmp_path / "talks.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_lines_are_conversations_and_prompts(tmp_path):
    lines = (
        {"id": "a", "messages": talk("hi", "S")}, "",
        {"id": None, "input": "1 + 1 =", "eval_type": None, "answer_choices": [2, "3", -0.5]},
        {"id": 7, "input": "x", "more": None}, CHOICE | {"answer_choices": "['a', 'b']"},
    )  # fmt: skip
    first, second, third, spelt = read_queries(file_of(tmp_path, *lines))
    assert (first.id, first.input, first.conversation[1:]) == ("a", "system: S\nuser: hi", HI)
    assert second == Query("3", "1 + 1 =", "multiple_choice", ("2", "3", "-0.5")) and not second.conversation
    assert third == Query("7", "x", "generation") and spelt.choices == ("a", "b")
    assert read_queries(file_of(tmp_path, {"input": "x"}))[0].id == "1"


BAD = {
    "no JSON": ("{", "JSON"),
    "a list": ([1], "JSON"),
    "both": ({"messages": HI, "input": "x"}, "`messages`"),
    "neither": ({"id": "a"}, "`messages`"),
    "empty": ({"messages": []}, "messages"),
    "a text": ({"messages": "hi"}, "messages"),
    "no role": ({"messages": [{"content": "x"}]}, "role"),
    "a role": ({"messages": [{"role": "bot", "content": "x"}]}, "'bot'"),
    "content": ({"messages": talk(7)}, "message 1"),
    "no user": ({"messages": [{"role": "system", "content": "x"}]}, "user"),
    "blank": ({"messages": talk(" ")}, "user"),
    "answered": ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, "assistant"),
    "megabytes": ({"messages": talk("x" * (5 << 20))}, "characters"),
    "calls": ({"messages": [{"role": "assistant", "tool_calls": "x" * (5 << 20)}, *HI]}, "characters"),
    "a picture": ({"messages": talk([{"type": "text", "text": "x"}, {}])}, "parts"),
    "tools": ({"messages": HI, "tools": [{}]}, "tools"),
    **{key: ({"input": "x", key: "Sort."}, f"`{key}`") for key in ("system", "instruction", "options")},
    "an id": ({"id": [], "messages": HI}, "id"),
    "half an id": ({"id": "\ud83d", "messages": HI}, "column id"),
    "an id twice": ({"id": "1", "input": "x"}, "line 1"),
    "a kind": ({"input": "x", "eval_type": "essay"}, "eval_type"),
    "no choices": (CHOICE, "answer_choices"),
    **{f"{of!r}": (CHOICE | {"answer_choices": of}, "answer_choices") for of in ("", [True, 2], [[1]], "ab")},
    "no text": ({"input": 7}, "input"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named(tmp_path, kind):
    line, cause = BAD[kind]
    with pytest.raises(InputError, match="line 2") as told:
        read_queries(file_of(tmp_path, {"messages": HI}, line))
    assert cause in str(told.value) and len(str(told.value)) < 400
    for data in (b"\n", b"\xff\xfe{}"):
        (tmp_path / "talks.jsonl").write_bytes(data)
        with pytest.raises(InputError, match=r"talks\.jsonl"):
            read_queries(tmp_path / "talks.jsonl")


@pytest.fixture()
def ask(command, tmp_path):
    """Runs a file of such lines, in a template."""
    (tmp_path / "template.jinja").write_text(PLAIN)

    def run(*lines, given=("--chat_template", tmp_path / "template.jinja")):
        return command("proto_route", "--dataset_filepaths", file_of(tmp_path, *lines), "--quiet", *given)[0]

    return run


def test_a_run_answers_a_conversation_in_the_template(ask, tmp_path, capsys, monkeypatch):
    asked = [*talk("hi", "S"), {"role": "assistant", "content": "a"}, *HI]
    text, out = "system: S\nuser: hi\nassistant: a\nuser: hi\nassistant: ", tmp_path / "out"
    words = ("one two three four five six", "shorter", "", "yes")  # the last three are brief
    several = [message for word in words for message in talk(word)]
    assert ask({"id": "q9", "messages": HI}, given=()) == 2  # without a template it is refused
    assert "query q9" in (said := capsys.readouterr().err) and "--chat_template" in said
    assert not list(out.glob("*.csv"))
    assert ask({"messages": asked}, {"input": text}, {"messages": several}) == 0
    assert all(row["prediction"] for row in read_table(out / "talks.csv"))
    evidence = Evidence.load(out / "talks.evidence.safetensors")
    assert evidence.frames == [["user: ", "\nassistant: "]]
    np.testing.assert_array_equal(evidence.scores[0], evidence.scores[1])  # as messages and as text
    assert evidence.later.tolist() == [1, 1, 2]
    page = (out / "report.html").read_text()
    first = "user (decided): one two"
    for part in (
        r"system: S\nuser (decided): hi\nassistant (not read): a",
        r"user: {query}\nassistant: ",
        first,
    ):
        assert part in page
    for query in ("1", "2", "3"):
        capsys.readouterr()
        assert cli(["explain", str(out), query]) == 0
        said = capsys.readouterr().out
        assert "user: {query}" in said and (first in said) == (query == "3")
    monkeypatch.setattr("router.run.load_method", lambda name: Merges)  # a starter-kit method takes none
    assert ask({"messages": HI}) == 2


def test_a_run_keeps_the_template_of_its_chats(ask, tmp_path, tiny_base):
    assert ask({"messages": HI}) == 0
    out, (before,) = tmp_path / "out", Router.load(tmp_path / "out", device="cpu").choose([HI])
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}"
    )
    assert Router.load(out, device="cpu").choose([HI]) == [before]
    served = vllm(read_served(out))
    assert Path(served[served.index("--chat-template") + 1]).read_text() == PLAIN
    assert ask({"input": "hi"}, given=("--fresh",)) == 0  # one that has none leaves none
    assert not (out / TEMPLATE).exists() and "--chat-template" not in vllm(read_served(out))
    (out / TEMPLATE).write_text("mine")
    assert ask({"input": "hi"}) == 2 and (out / TEMPLATE).read_text() == "mine"


def test_a_template_that_all_adapters_bring_is_served(router_of, tiny_library, tmp_path):
    for folder in tiny_library.iterdir():
        (folder / TEMPLATE).write_text(PLAIN)
    router_of().fit([row[1] for row in ROWS]).save(tmp_path / "saved")
    words = vllm(read_served(tmp_path / "saved"))
    assert Path(words[words.index("--chat-template") + 1]).read_text() == PLAIN
    (tmp_path / "saved" / TEMPLATE).write_text("other")
    for use in (read_served, Router.load):
        with pytest.raises(InputError, match="chat_template"):
            use(tmp_path / "saved")


def test_half_a_character_costs_no_report(ask, tmp_path):
    half = "half \ud83d"
    assert ask({"messages": talk(half)}, {"input": half}) == 0
    assert "half ?" in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert not (tmp_path / "out" / ".journal").exists()


@pytest.fixture()
def method(base, tiny_library, tmp_path):
    (tmp_path / "template.jinja").write_text(PLAIN)

    def make(**settings):
        how = {"chat_template": tmp_path / "template.jinja", "output_folder": tmp_path / "out"} | settings
        return method_of("proto_route", base, tiny_library, **how)

    return make


def queries_of(*texts, system=None):
    return [
        Query(str(n), text, "generation", (), json.dumps(talk(text, system))) for n, text in enumerate(texts)
    ]


def test_a_system_message_that_many_share_is_a_frame_too(method):
    texts = [f"question {n}" for n in range(SHARED)]
    few, many = queries_of(*texts[1:], system="Be kind."), queries_of(*texts, system="Be kind.")
    found = method()
    assert not any(read.shared for turns in found.turns(few) for read in turns)
    frames = {read.shared for turns in found.turns(many) for read in turns}
    assert frames == {("system: Be kind.\nuser: ", "\nassistant: ")}
    routing = found.route(many, found.encoded(many))
    alone = method().route(few, found.encoded(few)).weights
    np.testing.assert_array_equal(found.route(few, found.encoded(few)).weights, alone)  # what came before
    assert np.abs(routing.weights[1:] - alone).max() > 0.01
    found.known = list(frames)
    plain = found.route(few, found.encoded(few))
    np.testing.assert_allclose(routing.weights[1:], plain.weights, atol=1e-6)
    found.known = ()
    np.testing.assert_allclose(routing.weights.sum(1), 1)
    mixed = [*many, *PROMPTS]  # bare prompts are decided as without them
    beside = found.route(mixed, found.encoded(mixed)).weights[-len(PROMPTS) :]
    np.testing.assert_allclose(beside, method().route(PROMPTS, found.encoded(PROMPTS)).weights, atol=1e-6)
    assert set(found.fits) == {BARE, ("user: ", "\nassistant: "), *frames}


def test_the_report_counts_whom_other_rates_would_send(method):
    """Also under a shared system message, where the lead is a mean of two."""
    talks = [*queries_of(*(f"{n} and {n * 7}" for n in range(40)), system="Be kind."), *PROMPTS]
    found = method()
    said = found.route(talks, found.encoded(talks)).evidence.sent
    for rate in (0.1, 0.3, 0.5):
        other = method(false_positive_rate=rate)
        weights = other.route(talks, other.encoded(talks)).weights
        assert (weights.argmax(1) < len(NAMES)).sum() == said[f"{rate:g}"]


def routing_of(*scores):
    scores = np.array(scores, np.float32)
    rest = np.zeros((len(scores), 1), np.float32)
    evidence = Evidence(
        ["a", "b"], ["m"], responses=scores[:, :2], scores=scores[:, :2], base_score=scores[:, 2],
        residual=rest[:, 0], votes=rest, frame=rest[:, 0], later=rest[:, 0],
    )  # fmt: skip
    return Routing(np.eye(3)[scores.argmax(1)], evidence)


@pytest.mark.parametrize(
    ("turns", "row"),
    [
        ([(9, 0, 1), (0, 0, 1)], 0),  # a follow-up says nothing
        ([(9, 0, 1), (0, 0, 5)], 1),  # a foreign question
        ([(9, 0, 1), (0, 9, 1)], 1),  # another job
        ([(0, 0, 1), (9, 0, 1)], 1),  # a job after small talk
        ([(9, 0, 1), (0, 0, 1), (0, 1, 0), (5, 0, 0)], 3),
        ([(0, 0, 1), (2, 0, 1)], 0),
        ([(9, 0, 1), (0, 0, 1.2)], 1),  # from and to the base model sooner
        ([(9, 0, 1), (0, 1.2, -5)], 0),  # than between adapters
        ([(9, 0, 1), (np.nan, -5, -4.9)], 0),  # not on a shortlist, so no higher than who is
        ([(9, 0, 1), (np.nan, -5, -1)], 1),
    ],
)
def test_a_conversation_stays_until_another_clearly_leads(turns, row):
    routing = routing_of(*turns, (0, 0, 1))
    long = Read((), BARE, words=99)
    found = decided(routing, [[long] * len(turns), [long]])
    np.testing.assert_array_equal(found.evidence.scores[0], routing.evidence.scores[row])
    np.testing.assert_array_equal(found.weights[1], routing.weights[-1])


LEADS = {0.9: 99, 1.1: 6, 1.5: 5, 2.5: 3, 5.9: 2, 6.1: 1}


@pytest.mark.parametrize(
    ("turn", "enough"), [*(((0, 0, lead), words) for lead, words in LEADS.items()), ((2, 1, 0), 6)]
)  # the last agrees with the first message
def test_a_brief_message_has_to_say_more(turn, enough):
    routing, first = routing_of((9, 0, 1), turn), Read((), BARE, words=9)
    for words in range(10):
        found = decided(routing, [[first, Read((), BARE, words=words)]])
        row = int(words >= enough)
        np.testing.assert_array_equal(found.evidence.scores[0], routing.evidence.scores[row])


@pytest.mark.parametrize(("words", "enough"), [(1, 6), (2, 3), (5, 1.2), (BRIEF, 0)])
def test_a_brief_first_message_has_to_lead_the_base_model_clearly(words, enough):
    for lead, sent in ((enough + 0.1, True), (enough - 0.1, False), (-1, False)):
        routing = routing_of((lead, -9, 0), (0, 0, 9))
        found = decided(routing, [[Read((), BARE, words=words)], [Read((), BARE)]])
        assert found.weights.tolist() == [[1, 0, 0] if sent else [0, 0, 1], [0, 0, 1]]
        expected = lead if sent or lead < 0 else lead * words / BRIEF - TO_BASE
        assert found.evidence.lead[0] == pytest.approx(expected, abs=1e-5)


def test_a_first_message_with_more_around_it_than_the_template_is_not_brief(method):
    several = [*talk("hi"), {"role": "assistant", "content": "x"}, *talk("yes")]
    queries = [
        *queries_of("hi"), *queries_of("hi", system="Be kind."), Query("plain", "hi", "generation"),
        Query("in the template", "user: hi\nassistant: ", "generation"),
        Query("several", "", "generation", (), json.dumps(several)),
    ]  # fmt: skip
    assert [[read.words for read in turns] for turns in method().turns(queries)] == [
        [1], [BRIEF], [BRIEF], [1], [1, 1]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [("Shorter, please.", 2), ("¿De qué color es?", 4), ("再短一点", 2), ("", 0), ("今天 OK?", 2)],
)
def test_words_are_counted_in_any_script(text, words):
    assert bare(text).words == words


def test_python_takes_texts_and_conversations(chat_router, tmp_path):
    router = chat_router(max_gen_len=4)
    asked = ["1 + 1 =", HI, tuple(HI)]
    weights = router.route([*asked, np.array(HI)]).to_numpy()  # the last as pandas reads it
    np.testing.assert_array_equal(weights[1:], weights[[1]].repeat(3, 0))
    assert len(router.answer(asked)) == 3
    router.fit(asked).save(tmp_path / "saved")
    chosen = router.choose(asked)
    assert Router.load(tmp_path / "saved", device="cpu").choose(asked) == chosen
    assert router.choose(asked[::-1]) == chosen[::-1]  # known, and no text is kept of them
    assert len(router._known) == 2 and {len(key) for key in router._known} == {32}
    for wrong in ({"role": "bot"}, {"role": "user", "content": "x", "at": object()}):
        with pytest.raises(InputError, match="text 2"):
            router.route(["x", [wrong]])


def test_an_adapter_is_asked_in_the_template_that_it_brings(chat_router, tiny_library, base, caplog):
    def bring(template):
        for folder in tiny_library.iterdir():
            (folder / "chat_template.jinja").write_text(template)

    def answer(asked):
        return chat_router(method="average", max_gen_len=6).answer([asked])

    under = talk("hi", "S")
    plain = answer(under)
    angled = "{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}"
    bring(angled)
    assert answer(HI) == answer("<hi>") != answer("user: hi\nassistant: ")
    bring("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN)
    assert answer(under) == plain and "no system" in caplog.text  # one that refuses is not used
    for folder in tiny_library.iterdir():
        (folder / "chat_template.jinja").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": angled}))
    assert answer(HI) == answer("<hi>")
    bring("{{ raise_exception('never') }}")
    caplog.clear()
    assert answer(under) == plain and "never" in caplog.text
    ids = tuple(base.tokenizer("abc")["input_ids"])
    assert cut_at(base.tokenizer, Answer("abc", ids), ids[1]) == Answer("a", ids[:2])  # a turn's end


def test_a_request_brings_no_new_frame(chat_router, tmp_path):
    router = chat_router()
    router.fit(["1 + 1 =", "hello"]).save(tmp_path / "saved")
    loaded = Router.load(tmp_path / "saved", device="cpu")
    before = set(loaded._proto.fits)
    assert before == {BARE, ("user: ", "\nassistant: ")}
    odd = [f"[INST]{' ' * n}hello [/INST]" for n in range(9)]
    many = [f"Rules.\n{n}" for n in range(2 * SHARED)]
    together = loaded.choose([*odd, *many, HI])
    assert set(loaded._proto.fits) == before
    assert together[-1] == loaded.choose([HI])[0] and together[0] == loaded.choose(odd[:1])[0]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def test_of_a_long_message_under_a_long_system_message_both_are_read(method):
    system, made = f"Start {'z' * 200} end.", method()
    for text in (f"Job {'y' * 300} now.", "short"):
        (query,) = queries_of(text, system=system)
        ((read,),) = made.turns([query])
        (ids,) = truncated([read.ids])
        seen = made.tokenizer.decode(ids)
        assert all(part in seen for part in ("system: Start", "end.\nuser: ", text[:9], text[-6:]))
        assert len(ids) == MAX_TOKENS
        ((read,),) = method(max_seq_len=160).turns([query])  # which reads both ends
        assert text[-6:] in made.tokenizer.decode(truncated([read.ids])[0])
    (query,) = queries_of(f"Translate {'y' * 300} now.", system="Rule. " * 4000)
    ((read,),) = made.turns([query])
    assert "Translate" in made.tokenizer.decode(truncated([read.ids])[0])


@pytest.mark.parametrize(("length", "limit"), [(9, None), (90, None), (40_000, None), (180, 40)])
def test_generic_text_is_read_as_queries_under_a_shared_system_message_are(method, length, limit):
    made, texts = method(max_seq_len=limit), calibration.generic_prompts(Frame("\0"))
    talks = queries_of(*(text[1:] for text in texts), system="Be kind. " * (length // 9))
    reads = [read for turns in made.turns(talks) for read in turns]
    (shared,) = {read.shared for read in reads}
    assert calibration.Calibration(made.base, limit, shared).rows == truncated([read.under for read in reads])


def test_an_engine_is_told_what_it_has_to_read(chat_router):
    system, read = "Be kind. " * 12, set()
    router = chat_router().fit([talk(f"{n} and {n}", system) for n in range(SHARED)])
    base, told = router._proto.base, router.unread(talk("7, 8", system))

    def probe(fitted, rows):
        read.update((fitted.framing.frame, tuple(row)) for row in rows)
        return fitted.probe(base.model, rows, base.tokenizer.pad_token_id, None)

    router.read_by(probe)
    router.choose([talk("7, 8", system)])
    assert read == set(told) and len(read) == 2


def test_how_few_answers_begin_makes_no_frame(method, tmp_path):
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    (tmp_path / "template.jinja").write_text(turn.format("{{ messages[-1]['content'] }}"))
    texts = [Query(str(n), turn.format(n) + f"So {n}:", "generation") for n in range(3)]
    made = method()
    alone = [made.turns([text]) for text in texts]
    assert made.turns(texts) == [turns for (turns,) in alone]
    assert {read.frame for turns in made.turns(texts) for read in turns} == {made.template.frame}


def test_a_template_of_messages_alone_has_each_read_on_its_own(chat_router):
    made = chat_router("{% for m in messages %}{{ m['content'] }} {% endfor %}")._proto
    asked = [*HI, {"role": "assistant", "content": "Yes?"}, *talk("Now 5, 4")]
    query = Query("0", "", "generation", (), json.dumps(asked))
    assert len(made.turns([query])[0]) == 2


def test_a_saved_router_has_the_frame_that_was_told(chat_router, tmp_path):
    router = chat_router(frame="Customer: {input} Agent:").fit(["1 + 1 =", "hello"])
    saved = Router.load(router.save(tmp_path / "saved"), device="cpu")
    text = "Customer: my parcel is late Agent:"
    assert saved.choose([text])[0].frame == Frame("Customer: ", " Agent:").name


def test_text_that_ends_as_the_template_does_is_in_its_frame(chat_router):
    router = chat_router(CHATML).fit(["1 + 1 =", "hello"])
    router._proto.prepare()
    asked = talk(" hi \n", "Sort.")
    text = router._method.template.text(asked)
    ends = (text, text.rstrip(), f"{text}<think>\n", f"{text}<think>\n\n</think>\n\n")
    expected, *others = router.choose([asked, *ends])
    assert expected.frame != "bare" and others == [expected] * 4
    for spoken in (text.removeprefix("<|im_start|>system\nSort.<|im_end|>\n"), f"<eos>{text}"):
        router._method.template.first = "<eos>"  # as if the tokenizer put it before any text
        assert router.choose([spoken])[0].frame == expected.frame
    told = chat_router(CHATML, frame="none").fit(["1 + 1 ="])
    told._proto.prepare()
    assert {choice.frame for choice in told.choose([text, "hello"])} == {"bare"}


def test_adapters_of_a_template_that_ends_like_alpacas_are_at_home_in_it(method, tmp_path):
    made = method()
    assert [form.after for form in made.forms] == [ALPACA.after, "\nassistant: "]
    (tmp_path / "template.jinja").write_text(
        "{{ '### Instruction:\n' + messages[-1]['content'] }}\n### Response:\n"
    )
    del made.template
    assert len(made.forms) == 1 and made.forms[0].before == "### Instruction:\n"


def test_a_template_that_writes_the_system_message_last_makes_few_frames(chat_router, monkeypatch):
    last = PLAIN + "{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}"
    router = chat_router(last).fit(["1 + 1 =", "hello"])
    router._proto.prepare()
    before = router.frames
    talks = [talk("hi", f"Rule {n}.") for n in range(FRAMES + 4)]
    assert len({choice.frame for choice in router.choose(talks)}) == 1
    router.route(talks)
    assert router.frames == before
    router.route(SHARED * talks[:1])
    assert len(router._proto.fits) > len(before) and router.frames == before
    monkeypatch.setattr("router.methods.proto_route.FRAMES_BYTES", 1)
    router.route([f"Rules.\n{n}" for n in range(2 * SHARED)])
    assert router._proto.fits.keys() == set(before) and router.wanted is None


def test_a_system_message_of_many_requests_becomes_a_frame(chat_router, tmp_path):
    """As if the router had been fitted with it; a thread may choose meanwhile."""
    own = Frame("system: Be kind.\nuser: ", "\nassistant: ")
    under = [talk(f"{n}?", "Be kind.") for n in range(SHARED)]
    plain = ["1 + 1 =", "hello", HI]
    chat_router().fit([*plain, *under]).save(tmp_path / "with")
    chat_router().fit([*plain, *under[1:]]).save(tmp_path / "without")
    expected = Router.load(tmp_path / "with", device="cpu").choose([*under, *plain])
    assert {choice.frame for choice in expected[:SHARED]} == {own.name}
    router = Router.load(tmp_path / "without", device="cpu")
    before = router.choose(under[1:])
    assert router.wanted is None and before[0].frame != own.name
    router.choose(under[:1])
    assert router.wanted == own
    with ThreadPoolExecutor() as pool:
        learning = pool.submit(router.calibrate, own)
        meanwhile = pool.submit(router.choose, plain).result()
        learning.result()
    found = router.choose([*under, *plain])

    for one, other in zip([*found, *meanwhile], [*expected, *found[SHARED:]], strict=True):
        assert one.frame == other.frame and one.weights == pytest.approx(other.weights, abs=1e-5)
    for one, other in zip(before, found[1:SHARED], strict=True):
        assert one.frame != other.frame or one.weights != pytest.approx(other.weights, abs=1e-5)
    assert router.wanted is None and router.busy == [own]


def test_parts_under_a_shared_system_message_are_kept_apart(method, monkeypatch, tmp_path):
    monkeypatch.setattr("router.pipeline.fitted.AT_ONCE", 4)
    talks = queries_of(*(f"question {n}" for n in range(SHARED)), system="Be kind.")
    found, journal = method(), Journal(tmp_path / "journal", {"a": 1})
    expected = found.route(talks, found.encoded(talks))
    shown = {tuple(expected.evidence.frames[int(n)]) for n in expected.evidence.frame}
    assert shown == {("system: Be kind.\nuser: ", "\nassistant: ")}
    kept = type(found)(found.name, found.base, found.adapters, replace(found.context, journal=journal))
    kept.template = found.template
    for _ in range(2):  # the second time all is known
        weights = kept.route(talks, kept.encoded(talks)).weights
        np.testing.assert_allclose(weights, expected.weights, atol=1e-6)
    journal.close()


def test_what_many_prompts_share_is_a_frame(method):
    texts = [f"{n} {'ab'[n % 2]} is no brief text {n}" for n in range(SHARED)]
    for form, found in (("Dear clerk,\n{}\nYours, Zed", True), ("{}\nAnswer:", False)):
        queries = [Query(text, form.format(text), "generation") for text in texts]
        shared = {read.shared for turns in method().turns(queries) for read in turns}
        assert shared == ({("Dear clerk,\n", "\nYours, Zed")} if found else {None})
    framed = [Query(str(n), f"user: {text}\nassistant: ", "generation") for n, text in enumerate(texts)]
    by_template, by_flag = method(), method(chat_template=None, frame="user: {input}\nassistant: ")
    pairs = ((by_template, queries_of(*texts)), (by_flag, framed))
    np.testing.assert_array_equal(*(of.route(some, of.encoded(some)).weights for of, some in pairs))


def test_prompts_outside_the_frame_that_was_told_are_named(method, caplog):
    made = method(frame="Q: {input}\nA:")
    told, chat, plain = (
        Query(text, text, "generation")
        for text in ("Q: how old is Ann?\nA:", "user: how old is Ann?\nassistant: ", "Q: how old?")
    )
    check_frame([told, chat, plain], made.settings.frame)
    assert "2 of 3 prompts" in caplog.text
    frames = [read.frame for (read,) in made.turns([told, chat, plain])]
    assert frames == [("Q: ", "\nA:"), made.template.frame, BARE]
    with pytest.raises(InputError, match=r"--frame 'Q: .*\$'"):
        check_frame([plain, chat], made.settings.frame)
    check_frame([plain, *queries_of("hi")], "{input}")


@pytest.mark.parametrize(("others", "framed"), [(0, False), (SHARED, True)])
def test_what_prompts_of_one_adapter_share_is_its_instruction(method, monkeypatch, others, framed):
    """The adapter with the highest score is made up: one for all, or another for half of the prompts."""
    made = method()
    texts = [f"Dear clerk,\n{n} {'ab'[n % 2]}\nYours, Zed" for n in range(2 * SHARED)]
    queries = [Query(str(n), text, "generation") for n, text in enumerate(texts)]
    plain = made.turns(queries)
    best = np.repeat([1, 2], [2 * SHARED - others, others])
    monkeypatch.setattr(Evidence, "best", best)
    routing = made.route(queries, made.encoded(queries))
    assert ((("Dear clerk,\n", "\nYours, Zed") in made.fits) == framed) and plain[0][0].shared
    alone = method(frame="none").route(queries, made.encoded(queries))
    assert np.array_equal(alone.weights, routing.weights) != framed


def test_an_answer_ends_where_the_variants_own_template_ends_a_turn(method, base, tmp_path):
    made = method()
    made.tokenizer = tokenizer = deepcopy(base.tokenizer)
    tokenizer.add_tokens(["<a>", "<b>", "\n"])  # line ends among them, as Gemma has
    written = {"plain": PLAIN, "a": PLAIN.replace("\n", "<a>"), "b": PLAIN.replace("\n", "<b>")}
    for name, template in written.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "chat_template.jinja").write_text(template)
    made.template, (query,) = Template(tokenizer, written["a"]), queries_of("x")
    answer = Answer("x\ny<b>z<a>", tuple(tokenizer("x\ny<b>z<a>")["input_ids"]))
    for name, ended in (("plain", "x\ny<b>z"), ("b", "x\ny")):
        own = brought(tokenizer, tmp_path / name)
        assert made._ended([query], [answer], [own])[0].text == ended
    config = SimpleNamespace(eos_token_id=[7, 8])  # a model that knows, as gpt-oss, whose every part ends so
    made.base = SimpleNamespace(model=SimpleNamespace(generation_config=config))
    assert made._ended([query], [answer], [own]) == [answer]


def test_choices_of_a_chat_end_as_answers_do(base, tiny_library, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(PLAIN.replace("\n", "<pad>"))
    made = method_of("base", base, tiny_library, chat_template=file, output_folder=tmp_path / "out")
    options, tokenizer = ("yes", "yes, it is"), deepcopy(base.tokenizer)
    chat, prompt = (
        Query("0", "", "multiple_choice", options, json.dumps(HI)),
        Query("1", "hi", "multiple_choice", options),
    )
    found = made.answer([chat, prompt], tmp_path).answers
    expected = choice_scores(base.model, tokenizer, "hi", options)
    assert found[1].scores == pytest.approx(expected, abs=1e-4)
    tokenizer.eos_token = "<pad>"
    expected = choice_scores(base.model, tokenizer, "user: hi<pad>assistant: ", options)
    assert found[0].scores == pytest.approx(expected, abs=1e-4)


def test_the_order_of_queries_changes_no_frame(method):
    texts = [f"{line}\n{n} of them" for line in ("Add:", "Sort:") for n in range(2 * SHARED)]
    assert usual(texts, SHARED) == usual(texts[::-1], SHARED) != BARE
    jobs = [f"Be number {n}." for n in range(FRAMES + 1)]
    asked = [query for job in jobs for query in queries_of(*"abcdefghijklmnop", system=job)]
    shared = [
        {read.shared for turns in method().turns(some) for read in turns} for some in (asked, asked[::-1])
    ]
    assert shared[0] == shared[1] and len(shared[0]) == FRAMES + 1  # and None


def test_chats_that_a_template_does_not_take_are_named_before_anything_is_answered(method):
    made = method()
    picky = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('no job') }}{% endif %}"
    made.template = Template(made.tokenizer, picky + PLAIN)
    with pytest.raises(InputError, match=r"query 0: .*no job.*\nquery 2: "):
        made.encoded(queries_of("no", "yes", "no"))
    parts = "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] %}{{ p['text'] }}{% endif %}"
    made.template = Template(made.tokenizer, parts + "{% endfor %}{% endfor %}answer: ")
    with pytest.raises(InputError, match="writes the user's message"):
        made.encoded(queries_of("yes"))


def test_a_variant_keeps_no_template_of_the_one_before(method, tiny_library, tmp_path):
    (tiny_library / "mlp" / "chat_template.jinja").write_text(PLAIN.replace("assistant: ", "them> "))
    there = []
    for name in ("mlp", "attention"):
        made = method()
        made.write_variants([Variant({name: 1.0}, 0.0)], tmp_path / "variants")
        there.append((tmp_path / "variants" / "0" / "chat_template.jinja").exists())
    assert there == [True, False]


def test_a_variant_brings_the_template_of_most_of_its_weight(method, tiny_library, tmp_path):
    mine = PLAIN.replace("assistant: ", "them> ")
    for name in ("attention", "mlp"):
        (tiny_library / name / TEMPLATE).write_text(mine)
    mixes = (
        {"everything": 0.4, "attention": 0.3, "mlp": 0.3}, {"everything": 0.6, "attention": 0.4},
        {"attention": 0.5, "everything": 0.5}, {"attention": 0.4},  # the rest is the base model's
    )  # fmt: skip
    variants = [Variant(weights, 1 - sum(weights.values())) for weights in mixes]
    method().write_variants(variants, tmp_path)
    brought = [tmp_path / str(n) / TEMPLATE for n in range(4)]
    assert [file.exists() for file in brought] == [True, False, False, False]
    assert brought[0].read_text() == mine
    merged = method_of("task_arithmetic", method().base, tiny_library)
    merged.template = method().template
    merged.write_variants([Variant(dict.fromkeys(NAMES, 1 / 3), 0.0)], tmp_path / "merged")
    assert (tmp_path / "merged" / "0" / TEMPLATE).read_text() == mine


def test_a_template_that_wants_a_system_message_gets_one(chat_router):
    strict = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no job') }}{% endif %}" + PLAIN
    router = chat_router(strict).fit(["1 + 1 ="])
    router.choose(["2 + 2 =", talk("hi", "S")])
    with pytest.raises(InputError, match="no job"):
        router.answer([HI])


def test_a_long_chat_keeps_both_its_ends(method):
    made = method(max_seq_len=40)
    asked = queries_of("hi", system="rules " * 40)
    (ids,) = made.encoded(asked)
    text = made.tokenizer.decode(ids)
    assert len(ids) == 40 and text.startswith("system: rules") and text.endswith("user: hi\nassistant: ")
    ((read,),) = made.turns(asked)
    assert list(read.ids) == ids
    prompts = [
        Query("0", "long " * 40, "generation"),
        Query("1", "user: " * 40 + "\nassistant: ", "generation"),
    ]
    assert [[list(read.ids)] for (read,) in made.turns(prompts)] == [[ids] for ids in made.encoded(prompts)]


def test_of_a_long_conversation_the_last_messages_are_read_and_the_job(method):
    job = "Write a headline for this story, please, and keep it short"
    long = [f"question {n}" for n in range(3 * TURNS)]
    written = "".join(f"User: {text}\nAssistant: x\n" for text in long)
    queries = [Query("0", written + "User: last\nAssistant:", "generation")]
    for words in (long, [job, *["why?"] * (2 * TURNS), "thanks"]):
        asked = [message for word in words for message in talk(word)]
        queries.append(Query("1", "", "generation", (), json.dumps(asked)))
    turns = method().turns(queries)
    assert [len(reads) for reads in turns] == [TURNS] * 3
    spelt = [method().tokenizer.decode(read.ids) for read in turns[-1]]
    assert job in spelt[0] and "thanks" in spelt[-1]  # brief messages do not push it out
