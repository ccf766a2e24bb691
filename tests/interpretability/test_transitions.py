"""Labels of layers against slow loops, and probes on streams of which we know what can be read off them."""

import sys

import jax
import numpy as np
import pytest
from interpretability.tiny import BASE, BATCH, LENGTH, SOURCE, VOCAB, WIDTH, tiny

from path_jax.data import Batch
from path_jax.interpretability import run, saturation_layers, top_tokens
from path_jax.interpretability.stream_sample import collect_streams
from path_jax.interpretability.transitions import (
    TransitionProbe,
    Transitions,
    balance,
    fit_transition_probe,
    rank_in_progress,
)

LAYERS, DIM, RANKS = 8, 9, 3
K = 3
DIRECTIONS = np.random.default_rng(9).standard_normal((RANKS, DIM))


def random_layers(num_tokens=200, seed=0, as_published=False):
    """Mostly in order, so that several ranks are in progress; some out of order, equal, or the same in all layers."""
    rng = np.random.default_rng(seed)
    layers = rng.integers(0, LAYERS, (RANKS, num_tokens))
    layers[:, : num_tokens // 2] = np.sort(layers[:, : num_tokens // 2], axis=0)
    return np.where(layers == 0, LAYERS, layers) if as_published else layers


def planted(layers, strength, seed=0, **options):
    """Streams of noise, but for a direction of the rank in progress."""
    rng = np.random.default_rng(seed)
    streams = rng.standard_normal((LAYERS, layers.shape[1], DIM))
    samples = rank_in_progress(layers, LAYERS, **options)
    streams[samples.layer, samples.token] += strength * DIRECTIONS[samples.rank]
    return streams.astype(np.float32)


def as_set(samples):
    return set(zip(*(x.tolist() for x in samples)))


def slow_samples(layers, first_layer, as_published):
    samples = []
    for token, (*saturated,) in enumerate(layers.T.tolist()):
        if not as_published:
            saturated = [0 if layer == LAYERS else layer for layer in saturated]
        for rank, last in enumerate(saturated):
            start = saturated[rank - 1] + 1 if rank else 0
            if last < start and not as_published:
                break
            if last == first_layer and as_published:
                continue
            samples += [(layer, token, rank) for layer in range(max(start, first_layer), min(last, LAYERS - 1) + 1)]
    return samples


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("first_layer", [0, 3])
def test_rank_in_progress(first_layer, as_published):
    layers = random_layers(as_published=as_published)
    samples = rank_in_progress(layers, LAYERS, first_layer=first_layer, as_published=as_published)
    slow = slow_samples(layers, first_layer, as_published)
    assert len(samples.layer) == len(slow) > 100 and as_set(samples) == set(slow)
    assert list(zip(samples.layer, samples.rank, samples.token)) == sorted((x, z, y) for x, y, z in slow)
    num_labelled = len(set(zip(samples.layer, samples.token)))
    assert num_labelled < len(slow) if as_published else num_labelled == len(slow)


def test_rank_in_progress_where_it_is_known():
    in_order, broken, at_once, never = [1, 3, 4], [2, 1, 5], [1, 1, 3], [LAYERS, 2, 2]
    layers = np.array([in_order, broken, at_once, never]).T
    of = lambda samples, token: sorted((x, z) for x, y, z in as_set(samples) if y == token)
    samples = rank_in_progress(layers, LAYERS, first_layer=0)
    assert of(samples, 0) == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]
    assert of(samples, 1) == [(0, 0), (1, 0), (2, 0)]
    assert of(samples, 2) == [(0, 0), (1, 0)]
    assert of(samples, 3) == [(0, 0), (1, 1), (2, 1)]  # L is 0: its best token is there from the start
    published = rank_in_progress(layers, LAYERS, first_layer=0, as_published=True)
    assert of(published, 0) == of(samples, 0)
    assert of(published, 1) == [*of(samples, 1), (2, 2), (3, 2), (4, 2), (5, 2)]
    assert of(published, 2) == [(0, 0), (1, 0), (2, 2), (3, 2)]
    assert of(published, 3) == [(layer, 0) for layer in range(LAYERS)]
    assert min(rank_in_progress(layers, LAYERS).layer) == 2  # L // 4
    assert min(rank_in_progress(np.full((1, 3), 30), 40).layer) == 5


@pytest.mark.parametrize("as_published", [False, True])
def test_balance(as_published):
    samples = rank_in_progress(random_layers(), LAYERS, first_layer=0)
    samples = Transitions(*(x[(samples.rank != 2) | (samples.layer != 5)] for x in samples))
    counts = np.zeros((LAYERS, RANKS), int)
    np.add.at(counts, (samples.layer, samples.rank), 1)
    kept = balance(samples, min_count=8, seed=1, as_published=as_published)
    assert as_set(kept) < as_set(samples) and len(as_set(kept)) == len(kept.layer)
    for layer in range(LAYERS):
        enough = counts[layer] >= 8
        is_used = enough.all() if as_published else enough.sum() > 1
        expected = np.where(enough, counts[layer][enough].min(initial=999), 0) * is_used
        assert np.bincount(kept.rank[kept.layer == layer], minlength=RANKS).tolist() == expected.tolist()
    assert (counts[0] < 8).any() and ((5 in kept.layer) != as_published)

    again, other = (as_set(balance(samples, min_count=8, seed=seed, as_published=as_published)) for seed in (1, 2))
    assert again == as_set(kept) and (other == again) == as_published  # the published choice is the first ones
    few = balance(samples, min_count=8, max_samples=60, as_published=as_published)
    assert 40 < len(few.layer) <= 60
    for layer in set(few.layer):
        assert len(set(np.bincount(few.rank[few.layer == layer])) - {0}) == 1
    assert not len(balance(samples, min_count=1000).layer)


def test_probe_finds_what_is_there_and_no_more():
    pytest.importorskip("sklearn", reason="needs the extra [interp]")
    layers = random_layers(200)
    probe, report = fit_transition_probe(planted(layers, 3, first_layer=1), layers, first_layer=1)
    assert report.balanced_accuracy > 0.95 and report.balanced_accuracy_std < 0.05
    assert (report.class_accuracy > 0.9).all() and (report.class_auc > 0.97).all()
    assert report.shuffled < report.layer_chance + 0.07 and report.chance == 1 / 3 <= report.layer_chance
    assert report.confusion.sum(axis=1).tolist() == report.counts.tolist()
    samples = balance(rank_in_progress(layers, LAYERS, first_layer=1))
    assert report.counts.tolist() == np.bincount(samples.rank).tolist()
    assert report.layer_accuracy.keys() == set(samples.layer.tolist()) and min(report.layer_accuracy.values()) > 0.85
    new = random_layers(50, seed=5)
    test = rank_in_progress(new, LAYERS)
    predicted = probe.classes[np.argmax(probe.probabilities(planted(new, 3)[test.layer, test.token]), axis=-1)]
    assert (predicted == test.rank).mean() > 0.95

    _, report = fit_transition_probe(planted(layers, 0), layers, folds=3, first_layer=1)
    assert abs(report.balanced_accuracy - report.chance) < 0.1 and abs(report.class_auc - 0.5).max() < 0.1
    assert abs(report.gaussian - report.chance) < 0.1  # all classes have mean 0 and standard deviation 1
    shifted = planted(layers, 0)
    samples = rank_in_progress(layers, LAYERS)
    shifted[samples.layer, samples.token] += 2 * samples.rank[:, None]
    assert fit_transition_probe(shifted, layers, folds=3)[1].gaussian > 0.9  # here their means tell them apart


def test_layers_that_lack_ranks_give_something_away():
    """Streams tell nothing but their layer; ranks 0 and 1 are in progress at the first ones, 1 and 2 at the last."""
    pytest.importorskip("sklearn", reason="needs the extra [interp]")
    rng = np.random.default_rng(0)
    early, late = np.stack([rng.integers(1, 4, 200), *[np.full(200, 3)] * 2]), [[0], [5], [7]] + np.zeros((3, 200), int)
    late[1] += rng.integers(-1, 2, 200)
    layers = np.concatenate([early, late], axis=1)
    streams = 0.1 * rng.standard_normal((LAYERS, 400, DIM)) + 5 * np.eye(LAYERS, DIM)[:, None]
    _, report = fit_transition_probe(streams, layers, first_layer=1)
    assert report.chance + 0.1 < report.balanced_accuracy < report.layer_chance + 0.03
    assert report.chance + 0.1 < report.shuffled < report.layer_chance + 0.03
    layers = random_layers(300, as_published=True)
    _, report = fit_transition_probe(streams[:, :300], layers, first_layer=1, as_published=True)
    assert abs(report.layer_chance - report.chance) < 1e-12 and abs(report.balanced_accuracy - report.chance) < 0.06


def test_tokens_stay_on_one_side():
    """Streams that tell nothing but the token, whose rank in progress is the same at all layers."""
    pytest.importorskip("sklearn", reason="needs the extra [interp]")
    rng = np.random.default_rng(0)
    layers = np.where(rng.integers(0, 2, 60), [[LAYERS - 1], [0]], [[1], [LAYERS - 1]])
    streams = np.repeat(rng.standard_normal((1, 60, 80)), LAYERS, axis=0)
    accuracy = lambda **options: fit_transition_probe(streams, layers, folds=4, **options)[1].balanced_accuracy
    assert accuracy(as_published=True) > 0.95 and accuracy() < 0.7
    texts = np.arange(60) // 2
    streams[:, 1::2], layers[:, 1::2] = streams[:, ::2], layers[:, ::2]
    assert accuracy() > 0.8 and accuracy(groups=texts) < 0.7


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_report_is_that_of_scikit_learn(num_ranks, tmp_path):
    pytest.importorskip("sklearn", reason="needs the extra [interp]")
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    layers = random_layers(150)
    streams = 3 + planted(layers, 0.7)
    layers = layers[:num_ranks]
    probe, report = fit_transition_probe(streams, layers, folds=3, seed=4, first_layer=0)
    samples = balance(rank_in_progress(layers, LAYERS, first_layer=0), seed=4)
    x, y = streams[samples.layer, samples.token], samples.rank
    theirs = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(max_iter=1000)))
    scores, aucs, confusion = [], [], 0
    for train, test in StratifiedGroupKFold(3, shuffle=True, random_state=4).split(x, y, samples.token):
        assert not set(samples.token[train]) & set(samples.token[test])
        theirs.fit(x[train], y[train])
        predicted, probabilities = theirs.predict(x[test]), theirs.predict_proba(x[test])
        scores.append(balanced_accuracy_score(y[test], predicted))
        aucs.append([roc_auc_score(y[test] == rank, probabilities[:, rank]) for rank in range(num_ranks)])
        confusion = confusion + confusion_matrix(y[test], predicted)
    assert 0.5 < np.mean(scores) < 0.95
    np.testing.assert_allclose(report[:2], [np.mean(scores), np.std(scores)], rtol=1e-6)
    np.testing.assert_allclose(report.class_auc, np.mean(aucs, axis=0), rtol=1e-6)
    np.testing.assert_array_equal(report.confusion, confusion)

    theirs.fit(x, y)
    np.testing.assert_allclose(
        probe.probabilities(streams),
        theirs.predict_proba(streams.reshape(-1, DIM)).reshape(*streams.shape[:2], num_ranks),
        atol=1e-5,
    )
    compiled = jax.jit(lambda probe, x: probe.log_odds(x))(probe, streams[3])
    np.testing.assert_allclose(compiled, probe.log_odds(streams[3]), atol=1e-5)
    assert compiled.dtype == np.float32 and probe.log_odds(streams[0, 0]).shape == (num_ranks,)

    probe.save(tmp_path / "probe")
    again = TransitionProbe.load(tmp_path / "probe")
    for a, b in zip(again, probe, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    np.savez(tmp_path / "other.npz", mean=1)
    with pytest.raises(ValueError, match="other.npz has mean, a probe has mean, scale, weights, bias, classes"):
        TransitionProbe.load(tmp_path / "other.npz")


def packed_batch():
    segment_ids = np.ones((BATCH, LENGTH), np.int32)
    segment_ids[0, 5:], segment_ids[1, 3:], segment_ids[2, 7:] = 0, 2, 0
    positions = np.broadcast_to(2 * np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))  # not those by default
    return Batch(SOURCE, SOURCE, np.ones((BATCH, LENGTH), np.float32), segment_ids, positions)


def test_streams_of_all_tokens():
    model, params = tiny("rope", 3)
    packed = packed_batch()
    is_token = np.stack([np.ones((BATCH, LENGTH), bool), packed.segment_ids > 0]).reshape(-1, LENGTH)
    inputs = [{}, {"segment_ids": packed.segment_ids, "positions": packed.positions}]
    capture = [f"{layer}.resid_post" for layer in range(3)]
    streams, ids = [], []
    for tokens, more in zip((BASE, SOURCE), inputs):
        _, values = jax.jit(lambda tokens, more: run(model, params, tokens, capture=capture, **more))(tokens, more)
        streams.append(np.stack([x for _, x in sorted(values.items())]))
        ids.append(top_tokens(model, params, tokens, K, **more).ids)
    streams, ids = np.concatenate(streams, axis=1), np.concatenate(ids, axis=1)

    sample = collect_streams(model, params, [BASE, packed], K, num_tokens=100, chunk_size=7)
    at = sample.rows, sample.positions
    assert sorted(zip(*at)) == list(zip(*np.nonzero(is_token)))
    assert sample.streams.dtype == np.float32 and sample.streams.shape == (3, is_token.sum(), WIDTH)
    np.testing.assert_allclose(sample.streams, streams[:, *at], atol=1e-5)
    np.testing.assert_array_equal(sample.ids, ids[-1][at])
    np.testing.assert_array_equal(sample.layers, saturation_layers(ids[:, *at]))
    published = collect_streams(model, params, [BASE, packed], K, num_tokens=100, chunk_size=7, as_published=True)
    assert (published.layers == 3).sum() == (sample.layers == 0).sum() > 0

    few = collect_streams(model, params, [BASE, packed], K, num_tokens=10, seed=1, chunk_size=7)
    at = few.rows, few.positions
    assert len(set(zip(*at))) == 10 and is_token[at].all()
    np.testing.assert_allclose(few.streams, streams[:, *at], atol=1e-5)
    np.testing.assert_array_equal(few.layers, saturation_layers(ids[:, *at]))


def test_sample_is_uniform_and_the_same_for_all_batches():
    model, params = tiny("nope")
    corpus = np.concatenate([BASE, SOURCE])
    counts = np.zeros(corpus.shape, int)
    for seed in range(60):
        sample = collect_streams(model, params, [corpus[:3], corpus[3:]], 1, num_tokens=9, seed=seed)
        np.add.at(counts, (sample.rows, sample.positions), 1)
    assert counts.sum() == 60 * 9
    # A count has mean 10 and variance 60 * 1/6 * 5/6.
    assert np.square(counts - 10).mean() < 2 * 60 * 5 / 36 and abs(counts[:3].sum() - 270) < 60
    assert 0 < counts.min() and counts.max() < 25
    whole = collect_streams(model, params, [corpus], 1, num_tokens=9, seed=59)
    assert set(zip(whole.rows, whole.positions)) == set(zip(sample.rows, sample.positions))


def test_what_does_not_fit(monkeypatch):
    layers = random_layers()
    streams = planted(layers, 1)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"probes need scikit-learn; run: pip install path-jax\[interp\]"):
        fit_transition_probe(streams, layers)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"layers are float64 \(3, 200\), not integers"):
        rank_in_progress(layers / 1, LAYERS)
    with pytest.raises(ValueError, match="layers are 0 ... 7, but the model has 6"):
        rank_in_progress(layers, 6)
    with pytest.raises(ValueError, match="first_layer=8 is not among the model's 8"):
        rank_in_progress(layers, LAYERS, first_layer=8)
    model, params = tiny("nope")
    for k in (0, VOCAB):
        with pytest.raises(ValueError, match=f"k={k} must be at least 1 and less than the vocabulary of {VOCAB}"):
            collect_streams(model, params, [BASE], k, num_tokens=5)
    with pytest.raises(ValueError, match="num_tokens=0 and chunk_size=1024 must be at least 1"):
        collect_streams(model, params, [BASE], K, num_tokens=0)
    with pytest.raises(ValueError, match="there are no tokens"):
        collect_streams(model, params, [], K, num_tokens=5)
    pytest.importorskip("sklearn", reason="needs the extra [interp]")
    with pytest.raises(ValueError, match=r"streams \(8, 200, 9\) and layers \(3, 5\) are not"):
        fit_transition_probe(streams, layers[:, :5])
    with pytest.raises(ValueError, match=r"groups are \(5,\), not one for each of 200 tokens"):
        fit_transition_probe(streams, layers, groups=np.arange(5))
    with pytest.raises(ValueError, match="folds=1 must be at least 2"):
        fit_transition_probe(streams, layers, folds=1)
    with pytest.raises(ValueError, match=r"5 folds need .*; there are \{\} samples by rank"):
        fit_transition_probe(streams, layers, min_count=1000)
    with pytest.raises(ValueError, match="and 3 groups"):
        fit_transition_probe(streams, layers, groups=np.arange(200) % 3)
    layers = np.repeat([[7, 0], [7, 7]], [95, 5], axis=1)  # rank 1 is in progress in the last five tokens only
    with pytest.raises(ValueError, match="all samples of rank 1 are in one fold; take more tokens"):
        fit_transition_probe(streams[:, :100], layers, groups=np.minimum(np.arange(100), 95))
