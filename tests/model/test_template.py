"""Conversations in templates, against the tokenizer's own rendering."""

import json
from copy import deepcopy

import pytest
from tokenizers.processors import TemplateProcessing

from helpers import PLAIN
from router.model.frames import turns_of_text
from router.model.template import Template, template_for, template_of
from router.system.errors import InputError

TALK = [
    {"role": "system", "content": "Sort."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "3,"}, {"type": "image_url"}, {"type": "text", "text": "1"}],
    },
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "tool", "content": "1, 3"},
    {"role": "user", "content": "Now 5, 4"},
]


@pytest.fixture(scope="module")
def template(base):
    return Template(base.tokenizer, PLAIN)


def test_a_conversation_is_written_as_the_tokenizer_writes_it(template):
    written = "system: Sort.\nuser: 3,\n1\nassistant: \ntool: 1, 3\nuser: Now 5, 4\nassistant: "
    assert template.text(TALK) == written
    (one,) = template.turns([{"role": "user", "content": "x\nassistant: y\nuser: z"}])
    assert one.text == "x\nassistant: y\nuser: z"  # what a user writes is no markup


def test_each_message_is_read_with_the_system_message_alone(template):
    first, last = template.turns(TALK)
    assert first.read == "system: Sort.\nuser: 3,\n1\nassistant: "
    assert last.read == "system: Sort.\nuser: Now 5, 4\nassistant: "
    assert last.common == template.frame == ("user: ", "\nassistant: ")


TURN = "{%% for m in messages %%}%s{%% endfor %%}%s"
TEMPLATES = {
    "Phi 4": TURN % (
        "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>", "<|im_start|>assistant<|im_sep|>"
    ),
    "Command R": "{{ bos_token }}" + TURN % (
        "<|START_OF_TURN_TOKEN|><|{{ m.role.upper() }}_TOKEN|>{{ m.content }}<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "Granite": "{% if messages[0].role != 'system' %}[system]You are kind.[end]\n{% endif %}" + TURN % (
        "[{{ m.role }}]{{ m.content }}[end]\n", "[assistant]"
    ),
    "Llama 3.2, dated": "<|im_start|>Date: {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + TURN % (
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"
    ),
    "plain": PLAIN,
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_text_in_the_template_is_read_as_its_messages_are(base, name):
    template = Template(base.tokenizer, TEMPLATES[name])
    system, said = ({"role": role, "content": f"The {role}'s."} for role in ("system", "assistant"))
    first, last = ({"role": "user", "content": text} for text in ("One thing", "Two words."))
    for talk in ([last], [system, last], [system, first, said, last]):
        text = template.undated(template.text(talk).removeprefix(template.first))
        found = turns_of_text(text, template.usable, template.format)
        assert [(one.read, one.common) for one in found] == [
            (one.read, template.frame) for one in template.turns(talk)
        ]


def test_a_developer_and_calls_of_tools_are_written_as_servers_write_them(base):
    source = TURN % (
        "{% if m.role in ('system', 'user') %}{{ m.content }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %} ", "A:"
    )  # fmt: skip
    calls = "{% for m in messages %}{{ m.tool_calls[0].function.arguments + m.content }}{% endfor %}"
    call = {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    talk = [
        {"role": "developer", "content": "Be kind."}, {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]  # fmt: skip
    assert Template(base.tokenizer, source).text(talk) == "Be kind. x Oslo A:"
    assert call["function"]["arguments"] == '{"city": "Oslo"}'
    assert Template(base.tokenizer, calls).text(talk[2:]) == '{"city": "Oslo"}'  # which wants text
    for odd in ([{"name": "f", "arguments": "{}"}], [{"function": {"name": "f"}}], [{"type": "custom"}], 5):
        assert Template(base.tokenizer, PLAIN).text([talk[1] | {"tool_calls": odd}]) == "user: x\nassistant: "


def test_system_messages_are_one_where_the_template_takes_no_other(base):
    only_first = TURN % (
        "{% if m.role == 'system' and not loop.first %}{{ raise_exception('first') }}{% endif %}"
        "{{ m.role }} {{ m.content }} ", "A:"
    )  # fmt: skip
    user = {"role": "user", "content": "x"}
    kind, brief = {"role": "system", "content": "Be kind."}, {"role": "developer", "content": "Be brief."}
    for talk in ([kind, brief, user], [kind, user, brief]):
        (read,) = Template(base.tokenizer, only_first).turns(talk)
        assert read.read == "system Be kind.\n\nBe brief. user x A:"
    tokenizer = deepcopy(base.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('none') }}"
    with pytest.raises(InputError, match=r"query 7.*--chat_template"):
        Template(tokenizer).turns([kind, brief, user], "7")
    with pytest.raises(InputError, match=r"^(?!.*--chat_template)"):  # it is in use
        Template(tokenizer, tokenizer.chat_template).turns([kind, brief, user], "7")


def test_most_adapters_decide_which_template_a_library_has(base, tmp_path):
    others = [PLAIN.replace("user", "User"), PLAIN, PLAIN]
    for name, source in zip("abc", others, strict=True):
        (tmp_path / name).mkdir()
        named = [{"name": "tools", "template": "x"}, {"name": "default", "template": source}]
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert template_for(base.tokenizer, None, [tmp_path / name for name in "abc"]).jinja == PLAIN


@pytest.mark.parametrize(
    "source",
    [
        b"{{ raise_exception('no system') }}", b"{% if", b"nothing of the user", b"\xff\xfe",
        b"{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
    ],
)  # fmt: skip
def test_a_template_that_fails_is_a_sentence(base, tmp_path, source):
    file = tmp_path / "template.jinja"
    file.write_bytes(source)
    for path in (file, tmp_path / "gone", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            template_of(base.tokenizer, path)
    file.write_text(PLAIN, "utf-8-sig")
    assert template_of(base.tokenizer, file).source == PLAIN


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", "strftime_now(format='%d %b %Y')"])
def test_a_frame_is_the_same_tomorrow(base, call):
    dated = Template(base.tokenizer, f"{{{{ {call} }}}}\n" + PLAIN)
    assert dated.frame.before == "01 Jan 2025\nuser: "
    assert {dated.undated(f"{day} Oct 2026\nuser: x") for day in ("01", "09")} == {"01 Jan 2025\nuser: x"}
    assert dated.turns([{"role": "user", "content": "x"}])[0].common == dated.frame
    assert not dated.text([{"role": "user", "content": "x"}]).startswith("01 Jan 2025")  # it is asked today


def test_a_chat_has_the_special_tokens_that_its_template_writes_and_no_others(base):
    tokenizer = deepcopy(base.tokenizer)
    first = [("<pad>", tokenizer.pad_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=first)
    tokenizer.bos_token, talk = "<pad>", [{"role": "user", "content": "x"}]
    for source in (PLAIN, "{{ bos_token }}" + PLAIN):
        found, how = Template(tokenizer, source), {"chat_template": source, "add_generation_prompt": True}
        assert found.ids(talk) == tokenizer.apply_chat_template(talk, **how, return_dict=False)
        assert found.frame.before == "user: "  # which is read with one first token, like any text
