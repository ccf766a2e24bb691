"""based, h3, hyena and base_conv against their definitions: one document, token by token, in float64.

The definitions are written for NumPy and JAX alike, so that JAX can differentiate them. Their parameters are those of
the modules. The contract that all mixers share is in test_mixers.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.recurrence import enable_x64

from path_jax.mixers import H3, MIXERS, BaseConv, Based, Hyena
from path_jax.mixers.based import linear_attention, taylor_features, taylor_size
from path_jax.mixers.h3 import decayed_attention
from path_jax.nn import long_conv
from path_jax.nn.long_conv import ImplicitFilter, causal_long_conv, extend_long_conv, time_features
from path_jax.nn.taps import is_tap

WIDTH, FILTER_LENGTH = 8, 16
LENGTH = 13  # no multiple of a chunk
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}  # largest error of numbers of size 1


def dense(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


def convolve(xp, x, taps):
    """y_t = sum_i taps[i] x_{t - i}; taps from newest to oldest."""
    return xp.stack([sum(taps[i] * x[t - i] for i in range(min(t + 1, len(taps)))) for t in range(len(x))])


def short_conv(xp, params, x):
    return convolve(xp, x, params["kernel"][::-1]) + params["bias"]


def plain_based(xp, params, x):
    x = short_conv(xp, params["conv"], x)
    q = dense(params["q_proj"], x).reshape(len(x), 4, 3)
    k, v = (xp.repeat(dense(params[f"{name}_proj"], x).reshape(len(x), 2, -1), 2, axis=1) for name in "kv")
    rows = []
    for t in range(len(x)):
        s = (q[t] * k[: t + 1]).sum(-1) / 3**0.5
        weights = 1 + s + s**2 / 2
        rows.append(((weights[..., None] * v[: t + 1]).sum(0) / weights.sum(0)[:, None]).reshape(-1))
    return dense(params["o_proj"], xp.stack(rows))


def plain_h3(xp, params, x):
    q, k, v = (dense(params[f"{name}_proj"], x) for name in "qkv")
    k = convolve(xp, k, params["shift_taps"]) + params["shift_skip"] * k
    q, k, v = (y.reshape(len(x), -1, 2) for y in (q, k, v))
    dt = xp.exp(params["log_dt"])[:, None]
    a = -xp.exp(params["log_decay"]) + 1j * params["frequency"]
    factor, scale = (1 + dt * a / 2) / (1 - dt * a / 2), dt / (1 - dt * a / 2)
    readout = params["readout"][0] + 1j * params["readout"][1]
    state, rows = 0, []
    for t in range(len(x)):
        kv = k[t, :, :, None] * v[t, :, None, :]
        state = factor[..., None, None] * state + scale[..., None, None] * kv[:, None]
        y = 2 * (readout[..., None, None] * state).sum(1).real + params["skip"][:, None, None] * kv
        rows.append((q[t, :, :, None] * y).sum(1).reshape(-1))
    return dense(params["o_proj"], xp.stack(rows))


def plain_filter(xp, params, activation, count):
    """The taps before any decay, and the time of each."""
    i = np.arange(count)
    angle = 2 * np.pi * 1e-4 * i / FILTER_LENGTH
    taps = np.stack([i / (FILTER_LENGTH - 1), np.cos(angle), -np.sin(angle)], axis=1)
    for layer in range(len(params)):
        if f"hidden_{layer}" in params:
            taps = activation(dense(params[f"hidden_{layer}"], taps))
    return dense(params["out"], taps), i[:, None] / (FILTER_LENGTH - 1)


def plain_hyena(xp, params, x):
    k, q, v = xp.split(short_conv(xp, params["short_conv"], dense(params["in_proj"], x)), 3, axis=-1)
    taps, time = plain_filter(xp, params["filter"], lambda y: xp.sin(params["filter"]["frequency"] * y), len(x))
    # Channels decay to 1 % between 1.5 and 0.3 filter lengths.
    taps = taps * 0.01 ** (time * np.linspace(1 / 1.5, 1 / 0.3, WIDTH))
    return dense(params["o_proj"], q * (convolve(xp, k * v, taps) + params["skip"] * k * v))


def plain_base_conv(xp, params, x):
    return dense(params["gate_proj"], x) * short_conv(xp, params["conv"], x) + x


def plain_implicit(xp, params, x):
    taps, _ = plain_filter(xp, params["filter"], lambda y: xp.maximum(y, 0), len(x))
    return dense(params["gate_proj"], x) * (convolve(xp, x, taps) + x + params["conv_bias"]) + x


def plain_explicit(xp, params, x):
    return dense(params["gate_proj"], x) * (convolve(xp, x, params["filter_taps"]) + x + params["conv_bias"])


VARIANTS = {
    "based": (Based(4, num_kv_heads=2, feature_dim=3, conv_size=3, chunk_size=2), plain_based),
    "h3": (H3(head_dim=2, state_size=4, chunk_size=2), plain_h3),
    "hyena": (Hyena(filter_length=FILTER_LENGTH, filter_width=5), plain_hyena),
    "base_conv": (BaseConv(), plain_base_conv),
    "implicit": (BaseConv(filter="implicit", filter_length=FILTER_LENGTH), plain_implicit),
    "explicit": (BaseConv(filter="explicit", filter_length=FILTER_LENGTH, skip=False), plain_explicit),
}
names = pytest.mark.parametrize("name", VARIANTS)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@functools.cache
def random_parameters(name):
    """Float64; matrices have the standard deviation 1 / sqrt(fan-in), others 0.3."""
    shapes = jax.eval_shape(VARIANTS[name][0].init, jax.random.key(0), np.zeros((1, 1, WIDTH), np.float32))["params"]
    seeds = iter(range(100))
    draw = lambda x: normal(next(seeds), *x.shape) * (x.shape[0] ** -0.5 if len(x.shape) == 2 else 0.3)
    return jax.tree.map(draw, shapes)


def packed():
    """Inputs of two rows and their segment ids: two documents with padding between and behind them; one document."""
    ids = np.array([[3, 3, 3, 0, 5, 5, 0], [0, 1, 1, 1, 1, 0, 0]])
    return normal(50, *ids.shape, WIDTH), ids


def by_document(xp, plain, params, x, ids):
    """The definition of every document by itself, rows and documents in order; nothing for padding."""
    documents = [(row, np.flatnonzero(ids[row] == i)) for row in range(2) for i in np.unique(ids[row][ids[row] > 0])]
    return xp.concatenate([plain(xp, params, x[row, where]) for row, where in documents])


def assert_close(actual, desired, tolerance):
    assert np.abs(np.asarray(actual, np.float64) - np.asarray(desired, np.float64)).max() <= tolerance


@functools.partial(jax.jit, static_argnums=0)
def whole(module, params, x):
    """In one call without a state; and the first token alone."""
    call = lambda x: module.apply({"params": params}, x)[0]
    return call(x), call(x[:, :1])


@functools.partial(jax.jit, static_argnums=0)
def steps(module, params, x):
    """In calls of one token each."""

    def step(cache, token):
        y, cache = module.apply({"params": params}, token[:, None], cache=cache)
        return cache, y[:, 0]

    cache = module.init_state(len(x), x.shape[1], WIDTH, dtype=x.dtype)
    return jnp.moveaxis(jax.lax.scan(step, cache, jnp.moveaxis(x, 1, 0))[1], 0, 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@names
def test_whole_and_steps_equal_the_definition(name, dtype):
    module, plain = VARIANTS[name]
    params, x = random_parameters(name), normal(51, 2, LENGTH, WIDTH)
    expected = np.stack([plain(np, params, row) for row in x])
    assert 0.1 < np.std(expected) < 5  # what absolute tolerances assume
    with enable_x64(dtype == "float64"):
        params, x = jax.tree.map(lambda y: jnp.asarray(y, dtype), (params, x))
        y = steps(module, params, x)
        assert y.dtype == dtype
        assert_close(y, expected, TOLERANCE[dtype])
        if dtype == "float32":  # with documents and in float64 below
            y, first = whole(module, params, x)
            assert y.dtype == dtype
            assert_close(y, expected, TOLERANCE[dtype])
            assert_close(first, expected[:, :1], TOLERANCE[dtype])


@names
def test_packed_documents_and_gradients_equal_the_definition(name):
    """Outputs, gradients of parameters and inputs, and one slope."""
    module, plain = VARIANTS[name]
    (x, ids), params = packed(), random_parameters(name)
    weights = normal(52, np.sum(ids > 0), WIDTH)

    def loss(params, x):
        y = module.apply({"params": params}, x, segment_ids=jnp.asarray(ids))[0][np.nonzero(ids)]
        return jnp.sum(weights * y), y

    def plain_loss(params, x):
        y = by_document(jnp, plain, params, x, ids)
        return jnp.sum(weights * y), y

    with enable_x64(True):
        loss, plain_loss = (jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)) for f in (loss, plain_loss))
        inputs = jax.tree.map(jnp.asarray, (params, x))
        (_, y), gradients = loss(*inputs)
        _, expected = plain_loss(*inputs)
        assert y.dtype == "float64"
        assert_close(y, by_document(np, plain, params, x, ids), TOLERANCE["float64"])
        for (path, actual), desired in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected)):
            np.testing.assert_allclose(actual, desired, rtol=1e-9, atol=1e-9, err_msg=str(path))

        directions = jax.tree.map(lambda y: normal(y.size, *y.shape), inputs)
        moved = lambda size: loss(*jax.tree.map(lambda y, d: y + size * d, inputs, directions))[0][0]
        slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(directions)))
        np.testing.assert_allclose(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("num_taps", [1, 5, 200])
def test_long_convolution(num_taps):
    """Past both forms of its pieces, with and without documents, and in two calls."""
    length, cut = 150, 40
    x, taps = normal(0, 2, length, 3).astype(np.float32), normal(1, num_taps, 3).astype(np.float32)
    ids = np.stack([np.repeat([1, 2, 0], [70, 75, 5]), np.repeat([4, 3, 2, 1], [1, 31, 1, 117])])
    lags = range(min(num_taps, length))
    moved = [np.pad(x, [(0, 0), (i, 0), (0, 0)])[:, :length] for i in lags]
    same = [(np.pad(ids, [(0, 0), (i, 0)], constant_values=-1)[:, :length] == ids)[..., None] for i in lags]
    whole = sum(tap.astype(np.float64) * y for tap, y in zip(taps, moved))
    apart = sum(tap.astype(np.float64) * y * mask for tap, y, mask in zip(taps, moved, same))
    tolerance = 1e-5 * num_taps**0.5
    assert_close(jax.jit(causal_long_conv)(x, taps), whole, tolerance)
    assert_close(jax.jit(causal_long_conv)(x, taps, ids), apart, tolerance)
    history = np.pad(x[:, :cut], [(0, 0), (length - cut, 0), (0, 0)])
    rest, history = jax.jit(extend_long_conv)(history, x[:, cut:], np.array([length - cut, 3]), taps)
    assert_close(rest, whole[:, cut:], tolerance)
    np.testing.assert_array_equal(history[0], x[0])
    np.testing.assert_array_equal(history[1, -cut - 3 :], x[1, : cut + 3])


def test_long_convolution_in_float64(monkeypatch):
    monkeypatch.setattr(long_conv, "DENSE_SIZE", 2)  # Fourier transforms of all sizes
    x = normal(0, 2, 37, 3)
    for num_taps in (9, 37):
        taps = normal(1, num_taps, 3)
        with enable_x64(True):
            y = jax.jit(lambda x, taps: causal_long_conv(x, taps))(x, taps)
        assert y.dtype == "float64"
        assert_close(y, np.stack([convolve(np, row, taps) for row in x]), 1e-12)


def test_later_inputs_do_not_change_a_bit_of_a_long_convolution():
    x, taps, cut = normal(0, 1, 300, 2).astype(np.float32), normal(1, 300, 2).astype(np.float32), 211
    changed = np.concatenate([x[:, :cut], 100 + x[:, cut:]], axis=1)
    before, after = (jax.jit(causal_long_conv)(y, taps)[:, :cut] for y in (x, changed))
    np.testing.assert_array_equal(before, after)


def test_taylor_features():
    x, y = normal(0, 5, 16), normal(1, 5, 16)
    s = np.sum(x * y, axis=-1) / 4
    features = taylor_features(jnp.asarray(x)), taylor_features(jnp.asarray(y))
    assert features[0].shape == (5, taylor_size(16)) == (5, 153)
    np.testing.assert_allclose(np.sum(features[0] * features[1], axis=-1), 1 + s + s**2 / 2, rtol=1e-5)


@pytest.mark.parametrize("name", ["based", "h3"])
def test_chunk_size_does_not_matter(name):
    """Of outputs and of the state after ragged rows, from a state that is not zero; and with documents."""
    q, k, v = (normal(i, 2, LENGTH, 2, 3).astype(np.float32) for i in range(3))
    lengths = np.array([0, LENGTH - 2])
    if name == "based":
        memory = normal(3, 2, 2, taylor_size(3), 4).astype(np.float32) + 20  # sums of weights are positive
        op = linear_attention
    else:
        memory = normal(3, 2, 2, 2, 4, 3, 3).astype(np.float32)
        log_factor = -np.abs(normal(4, 2, 4)) / 10 + 1j * normal(5, 2, 4)
        readout = normal(6, 2, 4) + 1j * normal(7, 2, 4)
        op = functools.partial(
            decayed_attention,
            log_factor=log_factor.astype(np.complex64),
            readout=readout.astype(np.complex64),
            skip=normal(8, 2).astype(np.float32),
        )
    ids = np.pad(packed()[1], [(0, 0), (0, LENGTH - 7)])

    @functools.partial(jax.jit, static_argnames="chunk_size")
    def run(chunk_size):
        extended = op(q, k, v, memory=memory, lengths=lengths, chunk_size=chunk_size)
        return *extended, *op(q, k, v, segment_ids=ids, chunk_size=chunk_size)

    expected = run(chunk_size=64)
    there = np.arange(LENGTH) < lengths[:, None]
    np.testing.assert_allclose(expected[1][0], memory[0], rtol=1e-6)  # nothing came in
    out, state, *with_documents = run(chunk_size=4)
    np.testing.assert_allclose(out[there], expected[0][there], rtol=1e-4, atol=1e-5)
    for actual, desired in zip((state, *with_documents), expected[1:]):
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-5)


def test_taps_do_not_depend_on_how_many_are_asked_for():
    for options in ({}, dict(activation="relu", use_decay=False, use_bias=True, num_hidden=1)):
        module = ImplicitFilter(4, 32, width=6, num_features=5, **options)
        shapes = jax.eval_shape(lambda rng: module.init(rng, 1), jax.random.key(0))
        params = jax.tree.map(lambda y: normal(y.size, *y.shape).astype(np.float32), shapes)
        taps = jax.jit(module.apply, static_argnums=1)
        whole = taps(params, 32)
        assert whole.shape == (32, 4) and np.std(whole) > 0.1
        np.testing.assert_allclose(taps(params, 7), whole[:7], rtol=1e-5, atol=1e-6)
    features = time_features(16, 32, 5)
    np.testing.assert_allclose(features[8], [8 / 31, 1, 0, 0, -1], atol=1e-3)


@pytest.mark.parametrize("name", ["hyena", "explicit"])
def test_states_that_hold_all_inputs(name):
    """Rows without new tokens keep them, rows that outgrow them give NaN."""
    module, params = VARIANTS[name][0], random_parameters(name)
    params = jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), params)
    call = jax.jit(lambda x, cache, lengths: module.apply({"params": params}, x, cache=cache, lengths=lengths))
    x, empty = normal(54, 2, 4, WIDTH).astype(np.float32), module.init_state(2, 6, WIDTH, superchunk=64)
    y, before = call(x, empty, np.array([4, 4]))
    assert np.isfinite(y).all()
    y, after = call(x, before, np.array([0, 3]))
    np.testing.assert_array_equal(after.length, [4, 7])
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()
    for actual, desired in zip(after.history.values(), before.history.values()):
        np.testing.assert_array_equal(actual[0], desired[0])
        assert (actual[1] != desired[1]).any()
    with pytest.raises(ValueError, match="17 tokens are more than the filter's 16 taps; raise filter_length"):
        module.init_state(2, FILTER_LENGTH + 1, WIDTH)
    with pytest.raises(ValueError, match="17 tokens are more"):
        jax.eval_shape(module.apply, {"params": params}, np.zeros((1, 17, WIDTH), np.float32))


@names
def test_options_of_the_state(name):
    init_state = functools.partial(VARIANTS[name][0].init_state, 2, 10, WIDTH)
    state = init_state(dtype=jnp.bfloat16)
    assert {x.dtype for x in state.history.values()} <= {jnp.dtype("bfloat16")}
    assert {x.dtype for x in state.memory.values()} <= {jnp.dtype("float32")}
    with pytest.raises(ValueError, match="has no pages"):
        init_state(num_pages=4)
    with pytest.raises(TypeError):
        init_state(pages=4)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("based", {"q", "k", "v", "conv_out", "recurrence"}),
        ("h3", {"q", "k", "v", "conv_out", "recurrence"}),
        ("hyena", {"q", "k", "v", "conv_out"}),
        ("base_conv", {"conv_out", "gate"}),
    ],
)
def test_taps(name, expected):
    module = VARIANTS[name][0]

    def call(params, x):
        return module.apply({"params": params}, x, capture_intermediates=is_tap, mutable="intermediates")[1]

    shapes = jax.eval_shape(call, random_parameters(name), np.zeros((1, 5, WIDTH)))
    assert set(shapes["intermediates"]) == expected


def test_options_that_are_errors():
    for make, message in (
        (lambda: BaseConv(filter="wide"), "filter='wide' is unknown; choose from"),
        (lambda: BaseConv(kernel_size=0), "kernel_size=0 must be at least 1"),
        (lambda: Hyena(conv_size=0), "conv_size=0 must be at least 1"),
        (lambda: H3(state_size=5), "state_size=5 must be even"),
        (lambda: H3(head_dim=3).init_state(1, 4, WIDTH), "head_dim=3 does not divide the width 8"),
        (lambda: ImplicitFilter(4, 8, activation="tanh"), "activation='tanh' is unknown; choose from"),
        (lambda: ImplicitFilter(4, 8, num_features=4), "num_features=4 must be odd"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_names():
    assert {name: MIXERS[name] for name in ("based", "h3", "hyena", "base_conv")} == {
        "based": Based,
        "h3": H3,
        "hyena": Hyena,
        "base_conv": BaseConv,
    }
