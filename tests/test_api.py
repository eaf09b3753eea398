"""The Python interface: it does what the command does, and refuses questions that are none."""

import copy
import gc
import json
import os
import pickle
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from helpers import (
    NAMES,
    PLAIN,
    arguments,
    edit_json,
    edit_weights,
    files_of,
    plain_model,
    read_table,
    weights_in,
    write_queries,
)  # fmt: skip
from router import Router
from router.constants import CANARY
from router.kit import Merges
from router.main import main
from router.model.answer import encode
from router.model.passes import truncated
from router.pipeline import state
from router.routing.clusters import cluster
from router.runs.load import load as load_run
from router.serving.names import read_adapters
from router.system.errors import InputError
from router.system.files import sha256_of

TEXTS = ["What is two and two?", "1 + 1 =", "Say x"]


@pytest.fixture()
def made(router_of):
    return lambda *library, **how: router_of(*library, **{"max_gen_len": 6} | how)


@pytest.fixture()
def router(made):
    return made()


MORE = [*TEXTS, "Bonjour !", "x" * 40, "Say x again, and then y."]


@pytest.fixture()
def saved(saved_of):
    return saved_of(MORE)


@pytest.fixture()
def finished(command):
    """The output folder of a run of the same texts."""
    return command("proto_route", rows=[(str(n), text, "generation", "") for n, text in enumerate(MORE)])[1]


def refused(cause, folder, **how):
    with pytest.raises(InputError, match=cause):
        Router.load(folder, device="cpu", **how)


def test_a_canary_is_what_peft_and_transformers_say(saved, finished, tiny_base):
    ids = AutoTokenizer.from_pretrained(tiny_base)(CANARY, return_tensors="pt").input_ids
    for folder in (saved, finished):
        router = Router.load(folder, device="cpu")
        assert any(variant.weights for variant in router.variants)
        for n, variant in enumerate(router.variants):
            model = plain_model(tiny_base, folder / "variants" / str(n) if variant.weights else None)
            with torch.inference_mode():
                expected = model(ids).logits[0, -1].log_softmax(-1).max().item()
            assert variant.canary == pytest.approx(expected, abs=1e-4)


def test_a_saved_router_needs_the_base_model_alone(made, tiny_base, tiny_library, tmp_path, monkeypatch):
    router = made(base_model=os.path.relpath(tiny_base))
    assert router.choose(["nobody asks it again"])[0].variant is None and router.variants == []
    with pytest.raises(ValueError, match="fit"):
        router.save(tmp_path / "saved")
    saved = router.fit(MORE).save(tmp_path / "saved")
    expected, answers = router.choose(MORE), router.answer(MORE)
    assert {choice.variant for choice in expected} == set(range(len(router.variants)))
    choices = [["a", "b"]] * 3
    chosen = router.answer(TEXTS, choices)
    shutil.move(tiny_library, tmp_path / "gone")
    shutil.move(saved, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)  # from which the base model has another relative path
    loaded = Router.load("moved", device="cpu")
    monkeypatch.chdir(tmp_path.parent)
    assert loaded.candidates == router.candidates and loaded.variants == router.variants
    assert loaded.choose(MORE) == expected and loaded.choose(MORE[::-1]) == expected[::-1]
    assert loaded.answer(MORE) == answers
    assert loaded.answer(TEXTS, choices) == chosen
    for refused in (lambda: loaded.fit(TEXTS), lambda: loaded.save(tmp_path / "again")):
        with pytest.raises(ValueError, match="no adapters"):
            refused()


def test_a_text_whose_adapter_no_variant_has_goes_to_the_base_model(router):
    top = router.route(MORE).idxmax(axis=1).tolist()
    one = next(n for n, name in enumerate(top) if name != "base")
    other = next(n for n, name in enumerate(top) if name not in (top[one], "base"))
    expected = router.fit([MORE[one], MORE[other]]).choose([MORE[other]])[0]
    assert expected.fits and router.variants[expected.variant].weights == {top[other]: 1.0}
    (choice,) = router.fit([MORE[one]]).choose([MORE[other]])
    assert not choice.fits and not router.variants[choice.variant].weights
    assert (choice.weights, choice.mix) == (expected.weights, expected.mix)


@pytest.mark.parametrize("many", [1, 2, 3])
def test_few_variants_answer_those_that_they_were_made_for(router, tmp_path, many):
    weights = router.route(MORE).to_numpy()
    labels, sent = cluster(weights, many, 0).labels, weights.argmax(1) < len(NAMES)
    saved = router.fit(MORE, many).save(tmp_path / "saved")
    for of in (router, Router.load(saved, device="cpu")):
        found = np.array([choice.variant for choice in of.choose(MORE)])
        assert np.array_equal(found[sent], labels[sent]) and sent.any()
        assert not any(of.variants[n].weights for n in found[~sent])  # the base model's own


def test_variants_go_with_the_router(made, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    router = made(false_positive_rate=0.9, temperature=3.0).fit(MORE)
    assert router.answer(TEXTS) == router.answer(TEXTS) and len(list(temporary.iterdir())) == 1
    router.fit(TEXTS[:1])
    assert not list(temporary.iterdir())
    router.answer(TEXTS)
    (folder,) = temporary.iterdir()
    names = {str(n) for n, variant in enumerate(router.variants) if variant.weights}
    assert {path.name for path in folder.iterdir()} == names
    expected = router.answer(TEXTS)
    shutil.rmtree(folder)  # as a cleaner of old files does
    assert router.answer(TEXTS) == expected
    del router
    gc.collect()
    assert not list(temporary.iterdir())


def test_a_base_model_of_another_configuration_is_told(saved, finished, tiny_base, tmp_path, caplog):
    Router.load(saved, device="cpu")
    assert not caplog.text
    other = shutil.copytree(tiny_base, tmp_path / "other")
    edit_json(other / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    for folder in (saved, finished):
        caplog.clear()
        Router.load(folder, base_model=str(other), device="cpu")
        assert "configuration" in caplog.text
    edit_weights(other / "model.safetensors", lambda key, of: of + (key == "lm_head.weight"))
    refused("weights", saved, base_model=str(other))


def test_a_router_that_is_saved_while_it_is_read_is_not_mixed(router, saved, monkeypatch):
    loaded, load = Router.load(saved, device="cpu"), state.load
    answers = loaded.answer(MORE)
    router.fit(MORE).save(saved)  # the same bytes
    assert loaded.answer(MORE) == answers

    def late(folder, *where):
        router.fit(MORE, 1).save(saved)
        return load(folder, *where)

    monkeypatch.setattr("router.api.state.load", late)
    for meets in (lambda: Router.load(saved, device="cpu"), lambda: loaded.answer(MORE)):
        with pytest.raises(InputError, match=str(saved)):
            meets()


def test_the_middle_of_a_very_long_text_is_not_tokenised(router, monkeypatch):
    long, seen = "".join(f"{n} is a number. " for n in range(9000)), []
    encoding = "router.pipeline.reading.encode"
    monkeypatch.setattr(encoding, lambda tokenizer, texts: seen.extend(texts) or encode(tokenizer, texts))
    router.choose([long])
    assert len(seen[0]) == 1 << 15 and len(long) > 4 * len(seen[0])
    (row,) = encode(router._base.tokenizer, [long])
    assert truncated([row]) == truncated(encode(router._base.tokenizer, seen))  # what routing reads


def test_a_save_that_fails_leaves_the_router_that_was_there(saved, made, tiny_library):
    before = files_of(saved)
    for name in NAMES:
        edit_json(tiny_library / name / "adapter_config.json", lora_alpha=1e12)
    with pytest.raises(InputError, match="dtype='float32'"):
        made(dtype="float16", false_positive_rate=0.9).fit(MORE).save(saved)
    assert files_of(saved) == before


def test_a_save_does_not_replace_the_adapters_that_it_reads(saved, tiny_library, tiny_base):
    own = sorted(path for path in (saved / "variants").iterdir())[-1]
    router = Router.from_library(own, tiny_library / "mlp", base_model=tiny_base, device="cpu").fit(MORE)
    before = files_of(saved)
    with pytest.raises(InputError, match=f"{own.name}: .*another folder"):
        router.save(saved)
    assert files_of(saved) == before


def test_a_choice_says_how_it_was_decided(saved):
    loaded = Router.load(saved, device="cpu")
    routed = loaded.route(MORE)
    np.testing.assert_allclose(routed.sum(axis=1), 1)
    for choice, (_, row) in zip(loaded.choose(MORE), routed.iterrows(), strict=True):
        assert list(choice.weights.values()) == sorted(choice.weights.values(), reverse=True)
        assert choice.weights == pytest.approx({name: row[name] for name in choice.weights})
        assert choice.fits is (row.idxmax() != "base") and choice.low_margin == (choice.margin < 0.5)
        made = loaded.variants[choice.variant]
        assert max({**made.weights, "base": made.base}.items(), key=lambda pair: pair[1])[0] in choice.weights


def test_a_router_does_what_the_command_did(router, finished, tiny_library):
    """One in Python, and one of the finished run."""
    routing, loaded = read_table(finished / "queries.routing.csv"), Router.load(finished, device="cpu")
    assert router.candidates == loaded.candidates == [*NAMES, "base"]
    answers = [row["prediction"].strip() for row in read_table(finished / "queries.csv")]
    for own in (router, loaded):
        for row, expected in zip(own.route(MORE).to_dict("records"), routing, strict=True):
            assert row == pytest.approx(weights_in(expected), abs=1e-6)
        assert [answer.strip() or "unknown" for answer in own.answer(MORE)] == answers
    assert loaded.frames  # a request waits for no calibration
    assert [choice.variant for choice in loaded.choose(MORE)] == [int(row["variant"]) for row in routing]
    mine = next((finished / "variants").glob("*/")) / "chat_template.jinja"
    mine.write_text("{{ messages }}")
    refused("variant", finished)
    mine.unlink()
    changes = (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda folder: edit_json(folder / "adapter_config.json", lora_alpha=99),
        lambda folder: grow(folder / "adapter_model.safetensors"),  # it was trained again since
    )
    for name, change in zip(NAMES[::-1], changes, strict=True):
        change(tiny_library / name)  # each is listed before those that were changed
        refused(name, finished)


def test_a_run_of_a_method_that_does_not_route_is_no_router(finished, tiny_base):
    record = json.loads((finished / "run.json").read_text())
    edit_json(finished / "run.json", variants=None, base=None)
    refused("variants", finished)
    del record["flags"]["base_model"]  # null is the same
    (finished / "run.json").write_text(json.dumps(record))
    assert Router.load(finished, str(tiny_base), "cpu").candidates == [*NAMES, "base"]


def test_the_embedded_base_model_is_found_by_what_it_is(saved, monkeypatch):
    asked = Mock(side_effect=InputError("asked"))
    monkeypatch.setattr("router.api.load_base", asked)
    for embedded, revision in ((True, None), (False, "abc")):
        edit_json(saved / "router.json", embedded=embedded, revision=revision, base_model="some/base")
        refused("asked", saved)
    assert [call.args[0] for call in asked.call_args_list] == ["embedded", "some/base@abc"]


def grow(file):
    edit_weights(file, lambda key, of: 1.5 * of)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda saved: edit_json(saved / "router.json", format=99), "format"),
        (lambda saved: (saved / "router.json").write_text("{"), "router.json"),
        (lambda saved: (saved / "router.safetensors").write_bytes(b"x"), "router.safetensors: "),
        (lambda saved: (saved / "router.safetensors").unlink(), "router.safetensors: "),
        (lambda saved: shutil.rmtree(saved / "variants"), "variants/"),
        (lambda saved: grow(next(saved.glob("variants/*/*.safetensors"))), "variants/"),
        (lambda saved: (saved / "router.json").unlink(), "found neither"),
    ],
)
def test_what_is_no_router_is_refused_with_what_to_do(saved, spoil, cause):
    spoil(saved)
    refused(cause, saved)


def test_parts_of_a_router_that_do_not_fit_together_are_refused(saved):
    about, file = json.loads((saved / "router.json").read_text()), saved / "router.safetensors"
    for change, cause in (
        ({"variants": [[1]]}, "variants.0: "),
        ({"variants": about["variants"][:1]}, "centre"),
        ({"centres": [row[:-1] for row in about["centres"]]}, "candidate"),
        ({"settings": about["settings"] | {"scoring": "best"}}, "--scoring: "),
        ({"dtype": "eval"}, "dtype: "),
        ({"base_sha256": None}, "base_sha256"),
    ):
        edit_json(saved / "router.json", **about | change)
        refused(cause, saved)
    edit_json(saved / "router.json", **about | {"settings": about["settings"] | {"later": 1}})
    assert Router.load(saved, device="cpu").candidates == about["candidates"]

    spoilt = []
    tensors = {key: of.clone() for key, of in load_file(file).items()}  # the file, which may be mapped, goes
    with safe_open(file, "pt") as opened:
        text = opened.metadata()["router"]
    for old, new in (
        ('"representative": [0', '"representative": [7'), ('"temperature": 0.7', '"temperature": 0.0'),
        ('"top_k": 3', '"top_k": 0'), ('_rate": 0.05', '_rate": 0.0'), ('_rate": 0.05', '_rate": 1.5'),
    ):  # fmt: skip
        assert old in text
        spoilt.append((tensors, text.replace(old, new)))
    for name, change in (
        ("owners model.layers.0.self_attn.q_proj", lambda of: of + 9),
        ("directions model.layers.0.self_attn.q_proj", lambda of: of[:5]),
        ("0 gate mean_", lambda of: of[:, :1]),
        ("0 gate threshold_", lambda of: of / 0),
        ("0 gate landmarks_", lambda of: of + 1),
        ("0 gate residual_scale_", lambda of: 0 * of),
        ("0 reference", lambda of: of / 0),
        ("0 reference", lambda of: of.nan_to_num(0.5)),  # where an adapter has no prototype
        ("0 reference", lambda of: of[1:]),
        ("homes", lambda of: of[1:]),
        ("homes", lambda of: of / 2),
    ):
        spoilt.append((tensors | {name: change(tensors[name]).contiguous()}, text))
    for changed, router in spoilt:
        save_file(changed, file, {"router": router})
        edit_json(saved / "router.json", files=about["files"] | {file.name: sha256_of(file)})
        refused(f"{file}: ", saved)


def test_threads_share_a_router(router):
    texts = [f"{text} {n}" for n in range(2) for text in MORE]
    router.fit(texts)
    expected = [router.choose([text])[0] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: router.choose([text])[0], 2 * texts))
        answers = list(pool.map(lambda text: router.answer([text])[0], texts))
    assert [choice.variant for choice in found] == 2 * [choice.variant for choice in expected]
    for one, other in zip(found, 2 * expected, strict=True):
        assert one.weights == pytest.approx(other.weights, abs=1e-6)
    assert answers == [router.answer([text])[0] for text in texts]


@pytest.mark.parametrize("name", ["router.json", "router.safetensors", "variants/mine.txt"])
def test_a_strangers_file_is_not_replaced_by_a_router(router, saved, tmp_path, name):
    mine = tmp_path / "theirs" / name
    mine.parent.mkdir(parents=True)
    mine.write_text(text := '{"files": {}}')
    with pytest.raises(InputError, match=name.partition("/")[0]):
        router.fit(MORE).save(tmp_path / "theirs")
    assert files_of(tmp_path / "theirs") == {name: text.encode()}
    (saved / "router.safetensors").write_bytes(b"changed")  # by somebody since
    with pytest.raises(InputError, match=r"router\.safetensors"):
        router.save(saved)
    assert (saved / "router.safetensors").read_bytes() == b"changed"


def test_a_run_and_a_router_do_not_share_a_folder(command, router, saved, finished, capsys):
    """The variants of one would be the other's."""
    before = files_of(saved), files_of(finished)
    assert command("proto_route", out="saved")[0] == 2 and "router.json" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"run\.json"):
        router.fit(MORE).save(finished)
    assert (files_of(saved), files_of(finished)) == before


def test_a_sample_that_is_refused_changes_nothing(chat_router):
    chats = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": t}] for t in MORE * 3]
    strict = "{% if messages | length == 3 %}{{ raise_exception('three') }}{% endif %}" + PLAIN
    router = chat_router(strict).fit(chats)
    expected, frames = router.choose(chats), router.frames
    with pytest.raises(InputError, match="three"):
        router.fit([[*chats[0], {"role": "user", "content": "x"}]])
    assert router.frames == frames and router.choose(chats) == expected


def test_a_save_that_is_killed_leaves_the_old_router_or_none(chat_router, tmp_path, monkeypatch):
    """It moves four things, the last of which is router.json; the next save goes through."""
    old, new, plain = chat_router().fit(MORE), chat_router().fit(MORE[:2]), Path.replace
    for there, moved in product((False, True), range(4)):
        folder, done = tmp_path / f"{there} {moved}", []
        if there:
            old.save(folder)

        def killed(path, to, folder=folder, done=done, moved=moved):
            if Path(to).parent == folder and (done.append(to) or len(done) > moved):
                raise KeyboardInterrupt
            return plain(path, to)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "replace", killed)
            new.save(folder)
        with suppress(InputError):
            assert Router.load(folder, device="cpu").choose(MORE) == old.choose(MORE) and there
        assert Router.load(new.save(folder), device="cpu").choose(MORE) == new.choose(MORE)
        assert sorted(path.name for path in folder.iterdir()) == [
            "chat_template.jinja", "router.json", "router.safetensors", "variants",
        ]  # fmt: skip


def test_what_is_put_there_while_a_router_is_saved_stays(router, saved, monkeypatch):
    plain = state.save

    def slow(*how):
        with pytest.raises(InputError, match="another run or save"):  # it would remove what this one wrote
            router.save(saved)
        (saved / "variants" / "mine").write_text("mine")
        return plain(*how)

    monkeypatch.setattr("router.pipeline.state.save", slow)
    with pytest.raises(InputError, match="variants"):
        router.fit(MORE).save(saved)
    assert (saved / "variants" / "mine").read_text() == "mine" and (saved / "router.json").exists()


def test_weights_that_are_replaced_after_routing_are_refused(made, tiny_library, tmp_path):
    router = made(false_positive_rate=0.9).fit(MORE)
    for name in NAMES:
        grow(tiny_library / name / "adapter_model.safetensors")
    with pytest.raises(InputError, match="adapter "):
        router.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "router.json").exists()


def test_wrong_questions_are_refused(router):
    for texts, choices in (
        ("one text", None), ([], None), (["a"], []), (["a"], [[]]), ({"a": "b"}, None), (None, None),
        (["a", "b"], ["yes", "no"]),  # each would be a list of letters
        (["a", "b"], [["yes", "no"], "no"]), (b"bytes", None), (np.array([["a"]]), None),
        (pd.DataFrame({"input": TEXTS}), None),  # a list of it would be its columns
        (pd.Series(["a", np.nan], dtype=object), None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            router.answer(texts, choices)


def test_a_column_of_a_table_is_a_list_of_texts(router):
    choices, routed = [["four", "five"]] * 3, router.route(TEXTS)
    expected = router.answer(TEXTS, choices)
    assert set(expected) <= {"four", "five"} and router.answer(TEXTS, np.array(choices)) == expected
    assert router.answer(TEXTS, [np.arange(4, 6)] * 3) == router.answer(TEXTS, [["4", "5"]] * 3)
    for kind in (tuple, np.array, pd.array, pd.Index, pd.Series, lambda texts: pd.Series(texts, [7, 7, 9])):
        weights = router.route(texts := kind(TEXTS))
        index = texts.index if isinstance(texts, pd.Series) else routed.index
        assert weights.index.equals(index)  # by which tables are joined
        assert weights.reset_index(drop=True).equals(routed)
        assert router.answer(kind(TEXTS), pd.Series(choices)) == expected


def test_a_run_is_loaded_and_read_from_any_directory(tiny_base, tiny_library, tmp_path, monkeypatch):
    write_queries(tmp_path / "queries.csv", [(str(n), text, "generation", "") for n, text in enumerate(MORE)])
    monkeypatch.chdir(tmp_path)
    paths = [os.path.relpath(path) for path in ("queries.csv", tiny_library, tiny_base, "out")]
    for name in NAMES:
        edit_json(tiny_library / name / "adapter_config.json", base_model_name_or_path=paths[2])
    assert main(arguments("proto_route", paths[:1], *paths[1:])) == 0
    flags = arguments("proto_route", paths[:1], paths[1], paths[2], "named")
    at = flags.index("--base_model")
    assert main(flags[:at] + flags[at + 2 :]) == 0
    monkeypatch.chdir(tmp_path.parent)
    assert Router.load(tmp_path / "named", device="cpu").candidates == [*NAMES, "base"]
    assert [query.input for query in load_run(tmp_path / "out").queries] == MORE
    assert len(Router.load(tmp_path / "out", device="cpu").variants) > 1
    assert read_adapters(tmp_path / "out").keys() == set(NAMES)
    edit_json(tmp_path / "out" / "run.json", directory="x" * 5000)  # of a stranger
    assert set(load_run(tmp_path / "out").queries) == {None}


def test_what_python_people_pass_is_taken_or_refused_in_a_sentence(router, tiny_base, tiny_library):
    again = Router.from_library([tiny_library], base_model=tiny_base, top_k=np.int64(3), device="cpu")
    assert again.candidates == router.candidates
    said = SimpleNamespace(model_dump=lambda exclude_none: {"role": "assistant", "content": "Hello"})
    asked = [{"role": "user", "content": text} for text in ("Hi", "Say x")]
    with pytest.raises(InputError, match="chat template"):  # which this base model lacks
        router.route([[asked[0], said, asked[1]]])
    with pytest.raises(InputError, match="put a chat into a list"):
        router.route(asked)
    for many in ("2", "auto", 1.5, True):
        with pytest.raises(ValueError, match="n_variants"):
            router.fit(TEXTS, many)
    assert router.fit(TEXTS, np.int64(1)).variants
    with pytest.raises(InputError, match="empty list"):  # of a pattern that met nothing
        Router.from_library([], base_model=tiny_base)
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="save it"):
            way(router)


def test_a_setting_out_of_its_range_is_refused(tiny_library, saved, monkeypatch):
    with pytest.raises(InputError, match="--batch_size: "):
        Router.from_library(tiny_library, batch_size=2.5)
    with pytest.raises(InputError, match="proto_route"):
        Router.from_library(tiny_library, method="proto")
    monkeypatch.setattr("router.methods.find_spec", lambda package: None)
    with pytest.raises(InputError, match="expected the package vllm"):
        Router.from_library(tiny_library, engine="vllm")
    for how in ({"dtype": "bf16"}, {"device": "gpu"}):
        with pytest.raises(InputError, match="auto"):
            Router.load(saved, **how)
    monkeypatch.setattr("router.api.load_method", lambda name: Merges)  # a method that only merges
    with pytest.raises(ValueError, match="routes"):
        Router.from_library(tiny_library)
