"""Patching against identities, a NumPy transformer and itself in a grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpretability.plain_transformer import transformer
from interpretability.tiny import BASE, BATCH, LENGTH, SOURCE, VOCAB, tiny

from path_jax.interpretability import (
    Site,
    ablate,
    accuracy,
    answer_probability,
    attribution_score,
    interchange,
    interchange_grid,
    interventions,
    logit_difference,
    patch,
    replacements,
    run,
    sites,
    steer,
)
from path_jax.mixers import MIXERS
from path_jax.models import LMOutput
from path_jax.models.stacking import stack_layers
from path_jax.parallel.mesh import make_mesh
from path_jax.parallel.sharding import batch_sharding, tree_shardings

AT, ANSWERS = jnp.array([8, 5, 7]), jnp.array([3, 1, 4])
METRIC = answer_probability(AT, ANSWERS)
POSITIONS = jnp.array([[1, 2, 3], [8, 0, 4], [6, 6, -1]])  # in one row of the last cell, nothing


@pytest.mark.parametrize(
    "mixer",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("path", "h3", "hyena") else name for name in MIXERS],
)
def test_patching_a_run_with_itself_changes_no_bit(mixer):
    """Every site in one run: what arrives at each is what was captured, and so is what leaves it.

    Operations run one by one, for compilers round differently in different programs.
    """
    model, params = tiny(mixer, num_layers=1)
    names = sites(model.config)
    plain, values = run(model, params, BASE, capture=names)

    def same(site, edit):
        def check(value):
            np.testing.assert_array_equal(value, values[site])
            np.testing.assert_array_equal(edit(value), value)
            return edit(value)

        return check

    edits = {site: same(site, edit) for site, edit in replacements(values).items()}
    out, _ = run(model, params, BASE, edits=edits)
    np.testing.assert_array_equal(out.logits, plain.logits)


@pytest.mark.parametrize("mixer", ["rope", "path_fox", pytest.param("mamba", marks=pytest.mark.slow)])
def test_the_residual_stream_carries_everything(mixer):
    """With that of another run at all positions, what follows is the other run to the bit."""
    model, params = tiny(mixer)
    source, expected = run(model, params, SOURCE, capture=["1.mixer_out", "1.resid_post"])
    for site in ("0.resid_post", "1.resid_pre"):
        _, theirs = run(model, params, SOURCE, capture=[site])
        out, actual = run(model, params, BASE, capture=expected, edits=replacements(theirs))
        np.testing.assert_array_equal(out.logits, source.logits)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def plain_patched(params, site, mask):
    """Of the NumPy transformer: rows of BASE with values of SOURCE where the mask [B, T] or [B, T, N] says so."""
    logits = []
    for base, source, where in zip(np.asarray(BASE), np.asarray(SOURCE), mask):
        theirs = {}
        transformer(params, source, lambda layer, tap, value, theirs=theirs: theirs.setdefault((layer, tap), value))

        def swap(layer, tap, value, theirs=theirs, where=where):
            if (layer, tap) != site:
                return value
            return np.where(where.reshape(*where.shape, *[1] * (value.ndim - where.ndim)), theirs[layer, tap], value)

        logits.append(transformer(params, base, swap))
    return np.stack(logits)


def test_patching_is_that_of_a_transformer_in_numpy():
    """At every site, at one position of each row; and one head."""
    model, params = tiny("rope", num_kv_heads=1)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    names = sites(model.config)
    mask = np.arange(LENGTH) == np.array([[2], [0], [5]])
    heads = mask[..., None] & np.array([False, True])

    @functools.partial(jax.jit, static_argnames="site")
    def patched(site, mask):
        return interchange(model, params, BASE, SOURCE, site, mask).logits

    plain = run(model, params, BASE)[0].logits
    np.testing.assert_allclose(plain, plain_patched(wide, None, mask), atol=1e-5)
    every = jax.jit(lambda masks: all_patched(model, params, names, masks))
    for i, site in enumerate(names):
        actual = every(jnp.zeros((len(names), *mask.shape), bool).at[i].set(mask))
        np.testing.assert_allclose(actual, plain_patched(wide, site, mask), atol=1e-5)
        assert np.abs(actual - plain).max() > 1e-3, site
    for site in (Site(0, "head_out"), Site(1, "q")):
        np.testing.assert_allclose(patched(site, jnp.asarray(heads)), plain_patched(wide, site, heads), atol=1e-5)
        alone = interchange(model, params, BASE, SOURCE, site, jnp.array([2, 0, 5]), [1]).logits
        np.testing.assert_allclose(alone, plain_patched(wide, site, heads), atol=1e-5)


def all_patched(model, params, names, masks):
    _, values = run(model, params, SOURCE, capture=names)
    edits = {}
    for i, site in enumerate(names):
        edits |= replacements({site: values[site]}, masks[i])
    return run(model, params, BASE, edits=edits)[0].logits


@pytest.mark.parametrize("mixer", ["path_fox", pytest.param("mamba", marks=pytest.mark.slow)])
def test_a_grid_is_a_loop_over_single_patches(mixer):
    """Of chunks of 4, the last is not full."""
    model, params = tiny(mixer)
    names = [Site(0, "mixer_in"), *(Site(1, tap) for tap in ("conv_out", "mixer_out", "resid_post"))]
    names = [*names, Site(0, "v")] if mixer == "path_fox" else names
    grid = interchange_grid(model, params, BASE, SOURCE, names, POSITIONS, METRIC, chunk=4)
    assert grid.shape == (len(names), len(POSITIONS), BATCH)
    single = jax.jit(lambda masks: METRIC(LMOutput(all_patched(model, params, names, masks), None)))
    masks = np.arange(LENGTH) == np.asarray(POSITIONS)[..., None]
    for i in range(len(names)):
        for j in range(len(POSITIONS)):
            expected = single(jnp.zeros((len(names), BATCH, LENGTH), bool).at[i].set(masks[j]))
            np.testing.assert_allclose(grid[i, j], expected, atol=1e-6)
    assert np.abs(grid - METRIC(run(model, params, BASE)[0]))[0].max() > 1e-3


def test_a_grid_of_masks_patches_several_sites_and_heads():
    model, params = tiny("nope")
    names, rng = [Site(0, "v"), Site(1, "q")], np.random.default_rng(3)
    masks = rng.random((2, 2, BATCH, LENGTH, 2)) < 0.3
    grid = interchange_grid(model, params, BASE, SOURCE, names, jnp.asarray(masks), METRIC)
    whole = interchange_grid(model, params, BASE, SOURCE, names, jnp.asarray(masks.any(-1)), METRIC, heads=[0])
    first = masks.any(-1, keepdims=True) & np.array([True, False])
    for cells, which in ((grid, masks), (whole, first)):
        for cell, mask in zip(cells, which, strict=True):
            np.testing.assert_allclose(cell, METRIC(LMOutput(all_patched(model, params, names, mask), None)), atol=1e-6)


def test_a_grid_compiles_once_for_new_answers_and_tokens():
    model, params = tiny("nope")
    call = lambda base, answers: interchange_grid(
        model, params, base, SOURCE, ["0.mixer_out"], POSITIONS, answer_probability(AT, answers)
    )
    first, before = call(BASE, ANSWERS), interventions._grid._cache_size()
    assert not np.array_equal(first, call(SOURCE, ANSWERS + 1))
    assert interventions._grid._cache_size() == before
    assert interchange_grid(model, params, BASE, SOURCE, ["0.mlp_in"], POSITIONS[:0], METRIC).shape == (1, 0, BATCH)
    for positions in (POSITIONS[0], jnp.zeros((2, 3, BATCH, LENGTH), bool)):
        with pytest.raises(ValueError, match="are .*not"):
            interchange_grid(model, params, BASE, SOURCE, ["0.mlp_in"], positions, METRIC)
    with pytest.raises(ValueError, match="no value at 0.mixer.w"):
        interchange_grid(model, params, BASE, SOURCE, ["0.mixer.w"], POSITIONS, METRIC)


@pytest.mark.parametrize("mixer", ["nope", pytest.param("path_fox", marks=pytest.mark.slow)])
def test_a_grid_on_a_mesh(mixer):
    """Parameters, scanned ones here, and rows are split over eight devices."""
    model, params = tiny(mixer)
    base, source = (jnp.concatenate([x, x[:1]]) for x in (BASE, SOURCE))  # four rows
    positions, metric = jnp.array([[1, 2, 3, 4], [8, 0, 4, 2]]), answer_probability(jnp.full(4, 8), jnp.arange(4))
    names = ["0.mixer.v", "0.resid_post", "1.mixer_out"]
    grid = functools.partial(interchange_grid, model, sites=names, metric=metric)
    expected = grid(params, base, source, positions=positions)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = stack_layers(params)
    placed = jax.device_put(params, tree_shardings(params, mesh))
    rows = jax.device_put((base, source), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(grid(placed, *rows, positions=positions), expected, atol=1e-6)


def test_packed_documents_reach_the_model():
    """Patching the first document leaves the second as it is."""
    model, params = tiny("nope")
    inputs = {"segment_ids": jnp.asarray(np.repeat([[1, 2]], [4, LENGTH - 4], axis=1).repeat(BATCH, 0))}
    out = interchange(model, params, BASE, SOURCE, "0.resid_pre", 1, inputs=inputs).logits
    plain = run(model, params, BASE, **inputs)[0].logits
    np.testing.assert_array_equal(np.abs(out - plain).max((0, 2)) > 1e-4, [0, 1, 1, 1, 0, 0, 0, 0, 0])
    metric = lambda out: jnp.abs(out.logits).sum((1, 2))
    grid = interchange_grid(model, params, BASE, SOURCE, ["0.resid_pre"], POSITIONS[:1] * 0 + 1, metric, inputs=inputs)
    np.testing.assert_allclose(grid[0, 0], metric(LMOutput(out, None)), rtol=1e-5)


def test_ablations():
    model, params = tiny("nope", num_layers=1)
    reference = jnp.asarray(np.random.default_rng(5).integers(0, VOCAB, (5, LENGTH)))
    names = ["0.mixer.v", "0.mlp_out"]
    _, values = run(model, params, reference, capture=names)
    at = jnp.array([3, 0, 8])
    expect = {
        "zero": jax.tree.map(jnp.zeros_like, values),
        "mean": jax.tree.map(lambda x: x.mean((0, 1)), values),
        "position_mean": jax.tree.map(lambda x: x.mean(0, keepdims=True), values),
    }
    expect["zero"] = {site: value[:BATCH] for site, value in expect["zero"].items()}
    for how, new in expect.items():
        actual = ablate(model, params, BASE, names, how, at, reference=reference).logits
        np.testing.assert_allclose(actual, patch(model, params, BASE, new, at).logits, atol=1e-6)
    rng = jax.random.key(2)
    resampled = ablate(model, params, BASE, names, "resample", reference=reference, rng=rng).logits
    drawn = jax.random.randint(rng, (BATCH,), 0, 5)
    lent = {site: value[drawn] for site, value in values.items()}
    np.testing.assert_array_equal(resampled, patch(model, params, BASE, lent).logits)
    for options, message in (
        (dict(how="noise"), "how='noise' is unknown; choose from zero, mean"),
        (dict(how="mean"), "how='mean' needs a reference batch"),
        (dict(how="resample", reference=reference), "needs a reference batch and an rng"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate(model, params, BASE, names, **options)


def test_steering_adds_a_vector():
    model, params = tiny("nope")
    vector, at = jnp.linspace(-1, 1, 16), jnp.array([3, 0, 8])
    out = steer(model, params, BASE, "0.resid_post", vector, 2.0, at)
    edit = lambda value: value.at[jnp.arange(BATCH), at].add(2 * vector)
    np.testing.assert_array_equal(out.logits, run(model, params, BASE, edits={"0.resid_post": edit})[0].logits)
    out = steer(model, params, BASE, "1.mixer.v", vector[:8], heads=[1])
    edit = lambda value: value.at[:, :, 1].add(vector[:8])
    np.testing.assert_array_equal(out.logits, run(model, params, BASE, edits={"1.mixer.v": edit})[0].logits)


def test_metrics():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((BATCH, LENGTH, VOCAB)), jnp.float32)
    out, rows = LMOutput(logits, None), np.arange(BATCH)
    read = np.asarray(logits)[rows, AT]
    softmax = np.exp(read) / np.exp(read).sum(-1, keepdims=True)
    np.testing.assert_allclose(METRIC(out), softmax[rows, ANSWERS], rtol=1e-5)
    np.testing.assert_allclose(
        logit_difference(AT, ANSWERS, ANSWERS + 1)(out), read[rows, ANSWERS] - read[rows, ANSWERS + 1], rtol=1e-5
    )
    best = jnp.asarray(read.argmax(-1)).at[1].add(-1)
    np.testing.assert_array_equal(accuracy(AT, best)(out), [1, 0, 1])
    restored = jnp.array([[0.5, 0.3, 0.9], [0.1, 0.2, 0.2]])
    corrupted, clean = jnp.array([0.1, 0.3, 0.2]), jnp.array([0.9, 0.3, 0.2101])
    expected = [[0.5, np.nan, 0.7 / 0.0101], [0, np.nan, 0]]
    np.testing.assert_allclose(attribution_score(restored, corrupted, clean), expected, rtol=1e-3, atol=1e-7)
