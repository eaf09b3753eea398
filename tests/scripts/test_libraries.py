"""The libraries of the benchmarks, made of the tiny adapters: what is added is what its name says."""

import numpy as np
import pytest
import torch

from merge.factors import dense
from router.library.adapters import load_library
from scripts.bench import libraries

NAMES = ["attention", "everything", "mlp"]


@pytest.fixture()
def adapters(tiny_library, tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "FOLDER", tmp_path / "made")
    return load_library([str(tiny_library)])


def updates(adapter):
    return {module: dense(update).double().numpy() for module, update in adapter.read_all()}


def source_of(adapter):
    return adapter.name.split("~")[0]


def cosine(one, other):
    both = [(a.ravel() @ other[module].ravel()) for module, a in one.items() if module in other]
    norms = [np.sqrt(sum(np.square(a).sum() for a in x.values())) for x in (one, other)]
    return sum(both) / np.prod(norms)


def test_rescaled_copies_are_the_adapters_times_a_number(adapters):
    found = {adapter.name: adapter for adapter in libraries.with_rescaled(adapters)}
    assert len(found) == 9
    for name in NAMES:
        own = updates(found[name])
        for mark, scale in (("x4", 4), ("x0.25", 0.25)):
            copy = updates(found[f"{name}~{mark}"])
            for module, update in own.items():
                apart = np.linalg.norm(copy[module] - scale * update)
                assert apart < 0.01 * np.linalg.norm(scale * update)  # bfloat16


def test_random_adapters_have_the_shapes_and_norms_of_real_ones_but_not_their_directions(
    adapters, monkeypatch
):
    monkeypatch.setattr(libraries, "RANDOM", 5)
    found = libraries.with_random(adapters)
    assert [adapter.name for adapter in found] == NAMES + [f"random{n:02}" for n in range(5)]
    for n, drawn in enumerate(found[3:]):
        source = adapters[n % 3]
        assert drawn.folder.shapes.keys() >= source.folder.shapes.keys()
        assert abs(cosine(updates(source), updates(drawn))) < 0.2


def test_grown_copies_stay_close_and_are_made_once(adapters, monkeypatch):
    monkeypatch.setattr(libraries, "GROWN", 8)
    found = libraries.grown(adapters)
    assert len(found) == 8 and len({adapter.sha256 for adapter in found}) == 8
    for copy in found[3:]:
        source = next(adapter for adapter in adapters if adapter.name == source_of(copy))
        assert 0.95 < cosine(updates(source), updates(copy)) < 0.9999
    again = libraries.grown(adapters)
    assert [adapter.sha256 for adapter in again] == [adapter.sha256 for adapter in found]


def test_twins_are_the_same_and_one_can_be_left_out(adapters):
    twins = libraries.with_duplicates(adapters)
    assert [source_of(adapter) for adapter in twins] == NAMES * 2
    assert cosine(updates(twins[0]), updates(twins[3])) > 0.9999
    assert [adapter.name for adapter in libraries.without("mlp")(adapters)] == NAMES[:2]
    assert [adapter.name for adapter in libraries.only("mlp")(adapters)] == ["mlp"]


def test_a_smaller_library_of_copies_is_the_start_of_a_larger_one(adapters):
    few, more = libraries.grown(adapters, 5), libraries.grown(adapters, 7)
    assert {adapter.sha256 for adapter in few} < {adapter.sha256 for adapter in more}


def test_uniform_adapters_are_on_all_layers_and_made_once(base, tmp_path):
    found = libraries.uniform(base.model, "tiny", 3, 2, tmp_path / "uniform")
    for adapter in found:
        assert len(adapter.folder.shapes) == 14 and adapter.folder.base_model == "tiny"
        # Ranks are padded to one that engines serve; the update's own is what was asked for.
        assert {int(torch.linalg.matrix_rank(dense(update))) for _, update in adapter.read_all()} == {3}
    again = libraries.uniform(base.model, "tiny", 3, 2, tmp_path / "uniform")
    assert [a.sha256 for a in again] == [a.sha256 for a in found] and found[0].sha256 != found[1].sha256


def test_nothing_kept_is_found_in_an_empty_cache(monkeypatch):
    from router.system.files import cache_folder

    before = cache_folder()
    with libraries.empty_cache():
        inside = cache_folder()
        assert inside != before and list(inside.iterdir()) == []
    assert cache_folder() == before and not inside.exists()
