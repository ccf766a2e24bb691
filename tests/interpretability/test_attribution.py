"""First-order effects beside exact ones, and paths against runs written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpretability.tiny import BASE, BATCH, LENGTH, SOURCE, tiny

from path_jax.interpretability import (
    Site,
    answer_probability,
    attribution_patching,
    exact_patching,
    interchange,
    path_patch,
    run,
    steer,
)
from path_jax.models import DecoderLM

AT, ANSWERS = jnp.array([8, 5, 7]), jnp.array([3, 1, 4])
METRIC = answer_probability(AT, ANSWERS)
NAMES = [Site(0, "resid_pre"), Site(0, "v"), Site(0, "head_out"), Site(1, "mixer_in"), Site(1, "mlp_out")]


@pytest.mark.parametrize("mixer", ["nope", pytest.param("path_fox", marks=pytest.mark.slow)])
def test_small_differences_are_exact(mixer):
    """Token 12 has almost the embedding of token 3; the source has it wherever the base has 3."""
    model, params = tiny(mixer)
    table = params["embed"]["embedding"]
    nudge = 0.002 * jnp.cos(jnp.arange(16.0))
    params = params | {"embed": {"embedding": table.at[12].set(table[3] + nudge)}}
    base = jnp.where(BASE == 12, 3, BASE).at[:, 2].set(3)
    source = jnp.where(base == 3, 12, base)
    names = NAMES + [Site(0, "log_forget")] * (mixer == "path_fox")
    estimate = jax.jit(lambda params: attribution_patching(model, params, base, source, names, METRIC))(params)
    exact = exact_patching(model, params, base, source, names, METRIC)
    for site in names:
        assert estimate[site].shape == (BATCH, LENGTH)
        largest = np.abs(exact[site]).max()
        assert largest > 1e-6
        np.testing.assert_allclose(estimate[site], exact[site], atol=0.02 * largest + 2e-7)


def test_estimates_are_slopes():
    """The metric by h, of a run whose value is moved by h times the difference to the source."""
    model, params = tiny("nope")
    names = [Site(0, "v"), Site(1, "mlp_out")]
    estimate = lambda params: attribution_patching(model, params, BASE, SOURCE, names, METRIC, by_head=True)
    estimates = jax.jit(estimate)(params)
    (_, ours), (_, theirs) = (run(model, params, tokens, capture=names) for tokens in (BASE, SOURCE))
    step, rows = 0.02, jnp.array([2, 5, 0])
    for site in names:
        move = theirs[site] - ours[site]
        slope = lambda **where: (
            np.subtract(
                *(METRIC(steer(model, params, BASE, site, move, sign * step, rows, **where)) for sign in (1, -1))
            )
            / (2 * step)
        )
        actual = np.asarray(estimates[site])[np.arange(BATCH), rows]
        if site.tap == "v":
            assert estimates[site].shape == (BATCH, LENGTH, 2)
            np.testing.assert_allclose(actual[:, 1], slope(heads=[1]), rtol=0.03, atol=2e-5)
            actual = actual.sum(-1)
        np.testing.assert_allclose(actual, slope(), rtol=0.03, atol=2e-5)


def test_exact_patching_is_interchange():
    model, params = tiny("nope", num_layers=1)
    exact = exact_patching(model, params, BASE, SOURCE, ["0.mixer_out"], METRIC, chunk=4)[Site(0, "mixer_out")]
    plain = METRIC(run(model, params, BASE)[0])
    for t in (0, 5):
        patched = METRIC(interchange(model, params, BASE, SOURCE, "0.mixer_out", t))
        np.testing.assert_allclose(exact[:, t], patched - plain, atol=1e-6)


def test_a_path_to_the_logits_is_a_difference_on_the_residual_stream():
    model, params = tiny("nope")
    _, ours = run(model, params, BASE, capture=["0.mixer_out", "1.resid_post"])
    _, theirs = run(model, params, SOURCE, capture=["0.mixer_out"])
    rows, where = np.arange(BATCH), jnp.array([2, 8, 0])
    out = path_patch(model, params, BASE, SOURCE, "0.mixer_out", "1.resid_post", where)
    difference = (theirs[Site(0, "mixer_out")] - ours[Site(0, "mixer_out")])[rows, where]
    stream = ours[Site(1, "resid_post")].at[rows, where].add(difference)
    expected = run(model, params, BASE, edits={"1.resid_post": lambda _: stream})[0].logits
    np.testing.assert_allclose(out.logits, expected, atol=1e-5)
    assert np.abs(interchange(model, params, BASE, SOURCE, "0.mixer_out", where).logits - out.logits).max() > 1e-2


def test_a_head_reaches_the_queries_of_the_next_layer():
    """By hand: its output projection, the norm of what the stream has then, the projection to queries."""
    model, params = tiny("nope")
    names = ["0.mixer.head_out", "1.resid_pre", "1.mixer.q"]
    (_, ours), (_, theirs) = (run(model, params, tokens, capture=names) for tokens in (BASE, SOURCE))
    heads, stream = (Site(0, "head_out"), Site(1, "resid_pre"))
    sent = jnp.zeros_like(ours[heads]).at[:, :, 1].set((theirs[heads] - ours[heads])[:, :, 1])
    kernel = params["layers_0"]["mixer"]["o_proj"]["kernel"]
    x = ours[stream] + sent.reshape(BATCH, LENGTH, -1) @ kernel
    layer = params["layers_1"]
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * layer["mixer_norm"]["scale"]
    q = (x @ layer["mixer"]["q_proj"]["kernel"]).reshape(BATCH, LENGTH, 2, -1)
    expected = run(model, params, BASE, edits={"1.mixer.q": lambda value: value.at[:, 4].set(q[:, 4])})[0]
    out = path_patch(model, params, BASE, SOURCE, heads, "1.mixer.q", heads=[1], receiver_positions=4)
    np.testing.assert_allclose(out.logits, expected.logits, atol=1e-5)


def test_where_nothing_is_frozen_a_path_is_an_interchange():
    model, params = tiny("nope")
    receivers = ["1.mixer_in", "1.mlp_in"]
    out = path_patch(model, params, BASE, SOURCE, "0.resid_pre", receivers, frozen=(), receiver_positions=3)
    np.testing.assert_array_equal(out.logits, interchange(model, params, BASE, SOURCE, receivers, 3).logits)
    same = path_patch(model, params, BASE, BASE, ["0.mixer.v", "0.mlp_out"], receivers)
    np.testing.assert_array_equal(same.logits, run(model, params, BASE)[0].logits)


def test_frozen_mixers_let_mlps_carry():
    """With MLPs free, what the attention of layer 0 sends arrives by the MLP of layer 0 too."""
    model, params = tiny("nope")
    both, mixers = (
        path_patch(model, params, BASE, SOURCE, "0.mixer_out", "1.mixer_in", frozen=frozen).logits
        for frozen in (("mixer_out", "mlp_out"), ("mixer_out",))
    )
    assert np.abs(both - mixers).max() > 1e-2
    whole = interchange(model, params, BASE, SOURCE, "0.mixer_out").logits  # but layer 1's MLP saw it directly as well
    assert np.abs(mixers - whole).max() > 1e-2


def test_paths_that_there_are_not():
    model, params = tiny("nope")
    for senders, receivers, message in (
        ("1.mixer_out", "0.mlp_in", "0.mlp_in is computed before the first sender, 1.mixer_out"),
        ("0.mixer_out", "1.mixer_out", "receivers are inputs, but 1.mixer_out is an output that is frozen"),
        (["0.mixer.v", "0.mixer_out"], "1.mixer_in", "0.mixer_out would be both a sender and"),
        ("0.mixer.w", "1.mixer_in", "no value at 0.mixer.w"),
    ):
        with pytest.raises(ValueError, match=message):
            path_patch(model, params, BASE, SOURCE, senders, receivers)
    with pytest.raises(ValueError, match="no value at 0.mixer.w"):
        attribution_patching(DecoderLM(model.config), params, BASE, SOURCE, ["0.mixer.w"], METRIC)
