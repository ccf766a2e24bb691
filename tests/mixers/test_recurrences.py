"""The recurrences of mixers against their definitions, token by token in NumPy float64."""

import contextlib
import functools
import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.mixers.deltanet import DeltaNet, delta_rule, delta_step
from path_jax.mixers.mamba import Mamba, selective_scan, selective_step
from path_jax.mixers.stick_breaking import StickBreakingAttention, stick_breaking_attention

# Largest error, in units of the largest expected entry.
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
BATCH, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM, CHANNELS, STATE_SIZE = 2, 4, 2, 8, 5, 6, 3
CHUNK_SIZE = 16  # small, so that short sequences have several

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def precision(dtype):
    return enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def assert_close(actual, expected, tolerance):
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= tolerance * max(1, np.abs(wanted).max())


def normal(rng, *shape):
    return rng.standard_normal(shape)


def delta_inputs(length, hard=False, seed=0):
    """q, k, v, beta; hard: keys that repeat and beta at its limits, half of them at 2."""
    rng = np.random.default_rng(seed)
    q, k = normal(rng, BATCH, length, HEADS, HEAD_DIM), normal(rng, BATCH, length, HEADS, HEAD_DIM)
    k = k[:, np.arange(length) % 3] if hard else k
    k, beta = k / np.linalg.norm(k, axis=-1, keepdims=True), 2 * rng.random((BATCH, length, HEADS))
    beta = np.where(beta < 1, np.where(beta < 0.5, 0, 1e-6), np.where(beta < 1.5, 2, 2 - 1e-6)) if hard else beta
    return q, k, normal(rng, BATCH, length, HEADS, VALUE_DIM), beta


def define_delta(q, k, v, beta, state=None):
    state = np.zeros((BATCH, HEADS, HEAD_DIM, v.shape[-1])) if state is None else state.copy()
    out = np.zeros_like(v)
    for t in range(q.shape[1]):
        for b, n in np.ndindex(BATCH, HEADS):
            key = k[b, t, n]
            state[b, n] = (np.eye(HEAD_DIM) - beta[b, t, n] * np.outer(key, key)) @ state[b, n]
            state[b, n] += beta[b, t, n] * np.outer(key, v[b, t, n])
            out[b, t, n] = HEAD_DIM**-0.5 * q[b, t, n] @ state[b, n]
    return out, state


def mamba_inputs(length, hard=False, seed=0):
    """x, dt, a, b, c; hard: steps so large that a state is forgotten at once, and so small that nothing happens."""
    rng = np.random.default_rng(seed)
    dt = np.exp(rng.uniform(*((-20, 6) if hard else (-3, 0)), (BATCH, length, CHANNELS)))
    x = normal(rng, BATCH, length, CHANNELS) / (np.maximum(dt, 1) if hard else 1)
    a = -np.tile(np.arange(1.0, STATE_SIZE + 1), (CHANNELS, 1))
    return x, dt, a, normal(rng, BATCH, length, STATE_SIZE), normal(rng, BATCH, length, STATE_SIZE)


def define_mamba(x, dt, a, b, c, state=None):
    state = np.zeros((BATCH, *a.shape)) if state is None else state.copy()
    out = np.zeros_like(x)
    for t in range(x.shape[1]):
        for i, e, p in np.ndindex(*state.shape):
            state[i, e, p] = math.exp(dt[i, t, e] * a[e, p]) * state[i, e, p] + dt[i, t, e] * x[i, t, e] * b[i, t, p]
            out[i, t, e] += c[i, t, p] * state[i, e, p]
    return out, state


def stick_inputs(length, hard=False, seed=0):
    """q, k, v; hard: logits far beyond where sigmoids saturate."""
    rng = np.random.default_rng(seed)
    k, v = normal(rng, BATCH, length, KV_HEADS, HEAD_DIM), normal(rng, BATCH, length, KV_HEADS, VALUE_DIM)
    return (30 if hard else 1) * normal(rng, BATCH, length, HEADS, HEAD_DIM), k, v


def define_stick(q, k, v, attend_current=False):
    """Breaks off sigmoid(z) of what is left at one key after the other."""
    out, left = np.zeros((*q.shape[:3], v.shape[-1])), np.ones(q.shape[:3])
    for b, t, n in np.ndindex(*q.shape[:3]):
        kv = n // (HEADS // KV_HEADS)
        for j in range(t if attend_current else t - 1, -1, -1):
            logit = HEAD_DIM**-0.5 * q[b, t, n] @ k[b, j, kv]
            kept = 1 / (1 + math.exp(min(logit, 700)))
            out[b, t, n] += left[b, t, n] * (1 / (1 + math.exp(min(-logit, 700)))) * v[b, j, kv]
            left[b, t, n] *= kept
    return out, left


def scan_steps(step, state, inputs, fixed=()):
    """`step` over the length axis of inputs [B, T, ...]; the definition, as a differentiable program."""

    def take(state, now):
        out, state = step(state, *now, *fixed)
        return state, out

    state, out = jax.lax.scan(take, state, tuple(jnp.moveaxis(x, 1, 0) for x in inputs))
    return jnp.moveaxis(out, 0, 1), state


def delta_steps(q, k, v, beta, state=None):
    state = jnp.zeros((BATCH, HEADS, HEAD_DIM, VALUE_DIM), q.dtype) if state is None else state
    return scan_steps(functools.partial(delta_step, scale=HEAD_DIM**-0.5), state, (q, k, v, beta))


def mamba_steps(x, dt, a, b, c, state=None):
    state = jnp.zeros((BATCH, CHANNELS, STATE_SIZE), x.dtype) if state is None else state
    step = lambda state, x, dt, b, c: selective_step(state, x, dt, a, b, c)
    return scan_steps(step, state, (x, dt, b, c))


def selective_scan_elsewhere(*args, **options):
    """As it is compiled for accelerators, on the CPU."""
    elsewhere = lambda *args, cpu, default: default(*args)
    with mock.patch.object(jax.lax, "platform_dependent", elsewhere):
        return selective_scan(*args, **options)


def stick_steps(q, k, v):
    """Plain products instead of sums of logarithms; one key after the other, for all queries at once."""
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    beta = jax.nn.sigmoid(HEAD_DIM**-0.5 * jnp.einsum("btnh,bsnh->sbtn", q, k))

    def take(state, key):
        (out, left), (j, beta, v) = state, key
        taken = jnp.where(jnp.arange(q.shape[1])[:, None] > j, left * beta, 0)
        return (out + taken[..., None] * v[:, None], left - taken), None

    state = jnp.zeros((*q.shape[:3], VALUE_DIM), q.dtype), jnp.ones(q.shape[:3], q.dtype)
    keys = jnp.arange(q.shape[1]), beta, jnp.moveaxis(v, 1, 0)
    return jax.lax.scan(take, state, keys, reverse=True)[0]


FORMS = {  # name: inputs, definition, whole form, plain differentiable form
    "delta": (delta_inputs, define_delta, functools.partial(delta_rule, chunk_size=CHUNK_SIZE), delta_steps),
    "mamba": (mamba_inputs, define_mamba, functools.partial(selective_scan, chunk_size=CHUNK_SIZE), mamba_steps),
    "mamba of accelerators": (
        mamba_inputs,
        define_mamba,
        functools.partial(selective_scan_elsewhere, chunk_size=CHUNK_SIZE),
        mamba_steps,
    ),
    "stick": (
        stick_inputs,
        define_stick,
        functools.partial(stick_breaking_attention, block_size=CHUNK_SIZE),
        stick_steps,
    ),
}
RECURRENT = ("delta", "mamba")


def cast(inputs, dtype):
    return [jnp.asarray(x, dtype) for x in inputs]


@pytest.mark.parametrize(
    "length, hard, dtype", [(1, False, "float32"), *itertools.product([45], [False, True], TOLERANCE)]
)
@pytest.mark.parametrize("name", FORMS)
def test_whole_equals_steps_equals_definition(name, length, hard, dtype):
    make_inputs, define, whole, steps = FORMS[name]
    with precision(dtype):
        inputs = cast(make_inputs(length, hard), dtype)
        expected = define(*(np.asarray(x, np.float64) for x in inputs))
        actual = jax.jit(whole)(*inputs)
        assert {x.dtype for x in actual} == {jnp.dtype(dtype)}
        assert_close(actual, expected, TOLERANCE[dtype])
        if name in RECURRENT:
            assert_close(jax.jit(steps)(*inputs), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", RECURRENT)
def test_a_state_continues(name):
    make_inputs, define, whole, _ = FORMS[name]
    with precision("float64"):
        inputs = make_inputs(45)
        at = lambda part: [x if x.shape[:1] == (CHANNELS,) else x[:, part] for x in inputs]
        first, state = jax.jit(whole)(*cast(at(slice(0, 20)), "float64"))
        second, state = jax.jit(whole)(*cast(at(slice(20, None)), "float64"), state)
        assert_close((jnp.concatenate([first, second], 1), state), define(*inputs), TOLERANCE["float64"])


@pytest.mark.parametrize("attend_current", [False, True])
def test_stick_breaking_from_a_start_and_to_itself(attend_current):
    """The last queries against all keys; no token sees itself unless told to."""
    with precision("float64"):
        inputs = stick_inputs(45)
        q, k, v = cast(inputs, "float64")
        starts = jnp.full(BATCH, 25)
        actual = stick_breaking_attention(q[:, 25:], k, v, starts=starts, attend_current=attend_current, block_size=8)
        expected = [x[:, 25:] for x in define_stick(*inputs, attend_current)]
        assert_close(actual, expected, TOLERANCE["float64"])


def test_sticks_are_shared_out_completely():
    """Values of 1 give what was broken off; the rest is what is left, and the first token has no key."""
    q, k, v = cast(stick_inputs(45), "float32")
    out, left = stick_breaking_attention(q, k, jnp.ones_like(v))
    np.testing.assert_allclose(out + left[..., None], 1, atol=1e-6)
    np.testing.assert_array_equal(left[:, 0], 1)


# Documents that straddle chunks, end inside and at the end of them; padding at both ends.
SEGMENT_IDS = np.stack([np.repeat([0, 1, 2, 3, 0], [3, 13, 17, 5, 7]), np.repeat([1, 2, 0], [1, 40, 4])])


@pytest.mark.parametrize("name", FORMS)
def test_documents_are_isolated_and_padding_is_inert(name):
    make_inputs, define, whole, _ = FORMS[name]
    with precision("float64"):
        inputs = make_inputs(45)

        def loss(inputs):
            out, _ = whole(*inputs, segment_ids=jnp.asarray(SEGMENT_IDS))
            return jnp.sum(out**2), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(cast(inputs, "float64"))
        expected = np.zeros(out.shape)
        for row, segment in [(r, s) for r, ids in enumerate(SEGMENT_IDS) for s in np.unique(ids) if s > 0]:
            where = np.flatnonzero(SEGMENT_IDS[row] == segment)
            alone = [x if x.shape[:1] == (CHANNELS,) else x[:, where] for x in inputs]
            expected[row, where] = define(*alone)[0][row]
        assert_close(out, expected, TOLERANCE["float64"])
        for gradient in gradients:
            if gradient.shape[:2] == SEGMENT_IDS.shape:
                assert np.isfinite(gradient).all() and not np.asarray(gradient)[SEGMENT_IDS == 0].any()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_gradients(name, hard):
    """Against the plain form's, and one finite difference."""
    make_inputs, _, whole, steps = FORMS[name]
    with precision("float64"):
        inputs = cast(make_inputs(37, hard), "float64")
        cotangents = [normal(np.random.default_rng(5), *x.shape) for x in jax.eval_shape(whole, *inputs)]
        loss = lambda form, inputs: sum(jnp.vdot(c, x) for c, x in zip(cotangents, form(*inputs)))
        with_gradients = jax.jit(jax.value_and_grad(functools.partial(loss, whole)))
        _, gradients = with_gradients(inputs)
        if (name, hard) != ("stick", True):  # there 1 - sigmoid has lost all digits
            assert_close(gradients, jax.jit(jax.grad(functools.partial(loss, steps)))(inputs), 1e-9)
        direction = [normal(np.random.default_rng(6), *x.shape) * np.minimum(1, np.abs(x)) for x in inputs]
        moved = lambda size: with_gradients([x + size * d for x, d in zip(inputs, direction)])[0]
        difference = (moved(1e-6) - moved(-1e-6)) / 2e-6
        expected = sum(jnp.vdot(g, d) for g, d in zip(gradients, direction))
        np.testing.assert_allclose(difference, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_chunk_size_does_not_matter(name):
    make_inputs, _, whole, _ = FORMS[name]
    option = "block_size" if name == "stick" else "chunk_size"
    with precision("float64"):
        inputs = cast(make_inputs(45), "float64")
        first, second = (jax.jit(functools.partial(whole, **{option: size}))(*inputs) for size in (4, 64))
        assert_close(first, second, 1e-12)


def test_chunk_sizes_are_checked():
    with pytest.raises(ValueError, match="chunk_size=48 must be a power of two"):
        delta_rule(*cast(delta_inputs(3), "float32"), chunk_size=48)
    with pytest.raises(ValueError, match="chunk_size=0 must be positive"):
        selective_scan(*cast(mamba_inputs(3), "float32"), chunk_size=0)
    q, k, v = cast(stick_inputs(3), "float32")
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        stick_breaking_attention(q, jnp.ones((BATCH, 3, 3, HEAD_DIM)), jnp.ones((BATCH, 3, 3, HEAD_DIM)))
    with pytest.raises(ValueError, match="of 2 queries, but there are 3 keys"):
        stick_breaking_attention(q[:, :2], k, v, jnp.ones((BATCH, 2), int))


def test_mamba_starts_as_published():
    module = Mamba()
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4, 64)))["params"]
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes["x_proj"]["kernel"] == (128, 4 + 2 * 16) and shapes["dt_proj"]["kernel"] == (4, 128)
    assert shapes["conv"] == {"kernel": (4, 128), "bias": (128,)}
    dt = np.sort(jax.nn.softplus(params["dt_proj"]["bias"]))
    assert 0.9e-3 <= dt[0] < 2e-3 and 0.05 < dt[-1] <= 0.101
    assert 0.5e-2 < np.median(dt) < 2e-2  # log-uniform: the geometric mean of the limits
    np.testing.assert_allclose(np.exp(params["log_a"]), np.tile(np.arange(1, 17), (128, 1)), rtol=1e-6)
    np.testing.assert_array_equal(params["skip"], 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def convolved(x, conv):
    """SiLU of the causal convolution: the newest token has the last tap."""
    padded, width = np.pad(x, [(0, 0), (3, 0), (0, 0)]), len(conv["kernel"])
    y = sum(conv["kernel"][i] * padded[:, i : i + x.shape[1]] for i in range(width)) + conv.get("bias", 0)
    return y * sigmoid(y)


def heads(x):
    return x.reshape(*x.shape[:2], -1, HEAD_DIM)


def define_deltanet_module(params, x):
    project = lambda name: x @ params[f"{name}_proj"]["kernel"]
    q, k, v = (heads(convolved(project(name), params[f"{name}_conv"])) for name in "qkv")
    unit = lambda y: y / np.linalg.norm(y, axis=-1, keepdims=True)
    out, _ = define_delta(unit(q), unit(k), v, 2 * sigmoid(project("beta")))
    out = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-5) * params["output_norm"]["scale"]
    gate = project("output_gate")
    return (out.reshape(gate.shape) * gate * sigmoid(gate)) @ params["o_proj"]["kernel"]


def define_mamba_module(params, x):
    u, z = np.split(x @ params["in_proj"]["kernel"], 2, axis=-1)
    u = convolved(u, params["conv"])
    r, b, c = np.split(u @ params["x_proj"]["kernel"], (2, 2 + STATE_SIZE), axis=-1)
    dt = np.log1p(np.exp(r @ params["dt_proj"]["kernel"] + params["dt_proj"]["bias"]))
    y, _ = define_mamba(u, dt, -np.exp(params["log_a"]), b, c)
    return ((y + params["skip"] * u) * z * sigmoid(z)) @ params["out_proj"]["kernel"]


def define_stick_module(params, x):
    q, k, v = (heads(x @ params[f"{name}_proj"]["kernel"]) for name in "qkv")
    out, left = define_stick(q, k, v)
    out += left[..., None] * np.repeat(v, HEADS // KV_HEADS, axis=2)
    return out.reshape(*x.shape[:2], -1) @ params["o_proj"]["kernel"]


@pytest.mark.parametrize(
    "module, define",
    [
        (DeltaNet(HEADS, allow_neg_eigval=True, output_gate=True), define_deltanet_module),
        (Mamba(state_size=STATE_SIZE, dt_rank=2), define_mamba_module),
        (StickBreakingAttention(HEADS, KV_HEADS, remainder=True), define_stick_module),
    ],
    ids=["deltanet", "mamba", "stick_breaking"],
)
def test_modules_are_wired_as_published(module, define):
    rng = np.random.default_rng(0)
    x = normal(rng, BATCH, 10, HEADS * HEAD_DIM)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x.astype(np.float32))["params"]
    params = jax.tree.map(lambda leaf: normal(rng, *leaf.shape) / math.sqrt(leaf.shape[0]), shapes)
    apply = jax.jit(lambda params, x: module.apply({"params": params}, x)[0])
    assert_close(apply(*jax.tree.map(jnp.float32, (params, x))), define(params, x), 2e-5)
