"""Model cards of variants: the hub's library parses them, their code runs, and what they say is so."""

import dataclasses
import re
import shlex

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from helpers import MIXED, NAMES, dense_updates, logits, write_tiny_adapter
from router.main import parser
from router.methods import load_method
from router.model.base import EMBEDDED_ID
from router.pipeline.context import Context
from router.pipeline.model_card import _cell, write_card
from router.pipeline.steps import load
from router.routing.variants import Variant
from router.settings import Settings
from router.system.files import sha256_of


def made(name, tiny_base, library, **settings):
    settings = {"dtype": "float32", "device": "cpu", "max_gen_len": 2} | settings
    context = Context(Settings(adapters=(str(library),), base_model=str(tiny_base), **settings))
    base, adapters, _ = load(context)
    return load_method(name)(name, base, adapters, context)


@pytest.fixture()
def write(tiny_base, tiny_library, tmp_path):
    """Writes a variant by a method; returns its folder and the text of its card."""

    def run(variant=MIXED, name="proto_route", out="variants", library=tiny_library, **settings):
        method = made(name, tiny_base, library, **settings)
        assert method.write_variants([variant], tmp_path / out) == ["0"]
        folder = tmp_path / out / "0"
        return folder, (folder / "README.md").read_text("utf-8")

    return run


def table(text, section):
    """The rows of the table below a heading, the header left out."""
    part = text.partition(f"## {section}\n")[2].partition("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def block(text, word, language="python"):
    """The one block of code that holds a word."""
    (found,) = [code for code in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if word in code]
    return found


def test_the_header_and_the_sources_are_those_of_the_variant(write, tiny_library, tiny_base):
    _, text = write()
    assert ModelCard(text).data.to_dict() == {
        "library_name": "peft",
        "base_model": "tiny",  # what the sources call the model that was loaded from a folder
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "license": "other",
        "tags": ["lora", "peft", "merge", "proto-route"],
    }
    files = {name: tiny_library / name / "adapter_model.safetensors" for name in NAMES}
    files["base model"] = tiny_base / "model.safetensors"
    weights = MIXED.weights | {"base model": MIXED.base}
    rows = [[row[0], float(row[1]), *row[2:]] for row in table(text, "Sources")]
    declared = dict.fromkeys(NAMES, "not declared") | {"base model": ""}
    assert rows == [[name, weights[name], "", declared[name], sha256_of(files[name])] for name in weights]
    _, text = write(name="ties", out="ties")  # a static merge names all sources without weights
    assert "merge" in ModelCard(text).data.tags and "`ties`" in text
    assert [row[:2] for row in table(text, "Sources")] == [[name, ""] for name in (*NAMES, "base model")]


@pytest.mark.parametrize(("rank", "accepted"), [(None, 8), (1, 1), (3, 8)])
def test_the_settings_are_those_of_the_run(write, tiny_base, rank, accepted):
    given = {"seed": 7, "n_variants": 3, "variant_rank": rank, "temperature": 0.25, "top_k": 2}
    _, text = write(**given)
    (flags,) = re.findall(r"```\n(-m .*?)```", text, re.DOTALL)
    found = vars(parser().parse_args(shlex.split(flags.replace("\\\n", ""))))
    settings = given | {"device": "cpu", "dtype": "float32", "merging_method": "proto_route"}
    assert {flag: found[flag] for flag in settings} == settings
    assert shlex.split(block(text, "vllm serve", "bash").replace("\\\n", "")) == [
        "vllm", "serve", str(tiny_base), "--dtype", "float32", "--enable-lora",
        "--lora-modules", "variant-0=variants/0", "--max-lora-rank", str(accepted),
    ]  # fmt: skip


@pytest.mark.parametrize("loader", ["PeftModel", "load_adapter"])
def test_the_code_for_peft_gives_the_dense_sum(write, loader, tiny_base, tiny_library):
    folder, text = write()
    code = block(text, "PeftModel")
    if loader == "load_adapter":  # instead of the last line
        code = code.rpartition("model = ")[0] + block(text, loader)
    names = {}
    exec(code.replace('"variants/0"', repr(str(folder))), names)  # what a reader would paste
    expected = names["AutoModelForCausalLM"].from_pretrained(tiny_base, dtype=torch.float32).eval()
    found, plain = logits(names["model"]), logits(expected)
    for name, weight in MIXED.weights.items():
        for module, update in dense_updates(tiny_library / name).items():
            expected.get_submodule(module).weight.data += torch.tensor(weight * update).float()
    torch.testing.assert_close(found, logits(expected), atol=1e-4, rtol=0)
    assert (found - plain).abs().max() > 0.1


MIT, OTHER = "license: MIT", "license: other\nlicense_name: my | own\nlicense_link: https://some.org/terms"
LICENCES = {
    "one for all": ((MIT,) * 3, "mit", ["MIT"] * 3),
    "several": ((MIT, None, "license: bsd"), "other", ["MIT", "not declared", "bsd"]),
    "broken": (("license: [", "- mit", "license: !!python/name:os.system"), "other", ["not declared"] * 3),
    "one of its own": ((OTHER,) * 3, "other", ["other, my \\| own, https://some.org/terms"] * 3),
    "endless": ((MIT, f"license: mit\nx: [{'a, ' * 20000}]", MIT), "other", ["MIT", "not declared", "MIT"]),
    "odd": (
        ("license: MIT\nmodel-index:\n- name: x\n  results:\n  - task: {type: y}",) * 3, "mit", ["MIT"] * 3,
    ),
    "as editors leave it": (
        ("---\nlicense: mit\n---", "\ufeff---\nlicense: mit\n---\nText", "\n--- \nlicense: mit\n--- \nText"),
        "mit", ["mit"] * 3,
    ),
    "a choice": (("license: [mit, apache-2.0]",) * 3, "other", ["mit, apache-2.0"] * 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", LICENCES)
def test_the_licence_is_what_the_sources_declare(write, tiny_library, kind):
    declared, expected, cells = LICENCES[kind]
    for name, text in zip(MIXED.weights, declared, strict=True):
        if text:
            card = f"---\n{text}\n---\n\n# An adapter\n" if kind != "as editors leave it" else text
            (tiny_library / name / "README.md").write_text(card)
    _, text = write()
    assert ModelCard(text).data.license == expected
    assert [row[3] for row in table(text, "Sources")[:-1]] == cells


def test_what_comes_from_the_hub_has_its_id_and_commit(write, tiny_base, tiny_library, tmp_path, monkeypatch):
    folder, _ = write()
    method = made("proto_route", tiny_base, tiny_library)

    def text_with(**changed):
        base = dataclasses.replace(method.base, **changed)
        write_card(folder, method.recipe, base, method.adapters, MIXED)
        return (folder / "README.md").read_text("utf-8")

    text = text_with(name="some/base", revision="0123abc")
    assert ModelCard(text).data.base_model == "some/base"
    assert text.count("revision='0123abc'") == 2 and "vllm serve some/base --revision 0123abc " in text
    assert table(text, "Sources")[-1][2] == "0123abc"
    assert "4-bit GGUF" in text_with(name=EMBEDDED_ID, revision=None) and "4-bit GGUF" not in text
    snapshot = write_tiny_adapter(tmp_path / "models--some--cook" / "snapshots" / "0123abc", 1)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **_: str(snapshot))
    _, text = write(Variant({"cook": 1.0}, 0.0), library="some/cook@v2", out="cook")
    assert table(text, "Sources")[0][:3] == ["cook (some/cook)", "1", "0123abc"]


@pytest.mark.parametrize(
    "name",
    [
        "a|b", "[a](http://there)", "<script>alert(1)</script>", "*a*", "`a`", "a\\|b", "a\nb", "&amp;",
        "![a](b)",
    ],
)  # fmt: skip
def test_a_name_stays_text_in_a_table(name):
    page = MarkdownIt().enable("table").parse(f"| name | |\n| --- | --- |\n| {_cell(name)} | end |\n")
    *_, cell, end = (token for token in page if token.type == "inline")
    assert end.content == "end" and not {token.type for token in page if token.type.startswith("html")}
    assert {part.type for part in cell.children} <= {"text", "text_special"}
    assert "".join(part.content for part in cell.children) == " ".join(name.split())
