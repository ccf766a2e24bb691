"""Saturation of top tokens, against the published code's own results and slow loops of the definitions.

`golden/saturation/synthetic`: constructed ids [layers, tokens, vocabulary] and what the code beyond_top1 makes of them.
"""

import itertools
import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from path_jax.interpretability import (
    CorpusSaturation,
    is_early,
    permutation_test,
    rank_order,
    saturation_layers,
    strict_kendall_tau,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "saturation"
LAYERS = 6


def golden():
    return np.load(GOLDEN / "synthetic.npz"), json.loads((GOLDEN / "synthetic.json").read_text())


def random_ids(seed=0, num_tokens=400, k=5):
    """Ids of k ranks that settle somewhere, some of them in all layers."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 3, (LAYERS, num_tokens, k))
    settled = np.minimum(rng.integers(-1, LAYERS, (num_tokens, k)) + rng.integers(0, 2, k), LAYERS - 1)
    return np.where(np.arange(LAYERS)[:, None, None] >= settled, 7, ids)


def slow_layer(ids, unchanged):
    """Of one rank of one token: the first layer from which on all are as the last; `unchanged` if all are."""
    first = next(layer for layer in range(len(ids)) if all(x == ids[-1] for x in ids[layer:]))
    return first or unchanged


def slow_tau(layers, num_layers=LAYERS):
    """Of one token; None if fewer than three ranks are compared, an error if there are none."""
    k = 1 + max(i for i, layer in enumerate(layers) if layer != num_layers - 1)
    pairs = list(itertools.combinations(layers[:k], 2))
    agreeing = sum(bool(first < second) for first, second in pairs)
    return (agreeing - (len(pairs) - agreeing)) / len(pairs) if k >= 3 else None


def test_published_layers():
    arrays, facts = golden()
    ids, num_layers = arrays["indxs_per_layer"], facts["num_layers"]
    published = saturation_layers(ids[..., :5], as_published=True)
    assert published.dtype == np.int16
    np.testing.assert_array_equal(published, arrays["sat_all"])
    np.testing.assert_array_equal(saturation_layers(ids[..., :3], as_published=True), arrays["sat_all_k3"])
    np.testing.assert_array_equal(published[:, is_early(published, num_layers)], arrays["sat_filtered_0.85"])
    np.testing.assert_array_equal(published[:, is_early(published, num_layers, 0.5)], arrays["sat_filtered_0.5"])

    layers = saturation_layers(ids[..., :5])
    np.testing.assert_array_equal(layers[0], arrays["top1_satur_layer"])
    np.testing.assert_array_equal(layers, np.where(arrays["sat_all"] == num_layers, 0, arrays["sat_all"]))
    unchanged = (ids[:, :, 0] == ids[-1, :, 0]).all(axis=0)
    assert unchanged.sum() == facts["n_all_layers_match"] > 0
    assert is_early(layers, num_layers)[unchanged].all() and not is_early(published, num_layers)[unchanged].any()


def test_published_order():
    arrays, facts = golden()
    layers, num_layers = arrays["sat_filtered_0.85"], facts["num_layers"]
    places = [np.array(facts["rank_lists"][str(i)]) + 1 for i in range(5)]
    order = rank_order(layers, num_layers)
    np.testing.assert_array_equal(order.counts, [len(x) for x in places])
    np.testing.assert_allclose(order.means, [x.mean() for x in places], rtol=1e-12)
    np.testing.assert_allclose(order.standard_errors, [x.std() / len(x) ** 0.5 for x in places], rtol=1e-12)
    p_values = [stats.ttest_ind(a, b).pvalue for a, b in itertools.pairwise(places)]
    np.testing.assert_allclose(order.p_values, p_values, rtol=1e-9)

    taus = strict_kendall_tau(layers, num_layers, as_published=True)
    np.testing.assert_allclose(taus, arrays["per_token_strict_kendall_tau"], atol=1e-12)
    corpus = CorpusSaturation(as_published=True)
    corpus.add(arrays["indxs_per_layer"][..., :5])
    summary = corpus.summary()
    assert abs(summary.tau - facts["mean_strict_kendall_tau_filtered_085"]) <= 1e-12
    assert summary.p_value == 0 and (summary.num_tokens, summary.num_kept, summary.num_compared) == (60, 40, 40)


@pytest.mark.parametrize("as_published", [False, True])
def test_definitions(as_published):
    ids = random_ids()
    layers = saturation_layers(ids, as_published=as_published)
    unchanged = LAYERS if as_published else 0
    assert layers.tolist() == [[slow_layer(ids[:, n, i], unchanged) for n in range(ids.shape[1])] for i in range(5)]
    assert (layers == unchanged).any() and (layers == LAYERS - 1).any()

    order = rank_order(layers, LAYERS)
    for i in range(5):
        places = [1 + sorted(token).index(token[i]) for token in layers.T.tolist() if token[i] < LAYERS - 1]
        assert order.counts[i] == len(places)
        assert abs(order.means[i] - np.mean(places)) <= 1e-12

    compared = layers[:, (layers != LAYERS - 1).any(axis=0)]
    slow = [slow_tau(token) for token in compared.T]
    assert None in slow and len(set(slow)) > 10
    taus = strict_kendall_tau(compared, LAYERS, as_published=as_published)
    np.testing.assert_allclose(taus, [np.nan if tau is None else tau for tau in slow], atol=1e-12)
    tau, _ = permutation_test(compared, LAYERS, num_permutations=1, as_published=as_published)
    assert abs(tau - np.mean([tau for tau in slow if tau is not None])) <= 1e-12


def test_tau_where_it_is_known():
    in_order, reverse, tied = [0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 2, 2, 2, 2]
    cut, short, at_last = [1, 3, 2, 5, 5], [1, 2, 5, 5, 5], [5, 5, 5, 5, 5]
    layers = np.array([in_order, reverse, tied, cut, short, at_last]).T
    np.testing.assert_allclose(strict_kendall_tau(layers, LAYERS), [1, -1, -1, 1 / 3, np.nan, np.nan])
    with pytest.raises(IndexError, match="index -1 is out of bounds .* of token 5 saturate at the last layer"):
        strict_kendall_tau(layers, LAYERS, as_published=True)
    with pytest.raises(IndexError, match="index -1 is out of bounds"):
        permutation_test(layers, LAYERS, as_published=True)
    assert np.isnan(permutation_test(layers[:, 4:], LAYERS)).all()
    tau, p_value = permutation_test(layers[:, 4:5], LAYERS, as_published=True)
    assert np.isnan(tau) and p_value == 0  # of nothing, they print "p = 0.0"
    assert np.isnan(strict_kendall_tau(layers[:2], LAYERS)).all()  # two ranks are too few


@pytest.mark.parametrize("as_published", [False, True])
def test_permutations_have_their_exact_distribution(as_published):
    """Of two tokens, all permutations can be listed; as published, layers beyond the cut take part in them."""
    tokens = [[1, 2, 4, 5, 5], [0, 2, 5, 5, 5], [2, 1, 3, 5, 5]]
    layers = np.array(tokens).T
    tau, p_value = permutation_test(layers, LAYERS, num_permutations=4000, seed=3, as_published=as_published)
    null = []
    for token in tokens[0], tokens[2]:  # the other has too few ranks
        shuffled = [order[:3] for order in itertools.permutations(token if as_published else token[:3])]
        null.append([2 * np.mean([a < b for a, b in itertools.combinations(order, 2)]) - 1 for order in shuffled])
    sums = np.add.outer(*null)
    assert abs(tau - 2 / 3) <= 1e-12
    exact = (sums / 2 >= tau - 1e-9).mean()
    assert abs(exact - (329 / 3600 if as_published else 5 / 36)) <= 1e-9
    assert abs(p_value - exact) < 0.02
    again = permutation_test(layers, LAYERS, num_permutations=4000, seed=3, as_published=as_published)
    assert again == (tau, p_value)


def test_p_value_counts_the_observed_order():
    layers = np.tile(np.arange(5)[:, None], 50)  # all in order: no permutation gets there
    assert permutation_test(layers, LAYERS, num_permutations=99) == (1.0, 0.01)
    assert permutation_test(layers, LAYERS, num_permutations=99, as_published=True) == (1.0, 0.0)
    assert permutation_test(layers[::-1], LAYERS, num_permutations=99) == (-1.0, 1.0)


@pytest.mark.parametrize("as_published", [False, True])
def test_order_of_tokens_and_parts_do_not_matter(as_published):
    ids = random_ids(1)
    ids = ids[:, (ids[-2] == 7).all(axis=-1)]  # no rank saturates at the last layer, and so there is no error
    shuffle = np.random.default_rng(2).permutation(ids.shape[1])
    whole, parts = (CorpusSaturation(as_published=as_published) for _ in range(2))
    whole.add(ids)
    for part in np.array_split(ids[:, shuffle], 3, axis=1):
        parts.add(part)
    np.testing.assert_array_equal(parts.layers, whole.layers[:, shuffle])
    assert parts.layers.dtype == np.int16
    a, b = whole.summary(num_permutations=20), parts.summary(num_permutations=20)
    assert a.num_tokens == ids.shape[1] > 10
    assert a.num_tokens - a.num_kept == (whole.layers[0] == LAYERS).sum()
    assert (a.num_kept < a.num_tokens) == as_published
    for x, y in zip((*a.order, *a), (*b.order, *b)):
        if x is not a.order and x is not a.p_value:
            np.testing.assert_allclose(x, y, rtol=1e-12)


def test_summary_of_the_kept_tokens():
    corpus = CorpusSaturation()
    corpus.add(random_ids(4, k=3))
    summary = corpus.summary(num_permutations=50)
    assert summary.num_tokens == summary.num_kept == 400  # int(0.85 * 6) is the last of six layers
    summary, kept = corpus.summary(max_share=0.5, num_permutations=50), corpus.layers[:, corpus.layers[0] <= 3].T
    assert summary.num_kept == len(kept) < 400
    assert summary.num_compared == np.isfinite(strict_kendall_tau(kept.T, LAYERS)).sum() < len(kept)
    np.testing.assert_allclose(summary.mean_layers, kept.mean(axis=0))
    np.testing.assert_allclose(summary.before_shares, [(a < b).mean() for a, b in itertools.pairwise(kept.T)])
    assert summary.strict_share == np.mean([len(set(x)) == 3 and list(x) == sorted(x) for x in kept]) > 0
    assert summary.weak_share == np.mean([list(x) == sorted(x) for x in kept]) > summary.strict_share
    assert (summary.tau, summary.p_value) == permutation_test(kept.T, LAYERS, num_permutations=50)
    np.testing.assert_array_equal(summary.order.means, rank_order(kept.T, LAYERS).means)


def test_nothing_left_gives_nan():
    corpus = CorpusSaturation()
    corpus.add(np.arange(LAYERS)[:, None, None] * np.ones((1, 4, 3), int))  # all ranks change up to the last layer
    summary = corpus.summary(max_share=0.5)
    assert (summary.num_tokens, summary.num_kept, summary.num_compared) == (4, 0, 0)
    assert np.isnan([summary.tau, summary.p_value, summary.strict_share, *summary.mean_layers]).all()
    order = rank_order(corpus.layers, LAYERS)
    assert not order.counts.any()
    assert np.isnan([*order.means, *order.standard_errors, *order.p_values]).all()
    alone = rank_order(np.array([[1], [2]]), LAYERS)  # one token has no spread
    np.testing.assert_array_equal(alone.means, [1, 2])
    assert np.isnan(alone.p_values).all()


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"ids are \(6, 4\), not of some layers, tokens and ranks"):
        saturation_layers(np.zeros((6, 4), int))
    with pytest.raises(ValueError, match=r"ids are \(0, 4, 5\)"):
        saturation_layers(np.zeros((0, 4, 5), int))
    for statistic in (is_early, rank_order, strict_kendall_tau, permutation_test):
        with pytest.raises(ValueError, match="layers are 2 ... 7, but the model has 6"):
            statistic(np.array([[2], [7]]), 6)
        with pytest.raises(ValueError, match=r"layers are float64 \(2, 1\), not integers of some ranks and tokens"):
            statistic(np.array([[2.0], [7.0]]), 6)
    with pytest.raises(ValueError, match="num_permutations=0 must be at least 1"):
        permutation_test(np.array([[2], [1], [0]]), 6, num_permutations=0)
    corpus = CorpusSaturation()
    with pytest.raises(ValueError, match="no tokens were added"):
        corpus.summary()
    corpus.add(random_ids())
    with pytest.raises(ValueError, match="6 layers and 3 ranks do not fit earlier ones: 6 layers and 5 ranks"):
        corpus.add(random_ids()[..., :3])
    with pytest.raises(ValueError, match="5 layers and 5 ranks do not fit"):
        corpus.add(random_ids()[1:])
