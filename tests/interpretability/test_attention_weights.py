"""Exposed attention weights: those of the kernels' outputs, and open to patches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpretability.tiny import BASE, BATCH, HEADS, LENGTH, SOURCE, WIDTH, tiny

from path_jax.interpretability import Site, attention_summary, interchange, replacements, run, with_weights
from path_jax.mixers import MIXERS, ForgettingAttention, StickBreakingAttention
from path_jax.nn.taps import is_tap

VARIANTS = {name: MIXERS[name] for name in ("path", "path_fox", "fox", "rope", "nope", "stick_breaking")} | {
    "fox, window": functools.partial(ForgettingAttention, window=3),
    "stick_breaking, itself, remainder": functools.partial(StickBreakingAttention, attend_current=True, remainder=True),
    "stick_breaking, remainder": functools.partial(StickBreakingAttention, remainder=True),
}
X = jnp.asarray(np.random.default_rng(2).standard_normal((2, 12, WIDTH)), jnp.float32)
SEGMENTS = jnp.asarray(np.repeat([[1, 2, 0], [3, 1, 0]], [5, 4, 3], axis=1))  # the last three are padding


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_output_and_rows_that_sum_to_one(name):
    kernels = VARIANTS[name](num_heads=4, num_kv_heads=2)
    exposed = kernels.clone(expose_weights=True)
    params = jax.eval_shape(exposed.init, jax.random.key(0), X)["params"]
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(kernels.init, jax.random.key(0), X)["params"]
    )
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), params)

    @functools.partial(jax.jit, static_argnums=0)
    def apply(module):
        options = dict(capture_intermediates=is_tap, mutable="intermediates")
        (out, _), values = module.apply({"params": params}, X, segment_ids=SEGMENTS, **options)
        return out, values["intermediates"]

    (expected, plain), (actual, values) = apply(kernels), apply(exposed)
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert set(values) - set(plain) == {"attn_probs"}
    weights = np.asarray(values["attn_probs"]["__call__"][0])
    assert weights.shape == (2, 4, 12, 12) and weights.dtype == np.float32
    is_visible = np.tril(SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (SEGMENTS > 0)[:, :, None]
    if "window" in name:
        is_visible = np.triu(is_visible, -2)
    if name == "stick_breaking":
        is_visible = np.tril(is_visible, -1)
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(is_visible[:, None], weights.shape))
    sums, is_token = weights.sum(-1), np.broadcast_to((SEGMENTS > 0)[:, None], weights.shape[:3])
    if name == "stick_breaking":
        assert sums.min() >= 0 and sums.max() < 1 + 1e-5 and sums[..., 1:5].mean() > 0.3
    else:
        np.testing.assert_allclose(sums, is_token, atol=1e-5)
    with pytest.raises(NotImplementedError, match="decode with expose_weights=False"):
        exposed.apply({"params": params}, X, cache=kernels.init_state(2, 12, WIDTH))


def test_weights_are_captured_and_patched():
    """Attention of the other run, to the values of this one."""
    model, params = tiny("nope", num_layers=1)
    weighted = with_weights(model)
    site, names = Site(0, "attn_probs"), ["0.mixer.v", "0.mixer.head_out", "0.mixer.attn_probs"]
    (plain, ours), (_, theirs) = (run(weighted, params, tokens, capture=names) for tokens in (BASE, SOURCE))
    np.testing.assert_allclose(plain.logits, run(model, params, BASE)[0].logits, atol=1e-5)
    _, patched = run(weighted, params, BASE, capture=names, edits=replacements({site: theirs[site]}, 6, [1]))
    expected = np.array(ours[Site(0, "head_out")])
    expected[:, 6, 1] = np.einsum("bs,bsh->bh", theirs[site][:, 1, 6], ours[Site(0, "v")][:, :, 1])
    np.testing.assert_allclose(patched[Site(0, "head_out")], expected, atol=1e-5)
    whole = interchange(weighted, params, BASE, SOURCE, site, 6, [1]).logits
    assert np.abs(whole - plain.logits).max() > 1e-3
    with pytest.raises(ValueError, match="this model .mixer nope. has"):
        run(model, params, BASE, capture=[site])


def test_attention_summary():
    rng = np.random.default_rng(0)
    weights = rng.random((BATCH, HEADS, LENGTH, LENGTH)).astype(np.float32)
    queries = {"question": np.array([8, 5, 7])}
    keys = {"key": np.array([1, 2, 3]), "value": np.array([2, -1, 4]), "nowhere": np.array([-1, -1, 9])}
    (means,) = attention_summary({"1.mixer.attn_probs": weights}, queries, keys).values()
    assert means.shape == (HEADS, 1, 3)
    expected = (weights[0, :, 8, 1] + weights[1, :, 5, 2] + weights[2, :, 7, 3]) / 3
    np.testing.assert_allclose(means[:, 0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(means[:, 0, 1], (weights[0, :, 8, 2] + weights[2, :, 7, 4]) / 2, rtol=1e-6)
    assert np.isnan(means[:, 0, 2]).all()
    with pytest.raises(ValueError, match="0.mixer.v has no attention weights"):
        attention_summary({"0.mixer.v": weights}, queries, keys)
