"""Norms, the MLP, causal shifts and convolutions, rotary embedding, positions and taps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.nn.layers import (
    HeadRMSNorm,
    RMSNorm,
    ShortConv,
    SwiGLU,
    causal_conv,
    default_positions,
    rms_norm,
    rotary,
    shift,
)
from path_jax.nn.taps import BLOCK_TAPS, MIXER_TAPS, Tap

RNG = np.random.default_rng(0)
# Documents of 4, 1 and 3 tokens with padding at the end; one document.
SEGMENT_IDS = np.array([[1, 1, 1, 1, 2, 3, 3, 3, 0], [5] * 9], np.int32)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_rms_norm():
    x, scale = normal(2, 3, 8), normal(8)
    module = RMSNorm(eps=0.1)
    assert jax.tree.leaves(module.init(jax.random.key(0), x))[0].tolist() == [1] * 8
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.1) * scale
    close(module.apply({"params": {"scale": scale}}, x), expected)


def test_rms_norm_keeps_statistics_in_float32():
    """In bfloat16 the mean of these squares would be off by far more than the final rounding."""
    x = (100 + normal(4, 4096)).astype(jnp.bfloat16)
    out = rms_norm(x, jnp.ones(4096), 1e-6)
    assert out.dtype == jnp.bfloat16
    exact = x.astype(np.float64)
    close(out, exact / np.sqrt((exact**2).mean(-1, keepdims=True)), 2**-8)


@pytest.mark.parametrize("is_shared", [True, False])
def test_head_rms_norm(is_shared):
    x, scale = normal(2, 3, 4, 8), normal(8 if is_shared else 32)
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
    expected = normed * (scale if is_shared else scale.reshape(4, 8))
    close(HeadRMSNorm(is_shared).apply({"params": {"scale": scale}}, x), expected)


def test_swiglu():
    x = normal(2, 3, 8)
    kernels = {"gate_proj": normal(8, 16), "up_proj": normal(8, 16), "down_proj": normal(16, 8)}
    params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    gate = x @ kernels["gate_proj"]
    expected = (gate * sigmoid(gate) * (x @ kernels["up_proj"])) @ kernels["down_proj"]
    close(SwiGLU(16).apply({"params": params}, x), expected, 1e-4)
    shapes = jax.tree.map(jnp.shape, SwiGLU(16).init(jax.random.key(0), x)["params"])
    assert shapes == jax.tree.map(jnp.shape, params)


def convolved(x, kernel, segment_ids=None):
    """y_t = sum_i kernel[-1 - i] x_{t - i} over the tokens of t's own document, token by token."""
    out = np.zeros(x.shape)
    for b, t, i in np.ndindex(*x.shape[:2], len(kernel)):
        if t - i >= 0 and (segment_ids is None or segment_ids[b, t - i] == segment_ids[b, t]):
            out[b, t] += kernel[len(kernel) - 1 - i] * x[b, t - i].astype(np.float64)
    return out


@pytest.mark.parametrize("width", [1, 3, 12])
@pytest.mark.parametrize("segment_ids", [None, SEGMENT_IDS], ids=["one", "packed"])
def test_causal_conv(width, segment_ids):
    x, kernel = normal(2, 9, 4), normal(width, 4)
    close(causal_conv(x, jnp.asarray(kernel), segment_ids), convolved(x, kernel, segment_ids))


def test_last_tap_is_the_current_token():
    x = normal(1, 5, 2)
    close(causal_conv(x, jnp.asarray([[0.0, 0], [0, 0], [1, 1]])), x)
    close(causal_conv(x, jnp.asarray([[1.0, 1], [0, 0], [0, 0]])), np.pad(x, [(0, 0), (2, 0), (0, 0)])[:, :5])


def test_short_conv_applies_silu():
    x = normal(2, 9, 4)
    variables = ShortConv(3).init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["kernel"])
    assert kernel.shape == (3, 4) and np.abs(kernel).max() <= 3**-0.5
    expected = convolved(x, kernel, SEGMENT_IDS)
    close(ShortConv(3).apply(variables, x, SEGMENT_IDS), expected * sigmoid(expected))


@pytest.mark.parametrize("distance", [0, 1, 3, 20])
def test_shift(distance):
    x = normal(2, 9, 4, 2)
    expected = np.zeros_like(x)
    expected[:, distance:] = x[:, : max(9 - distance, 0)]
    np.testing.assert_array_equal(shift(x, distance), expected)
    for b, t in np.ndindex(2, 9):
        if t >= distance and SEGMENT_IDS[b, t - distance] != SEGMENT_IDS[b, t]:
            expected[b, t] = 0
    np.testing.assert_array_equal(shift(x, distance, SEGMENT_IDS), expected)


def test_rotary_turns_pairs_of_halves():
    x, theta = normal(1, 3, 1, 4), 100.0
    positions = np.array([[0, 1, 7]])
    expected = np.zeros((1, 3, 1, 4))
    for t, i in np.ndindex(3, 2):
        angle = positions[0, t] * theta ** (-2 * i / 4)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        expected[0, t, 0, [i, i + 2]] = turn @ x[0, t, 0, [i, i + 2]]
    close(rotary(x, positions, theta), expected)


def test_rotary_keeps_norms_and_encodes_distance():
    q, k = normal(1, 1, 2, 16), normal(1, 1, 2, 16)
    turn = lambda x, position: rotary(x, jnp.array([[position]]), 10000.0)
    close(jnp.linalg.norm(turn(q, 1000), axis=-1), np.linalg.norm(q, axis=-1), 1e-5)
    logit = lambda i, j: jnp.sum(turn(q, i) * turn(k, j), axis=-1)
    close(logit(12, 5), np.asarray(logit(107, 100)), 1e-4)
    assert np.abs(logit(12, 5) - logit(12, 6)).max() > 0.1


def test_rotary_needs_an_even_head_dim():
    with pytest.raises(ValueError, match="even head dim, got 5"):
        rotary(jnp.ones((1, 1, 1, 5)), jnp.zeros((1, 1), int), 10000.0)


def test_default_positions_restart_with_each_document():
    tokens = np.zeros((2, 9), np.int32)
    np.testing.assert_array_equal(default_positions(tokens, None), [range(9)] * 2)
    np.testing.assert_array_equal(default_positions(tokens, SEGMENT_IDS), [[0, 1, 2, 3, 0, 0, 1, 2, 0], range(9)])


def test_taps_are_identities_with_known_names():
    x = normal(2, 3)
    for name in (*BLOCK_TAPS, *MIXER_TAPS):
        assert Tap(name=name).apply({}, x) is x
    with pytest.raises(ValueError, match="unknown tap 'resid_mid'"):
        Tap(name="resid_mid")
