"""What vLLM's worker reads of marked requests, beside a pass of a model of our own over each prompt alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from helpers import CHAT, PROMPTS, stand_in
from router.integrations.vllm_worker import Reader, mark
from router.model.cache import cache_argument
from router.pipeline.state import FILE
from router.system.errors import InputError
from router.system.files import sha256_of


class Runner:
    """Runs a model of transformers on flattened batches, and says whose rows are whose, as vLLM's does."""

    def __init__(self, base, context):
        self.base, self.context = base, context
        self.device, self.model_config = torch.device("cpu"), SimpleNamespace(dtype=torch.float32)
        self.query_start_loc = SimpleNamespace(np=np.zeros(16, np.int64))
        self.input_batch = SimpleNamespace()
        self.caches, self.max_num_reqs, self.longer = {}, 8, 0
        for module in base.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.input_size = module.in_features
        base.model.compute_logits = lambda hidden: base.model.lm_head(hidden)
        base.model.packed_modules_mapping = {"q_proj": ["q_proj", "k_proj", "v_proj"]}  # they read the same

    def get_model(self):
        return self.base.model

    def step(self, parts, prompts):
        """Reads (id, start, tokens) of some prompts, in one batch; those that go on do so alone."""
        batch, bounds = self.input_batch, self.query_start_loc.np
        batch.req_ids = [name for name, _, _ in parts]
        batch.num_computed_tokens_cpu = np.array([start for _, start, _ in parts])
        batch.num_prompt_tokens = np.array([len(prompts[name]) - self.longer for name in batch.req_ids])
        batch.token_ids_cpu = np.zeros((len(parts), 512), np.int32)
        for n, name in enumerate(batch.req_ids):
            batch.token_ids_cpu[n, : len(prompts[name])] = prompts[name]
        bounds[1 : len(parts) + 1] = np.cumsum([count for _, _, count in parts])
        self.context.now = SimpleNamespace(attn_metadata={})
        flat = [token for name, start, count in parts for token in prompts[name][start : start + count]]
        places = [start + k for _, start, count in parts for k in range(count)]
        cache, past = None, 0
        if len(parts) == 1:
            cache, past = self.caches.setdefault(parts[0][0], DynamicCache()), parts[0][1]
        whose = np.repeat(np.arange(len(parts)), [count for _, _, count in parts])
        same = torch.from_numpy(whose[:, None] == whose[None])
        sees = torch.cat([torch.ones(len(flat), past, dtype=torch.bool), same.tril()], 1)
        with torch.inference_mode():
            hidden = self.base.model.model(
                input_ids=torch.tensor([flat]), position_ids=torch.tensor([places]),
                attention_mask=torch.where(sees, 0.0, -torch.inf)[None, None], use_cache=cache is not None,
                **({cache_argument(self.base.model): cache} if cache is not None else {}),
            ).last_hidden_state[0]  # fmt: skip
            self.base.model.compute_logits(hidden[bounds[1 : len(parts) + 1] - 1])


@pytest.fixture()
def runner(tiny_base, monkeypatch):
    from router.model.base import load_base

    context = SimpleNamespace(now=None)
    stand_in(monkeypatch, vllm={}, vllm__forward_context={"get_forward_context": lambda: context.now})
    return Runner(load_base(str(tiny_base), "cpu", "float32"), context)


@pytest.fixture()
def loaded(saved, runner):
    """A reader, and prompts of two frames under marked ids beside one that bears no mark."""
    reader = Reader(runner)
    reader.load(saved._folder, sha256_of(saved._folder / FILE), "v1")
    prompts, wanted = {"somebody-else": list(range(40, 60))}, {}
    for n, text in enumerate([*PROMPTS[:3], CHAT]):
        ((frame, ids),) = saved.unread(text)
        name = mark("v1", saved.frames.index(frame), f"a{n}")
        prompts[f"{name}-0a1b2c3d"] = list(ids)  # as vLLM makes ids of its own
        wanted[f"{name}-0a1b2c3d"] = name, saved._proto.fits[frame], list(ids)
    return reader, runner, prompts, wanted


def check(reader, base, wanted, names):
    for own in names:
        name, fitted, ids = wanted[own]
        expected = fitted.probe(base.model, [ids], base.tokenizer.pad_token_id, None)
        raw = np.frombuffer(reader.take(name), np.float32)
        np.testing.assert_allclose(
            raw[:-1].reshape(expected.responses.shape[1:]), expected.responses[0], 1e-4, 1e-6
        )
        np.testing.assert_allclose(raw[-1], expected.confidence[0], 1e-4)


def whole(prompts, names):
    return [(name, 0, len(prompts[name])) for name in names]


def test_prompts_of_two_frames_in_one_batch_are_read_as_alone(loaded, saved):
    reader, runner, prompts, wanted = loaded
    first, second, third, chat = wanted
    reader.done.update({str(n): b"x" for n in range(30)})  # which nobody asks for
    runner.step(whole(prompts, [first, "somebody-else", chat, second]), prompts)
    runner.step(whole(prompts, [third]), prompts)
    assert len(reader.done) <= 20
    check(reader, saved._base, wanted, wanted)
    assert reader.take(wanted[first][0]) == b""  # once
    length, runner.longer = len(prompts[first]), 3
    prompts[first] = [*prompts[first], 7, 8, 9]  # it was put off, and resumes with what it wrote
    runner.step([(first, 0, length + 3)], prompts)
    assert reader.take(wanted[first][0]) == b"" and not reader.reading


def test_a_prompt_that_is_read_in_parts_adds_up(loaded, saved):
    reader, runner, prompts, wanted = loaded
    name, *_ = wanted
    for start in range(0, len(prompts[name]), 6):
        assert reader.take(wanted[name][0]) == b""
        runner.step([(name, start, min(6, len(prompts[name]) - start))], prompts)
    check(reader, saved._base, wanted, [name])
    runner.caches.clear()
    runner.step([(name, 0, 6)], prompts)  # it was put off, and begins anew
    runner.caches.clear()
    runner.step([(name, 0, len(prompts[name]))], prompts)
    check(reader, saved._base, wanted, [name])
    runner.caches.clear()
    runner.step([(name, 0, 6)], prompts)  # what came from a cache gives no answer
    reader.reading.clear()
    runner.step([(name, 6, len(prompts[name]) - 6)], prompts)
    assert reader.take(wanted[name][0]) == b"" and not reader.reading


def test_a_request_without_a_known_mark_is_not_read(loaded):
    reader, runner, prompts, _ = loaded
    prompts["proto-route-ffffffff-0-a1"] = [5, 6, 7]
    runner.step(whole(prompts, ["somebody-else", "proto-route-ffffffff-0-a1"]), prompts)
    assert not reader.groups and not reader.reading and not reader.done
    runner.context.now = SimpleNamespace(attn_metadata=None)  # vLLM's rehearsal
    reader._enter()
    assert not reader.groups


def test_what_fails_while_reading_never_fails_the_engine(loaded, monkeypatch, caplog):
    reader, runner, prompts, wanted = loaded
    first, second, *_ = wanted
    with monkeypatch.context() as patch:
        patch.setattr(reader, "_visit", lambda *_: 1 / 0)
        runner.step(whole(prompts, [first]), prompts)
    with monkeypatch.context() as patch:
        patch.setattr("router.integrations.vllm_worker.confidence_of", lambda logits: 1 / 0)
        runner.step(whole(prompts, [second]), prompts)
    assert reader.take(wanted[first][0]) == reader.take(wanted[second][0]) == b""
    assert caplog.text.count("not read") == 2


def test_a_router_that_does_not_fit_is_refused(saved, runner, tmp_path):
    reader, file = Reader(runner), saved._folder / FILE
    with pytest.raises(InputError, match="reload"):
        reader.load(saved._folder, "0" * 64, "v1")
    for module in runner.get_model().modules():
        if hasattr(module, "input_size"):
            module.input_size = 17
    with pytest.raises(InputError, match=FILE):
        reader.load(saved._folder, sha256_of(file), "v1")
    with pytest.raises(InputError, match="VLLM_USE_V2_MODEL_RUNNER"):
        Reader(SimpleNamespace())
