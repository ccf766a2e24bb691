"""The backward superchunk kernel in interpret mode against float64 autodiff of the token-by-token definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.recurrence import enable_x64, relative_error

from pallas_kernels.blockwise.tpu.chunk_backward import chunk_backward

pytestmark = pytest.mark.slow  # test_tpu.py runs these kernels as part of whole operations

NAMES = ("dq", "dk", "dw", "dv", "dbeta", "dgate")
# Relative L2 error. Rounding a result to bfloat16 costs 1.7e-3; float32 dgate sees the rounding of the versions only.
TOLERANCE = {"float32": (5e-5,) * 6, "bfloat16": (5e-3, 5e-3, 7e-3, 3e-3, 7e-3, 3e-3)}

# Compiled quickly; the x64 context of the reference must not leak into it.
_run = functools.partial(
    jax.jit,
    static_argnames=("scale", "superchunk", "cores", "interpret"),
    compiler_options={"xla_backend_optimization_level": 0},
)(chunk_backward)


@jax.jit
def linear_stage(q, k, w, beta):
    """(q_i H_i ... H_{j+1} k_j, queries at the start, keys at the end, product of all H) of one superchunk."""
    positions = jnp.arange(q.shape[0])

    def backwards(x, t):
        logits = jnp.where(positions >= t, x @ k[t], 0.0)
        moved = x - beta[t] * jnp.outer(x @ w[t], w[t])
        return jnp.where((positions >= t)[:, None], moved, x), logits

    def forwards(carry, t):
        keys, product = carry
        moved = keys - beta[t] * jnp.outer(keys @ w[t], w[t])
        keys = jnp.where((positions < t)[:, None], moved, keys)
        return (keys, product - beta[t] * jnp.outer(w[t], w[t] @ product)), None

    q_top, columns = jax.lax.scan(backwards, q, positions[::-1])
    (k_top, product), _ = jax.lax.scan(forwards, (k, jnp.eye(q.shape[1])), positions)
    return columns[::-1].T, q_top, k_top, product


@jax.jit
def linear_gradients(operands, cotangents):
    """Gradients of `linear_stage` for (q, k, w, beta)."""
    return jax.vjp(linear_stage, *operands)[1](cotangents)


def visible(ids, rows):
    """Causal mask of one superchunk within documents."""
    here = ids[rows]
    return np.tril((here[:, None] == here[None]) & (here[:, None] > 0))


def definition(inputs, scale, superchunk):
    """Fills in lse and delta of the inputs and returns them with the six gradients, all in float64."""
    x = {name: None if value is None else np.asarray(value, np.float64) for name, value in inputs.items()}
    heads, group, length, _ = x["q"].shape
    rng = np.random.default_rng(1)
    lse, delta = np.zeros((heads, group, 1, length)), np.zeros((heads, group, 1, length))
    dq, dgate, dbeta = np.zeros_like(x["q"]), np.zeros((heads, group, length)), np.zeros_like(x["beta"])
    dk, dw, dv = np.zeros_like(x["k"]), np.zeros_like(x["w"]), x["dv"].copy()
    for h, start in np.ndindex(heads, length // superchunk):
        rows = slice(start * superchunk, (start + 1) * superchunk)
        ids = np.ones(length) if x["segment_ids"] is None else x["segment_ids"][h * len(x["segment_ids"]) // heads]
        mask = visible(ids, rows)
        for g in range(group):
            operands = scale / np.log(2) * x["q"][h, g, rows], x["k"][h, rows], x["w"][h, rows], x["beta"][h, rows]
            s = np.array(linear_stage(*operands)[0])
            if x["gate"] is not None:
                s -= x["gate"][h, g, rows]
            row_lse = np.log2(np.sum(np.exp2(s) * mask, 1) + 0.5)  # 0.5: weight of earlier superchunks
            row_lse[ids[rows] == 0] = 1e30
            p = np.exp2(s - row_lse[:, None]) * mask
            row_delta = rng.standard_normal(superchunk)
            ds = p * (x["dout"][h, g, rows] @ x["v"][h, rows].T - row_delta[:, None])
            is_first = g == 0  # what the heads of a group share is counted once
            cotangents = (
                ds,
                x["dq_top"][h, g, rows],
                x["dk_top"][h, rows] * is_first,
                x["dtransition"][h, start] * is_first,
            )
            gradients = [np.log(2) * np.asarray(y) for y in linear_gradients(operands, cotangents)]
            dq[h, g, rows] = gradients[0] * scale / np.log(2)
            dk[h, rows] += gradients[1]
            dw[h, rows] += gradients[2]
            dbeta[h, rows] += gradients[3]
            dv[h, rows] += p.T @ x["dout"][h, g, rows]
            dgate[h, g, rows] = ds.sum(1) - ds.sum(0)
            lse[h, g, 0, rows], delta[h, g, 0, rows] = row_lse, row_delta
    return {**inputs, "lse": lse.astype(np.float32), "delta": delta.astype(np.float32)}, (dq, dk, dw, dv, dbeta, dgate)


def make_inputs(dtype, *, length, superchunk, heads=1, group=1, dim=128, v_dim=128, cosine=0.0, low=0.0, gate=False):
    """Random inputs and cotangents; directions w with the given pairwise cosine, beta |w|^2 ~ U(low, 2) or 0."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape)
    w = cosine**0.5 * normal(heads, 1, dim) + (1 - cosine) ** 0.5 * normal(heads, length, dim)
    w = jnp.asarray(w / np.linalg.norm(w, axis=-1, keepdims=True), dtype)
    beta = rng.uniform(low, 2, (heads, length)) / np.maximum((np.asarray(w, np.float64) ** 2).sum(-1), 1)
    beta[:, 7::50] = 0
    steps = rng.uniform(0, 0.5, (heads, group, length // superchunk, superchunk))
    shapes = {
        "q": normal(heads, group, length, dim),
        "k": normal(heads, length, dim),
        "v": normal(heads, length, v_dim),
        "w": w,
        "dout": normal(heads, group, length, v_dim),
        "dq_top": 0.1 * normal(heads, group, length, dim),
        "dk_top": 0.1 * normal(heads, length, dim),
    }
    return {
        **{name: jnp.asarray(value, dtype) for name, value in shapes.items()},
        "beta": jnp.asarray(beta, jnp.float32),
        "gate": jnp.asarray(-steps.cumsum(-1).reshape(heads, group, length), jnp.float32) if gate else None,
        "segment_ids": None,
        "dtransition": jnp.asarray(normal(heads, length // superchunk, dim, dim), jnp.float32),
        "dv": jnp.asarray(normal(heads, length, v_dim), jnp.float32),
    }


def gradients(inputs, superchunk, **options):
    """(results of the kernel, float64 gradients)."""
    scale = inputs["q"].shape[-1] ** -0.5
    with enable_x64(True):
        inputs, desired = definition(inputs, scale, superchunk)
    return _run(**inputs, scale=scale, superchunk=superchunk, interpret=True, **options), desired


def assert_within_tolerance(actual, desired, dtype):
    for name, x, y, tolerance in zip(NAMES, actual, desired, TOLERANCE[dtype]):
        if x is not None:
            error = relative_error(x, y)
            assert error <= tolerance, f"{name}: error {error:.1e} exceeds {tolerance:.0e}"


@pytest.mark.parametrize("cosine", [0.8, 1.0])
def test_bfloat16_with_correlated_directions(cosine):
    inputs = make_inputs("bfloat16", length=512, superchunk=256, cosine=cosine, low=1.9)
    assert_within_tolerance(*gradients(inputs, 256, cores=2), "bfloat16")


@pytest.mark.parametrize(
    "superchunk, options", [(256, {"cosine": 0.8, "group": 2, "gate": True}), (128, {"v_dim": 256, "heads": 2})]
)
def test_float32(superchunk, options):
    inputs = make_inputs("float32", length=superchunk, superchunk=superchunk, **options)
    assert_within_tolerance(*gradients(inputs, superchunk), "float32")


def test_documents_and_padding():
    """Documents straddle blocks; padding, whose cotangents are zero, gets gradients that are exactly zero."""
    length = 256
    ids = np.searchsorted([3, 70, 71, 200, length - 9], np.arange(length), side="right") % 5
    inputs = make_inputs("bfloat16", length=length, superchunk=length, gate=True)
    for name in ("dq_top", "dk_top", "dtransition"):
        inputs[name] = jnp.zeros_like(inputs[name])
    inputs["dv"] = jnp.where(jnp.asarray(ids)[:, None] > 0, inputs["dv"], 0)
    inputs["segment_ids"] = jnp.asarray(ids, jnp.int32)[None]
    actual, desired = gradients(inputs, length)
    assert_within_tolerance(actual, desired, "bfloat16")
    for name, x in zip(NAMES, actual):
        token_axis = -2 if x.ndim > desired[4].ndim + (name == "dgate") else -1
        assert not np.any(np.moveaxis(np.asarray(x, np.float32), token_axis, 0)[ids == 0]), f"{name} at padding"
