"""Clusters: few variants, close to what every query asked for."""

import numpy as np
import pytest

from router.routing.clusters import MEAN_LOSS, WORST_LOSS, cluster, firsts, mixes, most_variants, nearest


def lost(weights, clusters):
    """Mean total variation distance, query by query, in plain Python."""
    total = 0.0
    for row, label in zip(weights.tolist(), clusters.labels.tolist(), strict=True):
        total += sum(abs(x - y) for x, y in zip(row, clusters.weights[label].tolist(), strict=True)) / 2
    return total / len(weights)


def separated(groups, members, seed, noise=0.05):
    """Shuffled rows near the corners of the simplex, and the group of each."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(groups), members))
    weights = (1 - noise) * np.eye(groups)[truth] + noise * rng.dirichlet(np.ones(groups), len(truth))
    return weights, truth


def random_rows(rows, columns, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(columns, 0.3), rows)


@pytest.mark.parametrize("n_variants", [1, 7])
def test_every_query_is_in_the_nearest_mean(n_variants):
    weights = random_rows(120, 5)
    found = cluster(weights, n_variants, seed=0)
    assert found.labels.shape == (120,) and found.weights.shape == (n_variants, 5)
    for label, row in enumerate(found.weights):
        np.testing.assert_allclose(row, mixes(weights)[found.labels == label].mean(0), atol=1e-12)
    np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-12)
    distances = ((mixes(weights)[:, None] - found.weights[None]) ** 2).sum(2)
    assert (distances[np.arange(120), found.labels] <= distances.min(1) + 1e-9).all()
    of = firsts(weights, found)
    assert (nearest(weights, found.weights, of) == found.labels).all()
    later = random_rows(300, 5, seed=1)
    distances = ((mixes(later)[:, None] - found.weights[None]) ** 2).sum(2)
    distances[~of[:, mixes(later).argmax(1)].T] = np.inf
    assert (nearest(later, found.weights, of) == distances.argmin(1))[np.isfinite(distances).any(1)].all()


@pytest.mark.parametrize("n_variants", [None, 7])
def test_the_order_of_queries_does_not_matter(n_variants):
    weights, order = random_rows(200, 9), np.random.default_rng(1).permutation(200)
    found, moved = (cluster(rows, n_variants, seed=0) for rows in (weights, weights[order]))
    np.testing.assert_allclose(moved.weights[moved.labels], found.weights[found.labels][order], atol=1e-12)


@pytest.mark.parametrize("n_variants", [None, 6, 50])
@pytest.mark.parametrize("counts", [[60, 20, 5, 3, 1, 1], [30, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
def test_each_distinct_row_gets_a_variant_of_its_own(n_variants, counts):
    truth = np.repeat(np.arange(6), counts)
    found = cluster(np.eye(6)[truth], n_variants, seed=0)
    assert found.labels.tolist() == truth.tolist()
    np.testing.assert_allclose(found.weights, np.eye(6)[: truth.max() + 1], atol=1e-12)


@pytest.mark.parametrize("groups", [2, 5, 12, 24])
def test_auto_finds_exactly_the_groups(groups):
    weights, truth = separated(groups, 15, seed=groups)
    found = cluster(weights, None, seed=0)
    assert len(found.weights) == len(set(zip(found.labels.tolist(), truth.tolist(), strict=True))) == groups


def test_the_base_model_answers_alone_or_not_at_all():
    weights = random_rows(300, 5)
    found, base_leads = mixes(weights), weights.argmax(1) == 4
    assert base_leads.any() and (found[base_leads] == np.eye(5)[4]).all() and not found[~base_leads, 4].any()
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    assert (found.argmax(1) == weights.argmax(1)).all()
    for adapters in (2, 3, 20):  # a static average stays one
        average = np.append(np.full(adapters, 1 / adapters), 0.0)
        np.testing.assert_allclose(mixes(average[None])[0], average, atol=1e-15)
    base = np.random.default_rng(0).uniform(0.01, 0.3, 2000)  # two equal halves, whatever rounding adds
    weights = np.column_stack([(1 - base) / 2, (1 - base) / 2, base])
    assert (mixes(weights) == 0).sum(1).tolist() == [1] * len(weights)


def test_a_sure_query_is_answered_by_its_candidate_alone():
    weights = np.array([[0.6, 0.4, 0.0, 0.0], [0.44, 0.36, 0.0, 0.2], [0.3, 0.3, 0.0, 0.4]])
    weights = np.concatenate([weights, [[0.32, 0.24, 0.24, 0.2]]])
    expected = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0.4, 0.3, 0.3, 0]]
    np.testing.assert_allclose(mixes(weights), expected, atol=1e-12)
    found = cluster(weights, None, seed=0)
    assert found.labels.tolist() == [0, 0, 1, 2]
    np.testing.assert_allclose(found.weights, mixes(weights)[1:], atol=1e-12)


def test_auto_takes_the_fewest_variants_within_the_tolerance():
    # Mixes of two candidates out of many that are bests by themselves, so the limit is far away.
    weights = np.vstack([np.eye(20).repeat(3, 0), 0.3 + 0.4 * random_rows(300, 2, seed=1) @ np.eye(20)[:2]])
    weights[60:, 2:] = 0
    weights[60:] /= weights[60:].sum(1, keepdims=True)
    found = cluster(weights, None, seed=0)
    fewer = cluster(weights, len(found.weights) - 1, seed=0)
    assert 20 <= len(found.weights) < most_variants(20)
    assert lost(mixes(weights), found) <= MEAN_LOSS
    worst = np.abs(mixes(weights) - fewer.weights[fewer.labels]).sum(1).max() / 2
    assert lost(mixes(weights), fewer) > MEAN_LOSS or worst > WORST_LOSS
    many = random_rows(500, 9)
    found = cluster(many, None, seed=0)
    assert len(found.weights) == most_variants(9) == 14  # one and a half for each best candidate
    assert lost(mixes(many), found) > MEAN_LOSS  # so it is the limit that stopped it


def test_of_many_queries_a_sample_is_grouped(monkeypatch):
    weights, truth = separated(7, 80, seed=0)
    rare = np.flatnonzero(truth == 6)[1:]
    weights, truth = np.delete(weights, rare, axis=0), np.delete(truth, rare)  # one query of the last group
    expected = cluster(weights, None, seed=0)
    monkeypatch.setattr("router.routing.clusters.SAMPLE", 60)
    monkeypatch.setattr("router.routing.clusters.BLOCK", 17)
    found = cluster(weights, None, seed=0)
    assert found.labels.tolist() == expected.labels.tolist()
    np.testing.assert_allclose(found.weights, expected.weights, atol=1e-12)
    mixed = random_rows(400, 5)
    found = cluster(mixed, 6, seed=0)
    for label, row in enumerate(found.weights):
        np.testing.assert_allclose(row, mixes(mixed)[found.labels == label].mean(0), atol=1e-12)
    assert list(dict.fromkeys(found.labels.tolist())) == list(range(len(found.weights)))
    monkeypatch.setattr("router.routing.clusters.SAMPLE", 5)  # of nine kinds of queries
    assert cluster(np.tile(np.eye(9), (3, 1)), None, seed=0).labels.tolist() == list(range(9)) * 3


def test_of_many_candidates_each_that_answers_alone_is_a_group(monkeypatch):
    rng = np.random.default_rng(0)
    alone = np.eye(41)[rng.permutation(np.repeat(np.arange(0, 40, 2), 4))]  # every other adapter is in use
    shared = np.zeros((30, 41))
    shared[:, [0, 2]] = shared[:10, [4, 6]] = 0.5
    shared[:10, [0, 2]] = 0
    weights = np.concatenate([alone, shared])
    monkeypatch.setattr("router.routing.clusters.LARGE", 10)
    found = cluster(weights, None, seed=0)
    rows = {tuple(row) for row in weights.tolist()}
    assert {tuple(row) for row in found.weights.round(9).tolist()} == rows and len(found.weights) == len(rows)
    np.testing.assert_allclose(found.weights[found.labels], weights)
    assert found.labels[0] == 0 and (np.diff(np.unique(found.labels, return_index=True)[1]) > 0).all()
    assert len(cluster(weights, 3, seed=0).weights) == 3
    rare = mixes(random_rows(20, 41))  # more mixes than groups: what answers alone still does
    found = cluster(np.concatenate([alone, rare]), None, seed=0)
    np.testing.assert_array_equal(found.weights[found.labels[: len(alone)]], alone)
    monkeypatch.setattr("router.routing.clusters.SAMPLE", 80)  # of 100
    found = cluster(np.concatenate([alone, rare]), None, seed=0)
    np.testing.assert_array_equal(found.weights[found.labels[: len(alone)]], alone)
