"""The Python interface: it does what the command does, and refuses questions that are none."""

import gc
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import (
    NAMES,
    arguments,
    files_of,
    read_table,
    write_queries,
    write_tiny_adapter,
    write_tiny_library,
)  # fmt: skip
from router import Router
from router.kit import Merges
from router.main import main
from router.model.answer import encode
from router.model.apply import applied
from router.model.passes import truncated
from router.routing import state
from router.system.errors import InputError
from router.system.files import sha256_of

TEXTS = ["What is two and two?", "1 + 1 =", "Say x"]


@pytest.fixture()
def router(tiny_base, tiny_library):
    how = {"device": "cpu", "dtype": "float32", "max_gen_len": 6}
    return Router.from_library(tiny_library, base_model=str(tiny_base), **how)


def test_it_does_what_the_command_does(router, tiny_base, tiny_library, tmp_path):
    rows, out = [(str(n), text, "generation", "") for n, text in enumerate(TEXTS)], tmp_path / "out"
    queries = write_queries(tmp_path / "queries.csv", rows)
    assert main(arguments("proto_route", [queries], tiny_library, tiny_base, out)) == 0
    answers = [row["prediction"] for row in read_table(out / "queries.csv")]
    routing, weights = read_table(out / "queries.routing.csv"), router.route(TEXTS)
    assert list(weights) == router.candidates == [*NAMES, "base"]
    for row, told in zip(weights.to_dict("records"), routing, strict=True):
        assert row == pytest.approx({name: float(told[name]) for name in row}, abs=1e-6)
    assert [answer.strip() or "unknown" for answer in router.answer(TEXTS)] == [a.strip() for a in answers]


def test_choices_are_answered_with_one_of_them(router):
    choices = [["four", "five"], ["1", "2", "3"], ["x", "y"]]
    for answer, options in zip(router.answer(TEXTS, choices), choices, strict=True):
        assert answer in options


def test_weights_of_a_text_sum_to_one(router):
    np.testing.assert_allclose(router.route(TEXTS).sum(axis=1), 1)


def test_nothing_is_left_behind(router, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    router.answer(TEXTS[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["library"]


def test_a_method_that_only_merges_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("router.api.load_method", lambda name: Merges)
    with pytest.raises(ValueError, match="routes"):
        Router.from_library(write_tiny_adapter(tmp_path / "one", 1))


MORE = [*TEXTS, "Bonjour !", "x" * 40, "Say x again, and then y."]


@pytest.fixture()
def saved(router, tmp_path):
    return router.fit(MORE).save(tmp_path / "saved")


def test_a_saved_router_applies_its_variants_as_it_was_told_to(
    tiny_base, tiny_library, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        "router.pipeline.steps.applied", lambda base, how: asked.append(how) or applied(base, how)
    )
    how = {"base_model": str(tiny_base), "device": "cpu", "dtype": "float32", "apply": "beside"}
    folder = Router.from_library(tiny_library, **how).fit(MORE).save(tmp_path / "saved")
    Router.load(folder, device="cpu").answer(MORE)
    about = json.loads((folder / "router.json").read_text())
    del about["settings"]["apply"]  # as an earlier version wrote it
    (folder / "router.json").write_text(json.dumps(about))
    Router.load(folder, device="cpu").answer(MORE)
    assert asked == ["beside", "auto"]


def test_a_saved_router_needs_the_base_model_alone(router, saved, tiny_base, tiny_library, tmp_path):
    expected, answers = router.choose(MORE), router.answer(MORE)
    assert {choice.variant for choice in expected} == set(range(len(router.variants)))
    choices = [["a", "b"]] * 3
    chosen = router.answer(TEXTS, choices)
    shutil.move(tiny_library, tmp_path / "gone")
    moved = shutil.move(saved, tmp_path / "moved")
    loaded = Router.load(moved, device="cpu")
    assert loaded.candidates == router.candidates and loaded.variants == router.variants
    assert loaded.choose(MORE) == expected and loaded.choose(MORE[::-1]) == expected[::-1]
    assert loaded.answer(MORE) == answers
    assert loaded.answer(TEXTS, choices) == chosen


def test_a_loaded_router_can_be_saved_again(saved, tmp_path):
    loaded = Router.load(saved, device="cpu")
    again = Router.load(loaded.save(tmp_path / "again"), device="cpu")
    assert again.choose(MORE) == loaded.choose(MORE) and again.answer(MORE) == loaded.answer(MORE)
    assert Router.load(loaded.save(saved), device="cpu").answer(MORE) == loaded.answer(MORE)


def test_texts_that_no_adapter_fits_go_to_the_base_model_though_none_of_the_sample_did(router):
    base = router.route(MORE).idxmax(axis=1) == "base"
    ours, foreign = (
        [text for text, one in zip(MORE, base, strict=True) if one == to] for to in (False, True)
    )
    assert ours and foreign
    variants = router.fit(ours).variants
    assert [variants[choice.variant].weights for choice in router.choose(foreign)] == [{}] * len(foreign)
    assert all(variants[choice.variant].weights for choice in router.choose(ours))


def test_variants_are_written_once_and_go_with_the_router(tiny_base, tiny_library, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    how = {"device": "cpu", "dtype": "float32", "max_gen_len": 6, "false_alarm": 0.9, "temperature": 3.0}
    router = Router.from_library(tiny_library, base_model=str(tiny_base), **how).fit(MORE)
    first = router.answer(TEXTS)
    (folder,) = temporary.iterdir()
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert written and router.answer(TEXTS) == first
    assert {path: path.stat().st_mtime_ns for path in temporary.rglob("*") if path != folder} == written
    router.fit(TEXTS[:1])
    assert not list(temporary.iterdir())
    other = router.answer(TEXTS)
    (again,) = temporary.iterdir()
    assert {path.name for path in again.iterdir()} == {
        str(n) for n, variant in enumerate(router.variants) if variant.weights
    }
    assert router.answer(TEXTS) == other
    del router
    gc.collect()
    assert not list(temporary.iterdir())


def test_it_is_fitted_with_as_many_variants_as_it_was_made_for(router, tiny_base, tiny_library):
    how = {"base_model": str(tiny_base), "device": "cpu", "dtype": "float32", "n_variants": 1}
    one = Router.from_library(tiny_library, **how)
    own, asked = (router.fit(MORE, many).variants for many in (None, 1))
    assert own != asked  # else the next lines could not fail
    assert one.fit(MORE).variants == asked
    assert one.fit(MORE, 2).variants == router.fit(MORE, 2).variants != asked


def test_a_save_that_was_stopped_can_be_repeated(saved, tmp_path, monkeypatch):
    loaded = Router.load(saved)

    def stopped(_source, target, **_how):
        (target / "0").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("router.api.shutil.copytree", stopped)
    with pytest.raises(KeyboardInterrupt):
        loaded.save(tmp_path / "again")
    monkeypatch.undo()
    loaded.save(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(saved)


def test_a_base_model_of_another_configuration_is_told(saved, tiny_base, tmp_path, caplog):
    Router.load(saved, device="cpu")
    assert "configuration" not in caplog.text
    other = shutil.copytree(tiny_base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    (other / "config.json").write_text(json.dumps(config | rope))
    Router.load(saved, base_model=str(other), device="cpu")
    assert "the base model's configuration or tokenizer is not the one" in caplog.text


def test_a_router_that_is_saved_while_it_is_read_is_not_mixed(router, saved, monkeypatch):
    load = state.load

    def late(folder, *where):
        router.fit(MORE, 1).save(saved)
        return load(folder, *where)

    monkeypatch.setattr("router.api.state.load", late)
    with pytest.raises(InputError, match="a router was saved there while this one was read; load it again"):
        Router.load(saved, device="cpu")


def test_the_middle_of_a_very_long_text_is_not_tokenised(router, monkeypatch):
    long = "".join(f"{n} is a number. " for n in range(9000))
    (expected,) = router.choose([long])
    seen = []
    monkeypatch.setattr(
        "router.pipeline.reading.encode",
        lambda tokenizer, texts, limit: seen.extend(texts) or encode(tokenizer, texts, limit),
    )
    assert router.choose([long]) == [expected]
    assert len(seen[0]) == 1 << 15 and len(long) > 4 * len(seen[0])
    (row,) = encode(router._base.tokenizer, [long])
    assert truncated([row]) == truncated(encode(router._base.tokenizer, seen))  # what routing reads


def test_a_save_that_fails_leaves_the_router_that_was_there(router, saved, tiny_base, tmp_path):
    before = files_of(saved)
    large = write_tiny_adapter(tmp_path / "large" / "one", 1, alpha=1e6)
    other = Router.from_library(
        large, base_model=str(tiny_base), device="cpu", dtype="float16", false_alarm=0.9
    )
    with pytest.raises(InputError, match=r"a variant's .* pass dtype='float32'"):
        other.fit(MORE).save(saved)
    assert files_of(saved) == before


def test_a_loaded_router_notices_that_another_took_its_place(router, saved, tiny_base, tiny_library):
    loaded = Router.load(saved, device="cpu")
    answers = loaded.answer(MORE)
    router.fit(MORE).save(saved)  # the same bytes
    loaded.save(saved)
    assert loaded.answer(MORE) == answers
    router.fit(MORE, 1).save(saved)
    for ask in (lambda: loaded.answer(MORE), lambda: loaded.save(saved)):
        with pytest.raises(InputError, match=f"{saved}: .* another was saved there since; load it again"):
            ask()


def test_a_choice_says_how_it_was_decided(saved):
    for choice, (_, row) in zip(
        (loaded := Router.load(saved, device="cpu")).choose(MORE), loaded.route(MORE).iterrows(), strict=True
    ):
        assert list(choice.weights.values()) == sorted(choice.weights.values(), reverse=True)
        assert choice.weights == pytest.approx({name: row[name] for name in choice.weights})
        assert choice.fits is (row.idxmax() != "base") and choice.low_margin == (choice.margin < 0.5)
        made = loaded.variants[choice.variant]
        assert max({**made.weights, "base": made.base}.items(), key=lambda pair: pair[1])[0] in choice.weights


def test_a_finished_run_is_a_router_that_decides_as_it_did(router, tiny_base, tiny_library, tmp_path):
    rows, out = [(str(n), text, "generation", "") for n, text in enumerate(MORE)], tmp_path / "out"
    queries = write_queries(tmp_path / "queries.csv", rows)
    assert main(arguments("proto_route", [queries], tiny_library, tiny_base, out)) == 0
    found = Router.load(out, device="cpu").choose(MORE)
    told = read_table(out / "queries.routing.csv")
    assert [choice.variant for choice in found] == [int(row["variant"]) for row in told]
    for choice, row in zip(found, told, strict=True):
        assert choice.weights == pytest.approx({name: float(row[name]) for name in choice.weights}, abs=1e-6)
    assert [answer.strip() or "unknown" for answer in Router.load(out, device="cpu").answer(MORE)] == [
        row["prediction"].strip() for row in read_table(out / "queries.csv")
    ]


def test_a_record_that_lacks_what_a_router_needs_is_refused_by_what_is_missing(
    tiny_base, tiny_library, tmp_path
):
    queries = write_queries(tmp_path / "queries.csv", [("1", TEXTS[0], "generation", "")])
    out = tmp_path / "out"
    assert main(arguments("proto_route", [queries], tiny_library, tiny_base, out)) == 0
    record = json.loads((out / "run.json").read_text())
    for change, cause in (
        ({"flags": {"dataset_filepaths": [str(queries)]}}, "run.json: .*output_folder"),
        ({"flags": record["flags"] | {"top_k": "three"}}, "run.json: .*top_k"),
        ({"flags": record["flags"] | {"top_k": 0}}, "run.json: .*--top_k"),
        ({"flags": record["flags"] | {"apply": "merge"}}, "run.json: .*apply"),
        ({"variants": None, "base": None}, "expected the run's variants, found none"),
    ):
        parts = {key: value for key, value in (record | change).items() if value is not None}
        (out / "run.json").write_text(json.dumps(parts))
        with pytest.raises(InputError, match=cause):
            Router.load(out, device="cpu")
    parts = record | {"flags": {key: of for key, of in record["flags"].items() if key != "base_model"}}
    (out / "run.json").write_text(json.dumps(parts))
    assert Router.load(out, str(tiny_base), "cpu").candidates == [*NAMES, "base"]  # null is the same


def test_a_saved_router_cannot_be_fitted_anew(saved):
    with pytest.raises(ValueError, match="no adapters to make variants of"):
        Router.load(saved, device="cpu").fit(TEXTS)


def test_the_embedded_base_model_is_found_again_by_what_it_is(saved, monkeypatch):
    about = json.loads((saved / "router.json").read_text())
    told = []

    class Asked(Exception):
        pass

    def ask(spec, *_):
        told.append(spec)
        raise Asked

    monkeypatch.setattr("router.api.load_base", ask)
    for embedded, revision, expected in ((True, None, "embedded"), (False, "abc", "some/base@abc")):
        changed = about | {"embedded": embedded, "revision": revision, "base_model": "some/base"}
        (saved / "router.json").write_text(json.dumps(changed))
        with pytest.raises(Asked):
            Router.load(saved, device="cpu")
        assert told[-1] == expected


def test_before_fit_there_is_no_variant_and_nothing_to_save(router, tmp_path):
    assert {choice.variant for choice in router.choose(TEXTS)} == {None} and router.variants == []
    with pytest.raises(ValueError, match="call fit"):
        router.save(tmp_path / "saved")


def spoil_base(saved, tmp_path):
    about = json.loads((saved / "router.json").read_text())
    other = shutil.copytree(about["base_model"], tmp_path / "other")
    weights = load_file(Path(about["base_model"]) / "model.safetensors")
    changed = weights | {"lm_head.weight": weights["lm_head.weight"] + 1}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    (saved / "router.json").write_text(json.dumps(about | {"base_model": str(other)}))


def spoil_format(saved, _):
    about = json.loads((saved / "router.json").read_text())
    (saved / "router.json").write_text(json.dumps(about | {"format": 99}))


def spoil_variant(saved):
    path = next((saved / "variants").glob("*/adapter_model.safetensors"))
    tensors = {key: 2 * of for key, of in load_file(path).items()}
    save_file(tensors, path)


def sealed(saved):
    """Has router.json name the router's file as it is now."""
    about = json.loads((saved / "router.json").read_text())
    about["files"]["router.safetensors"] = sha256_of(saved / "router.safetensors")
    (saved / "router.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (spoil_base, "expected the weights that .* was made for"),
        (spoil_format, "expected format 7, got 99"),
        (lambda saved, _: (saved / "router.json").write_text("{"), "expected what Router.save wrote"),
        (lambda saved, _: (saved / "router.safetensors").write_bytes(b"x"), "router.safetensors: expected"),
        (lambda saved, _: (saved / "router.safetensors").unlink(), "router.safetensors: expected"),
        (lambda saved, _: shutil.rmtree(saved / "variants"), "variants/.*: expected"),
        (lambda saved, _: spoil_variant(saved), "variants/.*: expected"),
        (lambda saved, _: (saved / "router.json").unlink(), "run.json: expected"),
    ],
)
def test_what_is_no_router_is_refused_with_what_to_do(saved, tmp_path, spoil, cause):
    spoil(saved, tmp_path)
    with pytest.raises(InputError, match=cause):
        Router.load(saved, device="cpu")


def test_parts_of_a_router_that_do_not_fit_together_are_refused_by_what_does_not(saved):
    about, tensors = json.loads((saved / "router.json").read_text()), load_file(saved / "router.safetensors")
    tensors = {key: of.clone() for key, of in tensors.items()}  # the file, which may be mapped, is replaced
    with safe_open(saved / "router.safetensors", "pt") as file:
        router = file.metadata()["router"]
    variant, module = about["variants"][0], "model.layers.0.self_attn.q_proj"
    for change, cause in (
        ({"variants": [[1]]}, "variants.1: expected an object, got a list"),
        ({"variants": [variant | {"base": "1"}]}, "variants.1.base: expected a number, got a text"),
        ({"variants": [variant]}, "expected a centre for each variant"),
        ({"centres": [row[:-1] for row in about["centres"]]}, "a weight for each of 3 adapters"),
        ({"centres": [["1"]]}, "centres.1.1: expected a number"),
        ({"settings": []}, "settings: expected an object, got a list"),
        (
            {"settings": about["settings"] | {"scoring": "best"}},
            "settings.scoring: expected one of full, kit",
        ),
        ({"dtype": "eval"}, "dtype: expected one of bfloat16, float16, float32, got 'eval'"),
        ({"base_sha256": None}, "base_sha256 is missing"),
    ):
        (saved / "router.json").write_text(json.dumps(about | change))
        with pytest.raises(InputError, match=cause):
            Router.load(saved, device="cpu")
    (saved / "router.json").write_text(json.dumps(about | {"settings": about["settings"] | {"later": 1}}))
    assert Router.load(saved, device="cpu").candidates == about["candidates"]
    for change, cause in (
        ({f"owners {module}": tensors[f"owners {module}"] + 9}, "numbers of adapters in ascending order"),
        ({f"directions {module}": tensors[f"directions {module}"][:5]}, "expected numbers of shape"),
        ({"0 gate mean_": tensors["0 gate mean_"][:, :1]}, "gate mean_: expected numbers of shape"),
        ({"0 gate level_": tensors["0 gate level_"] / 0}, "gate level_: expected finite numbers"),
        (
            {"0 gate residual_scale_": 0 * tensors["0 gate residual_scale_"]},
            "residual_scale_: expected numbers above 0",
        ),
        (
            {"0 gate landmarks_": tensors["0 gate landmarks_"] + 9},
            "landmarks_: expected numbers of 3 adapters",
        ),
        ({"0 reference": tensors["0 reference"] / 0}, "a number wherever an adapter is heard"),
    ):
        save_file(
            tensors | {key: of.contiguous() for key, of in change.items()},
            saved / "router.safetensors",
            {"router": router},
        )
        sealed(saved)
        with pytest.raises(InputError, match=cause):
            Router.load(saved, device="cpu")
    for old, new, cause in (
        ('"representative": [0', '"representative": [7', "expected a representative for each of 3 adapters"),
        ('"temperature": ', '"temperature": -', "expected settings of a gate in their ranges"),
        ('"modules": ["', '"modules": ["x', "xmodel"),
    ):
        assert old in router
        save_file(tensors, saved / "router.safetensors", {"router": router.replace(old, new)})
        sealed(saved)
        with pytest.raises(InputError, match=cause):
            Router.load(saved, device="cpu")


def test_threads_share_a_router(router):
    texts = [f"{text} {n}" for n in range(4) for text in MORE]
    router.fit(texts)
    expected = [router.choose([text])[0] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: router.choose([text])[0], 2 * texts))
        answers = list(pool.map(lambda text: router.answer([text])[0], texts))
    assert [choice.variant for choice in found] == 2 * [choice.variant for choice in expected]
    for one, other in zip(found, 2 * expected, strict=True):
        assert one.weights == pytest.approx(other.weights, abs=1e-6)
    assert answers == [router.answer([text])[0] for text in texts]


@pytest.mark.parametrize("name", ["router.json", "router.safetensors"])
def test_a_strangers_file_is_not_replaced_by_a_router(router, tmp_path, name):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / name).write_text('{"mine": 1}')
    before = files_of(folder)
    with pytest.raises(InputError, match=name):
        router.fit(MORE).save(folder)
    assert files_of(folder) == before


def test_a_routers_own_file_that_somebody_changed_is_not_replaced(router, saved):
    (saved / "router.safetensors").write_bytes(b"changed")
    with pytest.raises(InputError, match=r"router\.safetensors"):
        router.fit(MORE).save(saved)
    assert (saved / "router.safetensors").read_bytes() == b"changed"


def test_an_adapter_that_was_trained_again_under_its_name_is_not_the_runs(tiny_base, tmp_path):
    library = write_tiny_library(tmp_path / "mine")
    queries = write_queries(tmp_path / "queries.csv", [("1", TEXTS[0], "generation", "")])
    out = tmp_path / "out"
    assert main(arguments("proto_route", [queries], library, tiny_base, out)) == 0
    Router.load(out, device="cpu")
    path = library / NAMES[0] / "adapter_model.safetensors"
    save_file({key: 1.5 * of for key, of in load_file(path).items()}, path)
    with pytest.raises(InputError, match=f"{NAMES[0]} .*other weights"):
        Router.load(out, device="cpu")


def test_weights_that_are_replaced_after_routing_make_no_variant(tiny_base, tmp_path):
    library = write_tiny_library(tmp_path / "mine")
    how = {"base_model": str(tiny_base), "device": "cpu", "dtype": "float32", "false_alarm": 0.9}
    router = Router.from_library(library, **how).fit(MORE)
    for name in NAMES:
        path = library / name / "adapter_model.safetensors"
        tensors = {key: 1.5 * of for key, of in load_file(path).items()}
        path.unlink()  # the old file may be mapped
        save_file(tensors, path)
    with pytest.raises(InputError, match="was changed while it was read"):
        router.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "router.json").exists()


def test_a_strangers_folder_of_variants_is_left_alone(router, tmp_path):
    (tmp_path / "theirs" / "variants").mkdir(parents=True)
    (tmp_path / "theirs" / "variants" / "mine.txt").touch()
    with pytest.raises(InputError, match="choose another"):
        router.fit(TEXTS).save(tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").rglob("*")] == ["variants", "mine.txt"]


@pytest.mark.parametrize(
    ("texts", "choices", "message"),
    [
        ("one text", None, "list"),
        ([], None, "at least one"),
        (["a"], [], "choice"),
        (["a"], [[]], "choice"),
        (["a", "b"], ["yes", "no"], "choice"),  # each would be a list of letters
        (["a", "b"], [["yes", "no"], "no"], "choice"),
    ],
)
def test_wrong_questions_are_refused(router, texts, choices, message):
    with pytest.raises(ValueError, match=message):
        router.answer(texts, choices)


@pytest.mark.parametrize("kind", [tuple, np.array, pd.Series, lambda texts: pd.Series(texts, [7, 7, 7])])
def test_a_column_of_a_table_is_a_list_of_texts(router, kind):
    assert router.route(kind(TEXTS)).equals(router.route(TEXTS))
    choices = [["four", "five"]] * 3
    assert router.answer(kind(TEXTS), pd.Series(choices)) == router.answer(TEXTS, choices)
    assert router.answer(TEXTS, np.array(choices)) == router.answer(TEXTS, choices)


@pytest.mark.parametrize(
    ("texts", "got"),
    [
        (pd.DataFrame({"input": TEXTS}), "a DataFrame"),  # a list of it would be its columns
        ({"a": "b"}, "a dict"),
        (None, "a NoneType"),
        (["a", None], "a NoneType as number 2"),
        (pd.Series(["a", np.nan], dtype=object), "a float as number 2"),
        (np.array([["a"]]), "a ndarray as number 1"),
        (b"bytes", "a int as number 1"),
    ],
)
def test_what_is_no_list_of_texts_is_named(router, texts, got):
    with pytest.raises(ValueError, match=f"^expected a list of texts, got {got}$"):
        router.route(texts)


def test_the_oracle_reads_labels_of_files_and_takes_no_other_texts(tiny_base, tiny_library, tmp_path):
    queries = write_queries(tmp_path / "queries.csv", [("1", TEXTS[0], "generation", "None", "mlp")])
    how = {"base_model": str(tiny_base), "device": "cpu", "dataset_filepaths": (queries,)}
    oracle = Router.from_library(tiny_library, method="oracle", **how)
    with pytest.raises(
        InputError, match="expected the queries of --dataset_filepaths, whose labels it reads"
    ):
        oracle.route(["some other text"])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("method", "proto", "expected one of .*, proto_route, .* got 'proto'"),
        ("seed", 2147483648, "--seed: expected a whole number from 0 to 2147483647, got 2147483648"),
        ("dtype", "bf16", "--dtype: expected one of auto, float32, bfloat16, float16, got 'bf16'"),
        ("device", "gpu", "--device: expected one of auto, cpu, cuda, got 'gpu'"),
        ("device_map", "none", "--device_map: expected one of none, auto, balanced"),
        ("apply", "merge", "--apply: expected one of auto, merged, beside, got 'merge'"),
        ("engine", "vLLM", "--engine: expected one of transformers, vllm, got 'vLLM'"),
        ("scoring", None, "--scoring: expected one of full, kit, got None"),
        ("max_seq_len", -3, "--max_seq_len: expected a whole number from 1"),
        ("batch_size", 2.5, "--batch_size: expected a whole number from 1 .*, got 2.5"),
        ("variant_rank", 0, "--variant_rank: expected a whole number from 1"),
        ("temperature", 0.0, "--temperature: expected a number above 0, got 0.0"),
        ("false_alarm", 1.0, "--false_alarm: expected a number between 0 and 1, got 1.0"),
    ],
)
def test_a_setting_that_is_no_such_word_or_number_is_refused(tiny_library, name, value, expected):
    with pytest.raises(InputError, match=expected):
        Router.from_library(tiny_library, **{name: value})


def test_a_saved_router_is_not_loaded_in_a_dtype_that_there_is_not(saved):
    for how in ({"dtype": "bf16"}, {"device": "gpu"}):
        with pytest.raises(InputError, match="expected one of auto, "):
            Router.load(saved, **how)
