"""Fixtures: a tiny random model with its tokenizer, a tiny library, the command, the kit's golden files."""

import shutil
import sys
from functools import partial
from zlib import crc32

import pytest
import torch
from hypothesis import settings

from helpers import CHAT, PLAIN, PROMPTS, arguments, shared, write_queries, write_tiny_library
from router.model.frames import BARE

settings.register_profile("same cases each time", deadline=None, derandomize=True, database=None)
settings.load_profile("same cases each time")

# Files whose tests start other processes, or take many architectures or damaged files. What needs a browser
# is slow, too.
SLOW = set(
    "card device_map families full_disk fuzz kit_golden memory notebook numbers processes serve".split()
)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")
    parser.addoption(
        "--cases", type=int, help="damaged files of each kind, new ones each time (default: 100 old)"
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        skip = pytest.mark.skip(reason="slow; run with --all")
        for item in items:
            slow = "slow" in item.keywords or "browser" in item.fixturenames
            if slow or item.path.stem.removeprefix("test_") in SLOW:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is kept between runs goes to a temporary folder; the converted model stays in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.library.store.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A map of few steps in reports, and a fourth of the generic texts: one that changes few choices."""
    from sklearn.manifold import TSNE

    from router.routing.calibration import generic_prompts

    with pytest.MonkeyPatch.context() as patch:
        for module in ("router.pipeline.calibration", "router.methods.proto_route"):
            patch.setattr(f"{module}.generic_prompts", lambda frame=BARE: generic_prompts(frame)[2::4])
        patch.setattr("sklearn.manifold.TSNE", partial(TSNE, max_iter=250))
        yield


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, which is not there yet."""
    monkeypatch.setattr("router.library.store.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture()
def anyio_backend():
    """Tests that are coroutines are run by anyio's plugin."""
    return "asyncio"


@pytest.fixture(scope="session")
def kit_golden():
    return shared("kit_golden", "the starter kit's golden files")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A folder with a random two-layer Llama (hidden 32) and a byte-level tokenizer without BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {letter: n for n, letter in enumerate(alphabet, 2)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture()
def tiny_library(tmp_path):
    return write_tiny_library(tmp_path / "library")


@pytest.fixture()
def router_of(tiny_base, tiny_library):
    """Makes routers of the tiny library, or of another."""
    from router.api import Router

    fixed = {"base_model": str(tiny_base), "device": "cpu", "dtype": "float32"}
    return lambda library=tiny_library, **how: Router.from_library(library, **fixed | how)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture()
def saved_of(kept, tiny_base, tmp_path):
    """Copies a saved router of the tiny library, fitted in the same way only once for the tests of a file."""
    from router.api import Router

    def copied(texts, **how):
        one = kept / f"saved-{crc32(repr((texts, how)).encode())}"
        if not one.exists():
            library = write_tiny_library(tmp_path / "fitted")
            how = {"base_model": str(tiny_base), "device": "cpu", "dtype": "float32", "max_gen_len": 6} | how
            Router.from_library(library, **how).fit(texts).save(one)
        return shutil.copytree(one, tmp_path / "saved")

    return copied


@pytest.fixture()
def saved(saved_of, kept):
    """A loaded router of prompts and of a chat."""
    from router.api import Router

    (kept / "template.jinja").write_text(PLAIN)
    how = {"chat_template": kept / "template.jinja", "false_positive_rate": 0.9}
    return Router.load(saved_of([*PROMPTS[:3], CHAT], **how), device="cpu")


@pytest.fixture()
def chat_router(router_of, tmp_path):
    """Makes routers of the tiny library with a chat template."""

    def make(template=PLAIN, **how):
        (tmp_path / "template.jinja").write_text(template)
        return router_of(chat_template=str(tmp_path / "template.jinja"), **how)

    return make


@pytest.fixture(scope="module")
def base(tiny_base):
    from router.model.base import load_base

    return load_base(str(tiny_base), "cpu", "float32")


@pytest.fixture()
def adapters(tiny_library):
    from router.library.adapters import load_library

    return load_library([str(tiny_library)])


@pytest.fixture()
def command(tmp_path, tiny_base, tiny_library):
    """Runs a method on the queries, or on other rows; returns the exit code and the output folder."""
    from router.main import main

    queries = write_queries(tmp_path / "queries.csv")

    def run(method, *flags, out="out", rows=None, library=tiny_library, base=tiny_base):
        if rows is not None:
            write_queries(queries, rows)
        return main(arguments(method, [queries], library, base, tmp_path / out, *flags)), tmp_path / out

    return run


@pytest.fixture()
def own_method(tmp_path, monkeypatch):
    """Puts a file among the methods."""
    import router.methods as methods

    (tmp_path / "methods").mkdir()
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    made = []

    def write(name, text):
        (tmp_path / "methods" / f"{name}.py").write_text(text, "utf-8")
        made.append(name)

    yield write
    for name in made:  # other tests look at what is there
        sys.modules.pop(f"router.methods.{name}", None)
        vars(methods).pop(name, None)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as p:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = p.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()
