"""Implants against one edited run for each of them, and pairs and controls against their definitions."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpretability.tiny import VOCAB, tiny

from path_jax.evaluation.task_accuracy import wilson_interval
from path_jax.interpretability import run, saturation_layers, top_tokens
from path_jax.interpretability.hooks import Site
from path_jax.interpretability.implant_trials import Pairs
from path_jax.interpretability.implants import find_pairs, implant
from path_jax.models import DecoderLM
from path_jax.models.stacking import stack_layers

LAYERS, ROWS, LENGTH = 4, 4, 10
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)


@functools.cache
def case(mixer="fox"):
    """A model, its parameters, each token's saturation layer and best token, and pairs of them."""
    model, params = tiny(mixer, LAYERS)
    ids = np.asarray(top_tokens(model, params, TOKENS, 1).ids)
    layers = saturation_layers(ids.reshape(LAYERS, -1, 1))[0].reshape(TOKENS.shape)
    return model, params, layers, ids[-1, ..., 0], find_pairs(layers, ids[-1, ..., 0], LAYERS, max_pairs=12)


@functools.cache
def edited_run(model, site):
    """Best tokens [L, T] of one row, where one position has another stream at this site."""
    capture = [f"{layer}.resid_post" for layer in range(model.config.num_layers)]

    def edited(params, row, position, vector):
        edits = {site: lambda x: x.at[:, position].set(vector)}
        _, values = run(model, params, row[None], capture=capture, edits=edits)
        x = jnp.concatenate([x for _, x in sorted(values.items())])
        return model.apply({"params": params}, x, method="lens").argmax(axis=-1)

    return jax.jit(edited)


def streams(model, params):
    capture = [f"{layer}.resid_post" for layer in range(LAYERS)]
    _, values = jax.jit(lambda params: run(model, params, TOKENS, capture=capture))(params)
    return np.stack([x for _, x in sorted(values.items())])


def slow_layer(ids):
    """From which on all are as the last."""
    return next(layer for layer in range(len(ids)) if (ids[layer:] == ids[-1]).all())


OPTIONS = {
    "default": {},
    "gap": {"min_gap": 3},
    "published": {"min_gap": 2, "min_layer": 1, "max_distance": 3, "same_row": True},
    "tokens": {"min_position": 4, "max_distance": 2, "is_token": np.arange(30) % 7 > 0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pairs(name):
    rng, options = np.random.default_rng(0), OPTIONS[name]
    layers, ids = rng.integers(0, 11, (8, 30)), rng.integers(0, 5, (8, 30))
    is_token = options.get("is_token", np.ones(30, bool)) & np.ones((8, 1), bool)
    options = options | {"is_token": is_token}
    slow = set()
    for (i, j), (m, n) in itertools.product(itertools.product(range(8), range(30)), repeat=2):
        early, late = (layers[at] % 10 for at in ((i, j), (m, n)))
        if (
            ids[i, j] == ids[m, n]
            and late - early >= options.get("min_gap", 2)
            and min(early, late) >= options.get("min_layer", 0)
            and min(j, n) >= options.get("min_position", 0)
            and abs(j - n) <= options.get("max_distance", 99)
            and not (options.get("same_row") and i != m)
            and is_token[i, j]
            and is_token[m, n]
        ):
            slow.add((i, j, early, m, n, late, ids[i, j]))
    every = find_pairs(layers, ids, 10, max_pairs=10**6, **options)
    assert len(every.late_row) == len(slow) > 50 and set(zip(*every)) == slow
    some, again, other = (find_pairs(layers, ids, 10, max_pairs=20, seed=seed, **options) for seed in (1, 1, 2))
    assert len(set(zip(*some))) == 20 and set(zip(*some)) < slow
    assert set(zip(*again)) == set(zip(*some)) != set(zip(*other))


def test_no_pairs():
    for size in (0, 3):
        pairs = find_pairs(np.zeros((size, 4), int), np.zeros((size, 4), int), 6)
        assert [len(x) for x in pairs] == [0] * 7
    model, params = tiny("nope", LAYERS)
    with pytest.raises(ValueError, match="there are no pairs"):
        implant(model, params, TOKENS, pairs)


@pytest.mark.parametrize("mixer", ["fox", pytest.param("path", marks=pytest.mark.slow)])
def test_implants_one_by_one(mixer):
    model, params, layers, ids, pairs = case(mixer)
    report = implant(model, params, TOKENS, pairs, reach=2, batch_size=5)
    x, trials = streams(model, params), report.trials
    made = [
        (p, m)
        for p, (early, late) in enumerate(zip(pairs.early_layer, pairs.late_layer))
        for m in range(max(early - 2, 0), min(early + 3, late))
    ]
    assert list(zip(trials.pair, trials.layer)) == made and len(made) > 15
    for i, (p, m) in enumerate(made):
        vector = x[m, pairs.early_row[p], pairs.early_position[p]]
        row, position = TOKENS[pairs.late_row[p]], pairs.late_position[p]
        best = edited_run(model, Site(m, "resid_post"))(params, row, position, vector)
        best = np.asarray(best)[:, position]
        assert (trials.new_layer[i], trials.new_id[i]) == (slow_layer(best), best[-1])
    assert (trials.new_layer != pairs.late_layer[trials.pair]).any()

    assert report.distances.tolist() == [-2, -1, 0, 1, 2]
    for d, distance in enumerate(report.distances):
        here = trials.layer - pairs.early_layer[trials.pair] == distance
        is_unchanged = trials.new_id[here] == pairs.final_id[trials.pair[here]]
        is_success = is_unchanged & (trials.new_layer[here] == trials.layer[here])
        moved = pairs.late_layer[trials.pair[here]] - trials.new_layer[here]
        assert report.num_trials[d] == here.sum() > 0 and report.num_successes[d] == is_success.sum()
        means = report.rates[d], report.mean_moved[d], report.unchanged_shares[d]
        np.testing.assert_allclose(means, [is_success.mean(), moved.mean(), is_unchanged.mean()])
        interval = wilson_interval(is_success.sum(), here.sum())
        np.testing.assert_allclose((report.lows[d], report.highs[d]), interval, atol=1e-5)
    assert report.num_successes.sum() > 0


def test_models_of_other_shapes_and_batches_change_nothing():
    model, params, _, _, pairs = case()
    first = implant(model, params, TOKENS, pairs, reach=1, batch_size=5)
    scanned = DecoderLM(dataclasses.replace(model.config, scan_layers=True, remat="full"))
    others = [
        implant(scanned, stack_layers(params), TOKENS, pairs, reach=1, batch_size=100),
        implant(model, params, TOKENS, pairs, reach=3, batch_size=7),  # more distances, whose middle is the same
    ]
    for other in others:
        is_near = np.abs(other.trials.layer - pairs.early_layer[other.trials.pair]) <= 1
        for x, y in zip(other.trials, first.trials):
            np.testing.assert_array_equal(x[is_near], y)


def test_an_own_stream_changes_nothing():
    model, params, _, _, pairs = case()
    report = implant(model, params, TOKENS, pairs, reach=2, batch_size=5, control="same")
    plain = implant(model, params, TOKENS, pairs, reach=2, batch_size=5)
    np.testing.assert_array_equal(report.num_trials, plain.num_trials)
    np.testing.assert_array_equal(report.trials.new_layer, pairs.late_layer[report.trials.pair])
    assert not report.num_successes.any() and not report.mean_moved.any() and (report.unchanged_shares == 1).all()


@pytest.mark.parametrize("control", ["late", "random"])
def test_controls(control):
    model, params, layers, ids, pairs = case()
    pairs = Pairs(*(x[pairs.early_position >= 2] for x in pairs))
    segment_ids = np.ones_like(TOKENS)
    segment_ids[:, 8:] = 0
    make = lambda seed=0: implant(
        model, params, TOKENS, pairs, reach=1, batch_size=5, control=control, seed=seed, segment_ids=segment_ids
    )
    trials = make().trials
    assert len(trials.pair) > 5
    for p, m, *source, _, _ in zip(*trials):
        source = tuple(source)
        assert 2 <= source[1] < 8 and source != (pairs.late_row[p], pairs.late_position[p])
        if control == "late":
            assert ids[source] == pairs.final_id[p] and layers[source] > m + 1
        else:
            assert ids[source] != pairs.final_id[p]
    for a, b in zip(trials, make().trials):
        np.testing.assert_array_equal(a, b)
    # The streams implanted are the sources' own.
    x = streams(model, params)
    for i in range(0, len(trials.pair), 3):
        p, m = trials.pair[i], trials.layer[i]
        row, position = TOKENS[pairs.late_row[p]], pairs.late_position[p]
        vector = x[m, trials.source_row[i], trials.source_position[i]]
        best = np.asarray(edited_run(model, Site(m, "resid_post"))(params, row, position, vector))[:, position]
        if position < 8:  # behind that is padding, which sees other tokens
            assert (trials.new_layer[i], trials.new_id[i]) == (slow_layer(best), best[-1])


def test_no_source_no_trial():
    model, params, layers, ids, _ = case()
    late = np.argwhere(layers == LAYERS - 1)[0]
    alone = Pairs(*(np.array([x]) for x in (*late, 0, *late, LAYERS - 1, VOCAB)))  # no token ends with this one
    report = implant(model, params, TOKENS, alone, reach=1, control="late")
    assert not report.num_trials.any() and not len(report.trials.pair)
    assert np.isnan([*report.rates, *report.lows, *report.highs, *report.mean_moved, *report.unchanged_shares]).all()


def test_published_hook_skips_the_next_layer():
    """Which is what a model without that layer computes."""
    model, params, _, _, pairs = case()
    report = implant(model, params, TOKENS, pairs, reach=1, batch_size=5, as_published=True)
    x, trials = streams(model, params), report.trials
    shorter = DecoderLM(dataclasses.replace(model.config, num_layers=LAYERS - 1))
    for i in range(0, len(trials.pair), 2):
        p, m = trials.pair[i], trials.layer[i]
        rest = [f"layers_{layer}" for layer in range(LAYERS) if layer != m + 1]
        others = {name: value for name, value in params.items() if not name.startswith("layers_")}
        without = others | {f"layers_{new}": params[old] for new, old in enumerate(rest)}
        row, position = TOKENS[pairs.late_row[p]], pairs.late_position[p]
        vector = x[m, pairs.early_row[p], pairs.early_position[p]]
        best = edited_run(shorter, Site(m, "resid_post"))(without, row, position, vector)
        before = top_tokens(model, params, TOKENS, 1).ids[: m + 1, pairs.late_row[p], position, 0]  # not yet implanted
        best = np.concatenate([before, np.asarray(best)[m:, position]])
        assert (trials.new_layer[i], trials.new_id[i]) == (slow_layer(best), best[-1])
    is_success = (trials.new_layer == trials.layer + 1) & (trials.new_id == pairs.final_id[trials.pair])
    assert report.num_successes.sum() == is_success.sum()


def test_what_does_not_fit():
    model, params, layers, ids, pairs = case()
    with pytest.raises(ValueError, match=r"layers \(4, 10\), ids \(4, 9\) and tokens \(4, 10\) are not \[B, T\]"):
        find_pairs(layers, ids[:, 1:], LAYERS)
    with pytest.raises(ValueError, match="but the model has 2"):
        find_pairs(layers, ids, 2)
    for name in ("min_gap", "max_pairs"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            find_pairs(layers, ids, LAYERS, **{name: 0})
    with pytest.raises(ValueError, match="control='none' is unknown; choose from same, late, random"):
        implant(model, params, TOKENS, pairs, control="none")
    with pytest.raises(ValueError, match="reach=-1 must be at least 0 and batch_size=0 at least 1"):
        implant(model, params, TOKENS, pairs, reach=-1, batch_size=0)
    with pytest.raises(ValueError, match=r"pairs are of rows to \d and positions to \d, tokens are \(4, 3\)"):
        implant(model, params, TOKENS[:, :3], pairs)
