"""The chunk kernel of the TPU op in interpret mode against its definition, token by token in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blockwise.tpu.chunk_forward import chunk_forward

pytestmark = pytest.mark.slow  # test_tpu.py runs these kernels as part of whole operations

# Relative L2 error of (q_top, k_top, transition, out, lse) and dtype; rounding a version to bfloat16 costs 1.7e-3.
TOLERANCE = {"float32": (1e-5,) * 5, "bfloat16": (4e-3, 4e-3, 1e-4, 4e-3, 1e-3)}


# Compiled once per set of shapes, and quickly.
_run = functools.partial(
    jax.jit,
    static_argnames=("scale", "superchunk", "cores", "interpret"),
    compiler_options={"xla_backend_optimization_level": 0},
)(chunk_forward)


def definition(q, k, v, w, beta, gate, segment_ids, scale, superchunk):
    """The outputs of `chunk_forward` in float64, from the recurrence of the keys and of the running product."""
    q, k, v, w, beta = (np.asarray(x, np.float64) for x in (q, k, v, w, beta))
    heads, group, length, dim = q.shape
    q_top, k_top, transition = np.zeros_like(q), np.zeros_like(k), np.zeros((heads, length // superchunk, dim, dim))
    out, lse = np.zeros((heads, group, length, v.shape[-1])), np.full((heads, group, 1, length), -1e30)
    factor = scale / np.log(2)
    for h in range(heads):
        ids = np.ones(length) if segment_ids is None else np.asarray(segment_ids)[h * len(segment_ids) // heads]
        for start in range(0, length, superchunk):
            product, keys = np.eye(dim), np.zeros((0, dim))
            for t in range(start, start + superchunk):
                householder = np.eye(dim) - beta[h, t] * np.outer(w[h, t], w[h, t])
                product, keys = householder @ product, np.vstack([keys @ householder, k[h, t]])
                q_top[h, :, t] = factor * q[h, :, t] @ product
                seen = ids[start : t + 1] == ids[t]
                if ids[t] == 0:
                    continue
                for g in range(group):
                    s = factor * keys @ q[h, g, t]
                    if gate is not None:
                        s = s - np.asarray(gate, np.float64)[h, g, start : t + 1]
                    p = np.exp2(s - s[seen].max()) * seen
                    out[h, g, t] = p @ v[h, start : t + 1] / p.sum()
                    lse[h, g, 0, t] = s[seen].max() + np.log2(p.sum())
            k_top[h, start : start + superchunk], transition[h, start // superchunk] = keys, product
    return q_top, k_top, transition, out, lse


def make_inputs(dtype, *, length, superchunk, heads=1, group=1, dim=128, v_dim=128, cosine=0.0, low=0.0, gate=False):
    """Random inputs; directions w with the given pairwise cosine, beta |w|^2 ~ U(low, 2)."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal((heads, 1, dim))
    w = cosine**0.5 * common + (1 - cosine) ** 0.5 * rng.standard_normal((heads, length, dim))
    w = jnp.asarray(w / np.linalg.norm(w, axis=-1, keepdims=True), dtype)
    squared = (np.asarray(w, np.float64) ** 2).sum(-1)
    beta = jnp.asarray(rng.uniform(low, 2, (heads, length)) / np.maximum(squared, 1), jnp.float32)
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((heads, group, length, dim), (heads, length, dim), (heads, length, v_dim))
    )
    c = None
    if gate:
        steps = -rng.uniform(0, 0.5, (heads, group, length // superchunk, superchunk))
        c = jnp.asarray(steps.cumsum(-1).reshape(heads, group, length), jnp.float32)
    return q, k, v, w, beta, c


def packed(length):
    """Documents that straddle blocks, and padding at both ends."""
    ends = [3, 70, 71, 200, length - 9]
    return jnp.asarray(np.searchsorted(ends, np.arange(length), side="right") % len(ends), jnp.int32)[None]


def error(actual, desired):
    """Relative L2 error."""
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape
    return np.linalg.norm(actual - desired) / np.linalg.norm(desired)


def check(inputs, segment_ids, superchunk, dtype, **options):
    q, k, v, w, beta, gate = inputs
    scale = q.shape[-1] ** -0.5
    actual = _run(q, k, v, w, beta, gate, segment_ids, scale=scale, superchunk=superchunk, interpret=True, **options)
    desired = definition(q, k, v, w, beta, gate, segment_ids, scale, superchunk)
    empty = desired[-1] == -1e30
    np.testing.assert_array_equal(np.asarray(actual[-1]) == np.float32(-1e30), empty)
    desired = (*desired[:-1], np.where(empty, 0, desired[-1]))
    actual = (*actual[:-1], np.where(empty, 0, actual[-1]))
    names = ("q_top", "k_top", "transition", "out", "lse")
    errors = {name: error(a, d) for name, a, d in zip(names, actual, desired)}
    assert all(errors[name] <= bound for name, bound in zip(names, TOLERANCE[dtype])), errors


@pytest.mark.parametrize(("cosine", "low"), [(0.0, 0.0), (0.8, 1.9), (1.0, 1.9)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_superchunks(dtype, cosine, low):
    check(make_inputs(dtype, length=512, superchunk=256, cosine=cosine, low=low), None, 256, dtype)


def test_gate_segments_and_groups():
    """Six superchunks, three per head, in two halves: neither a power of two nor one head per core."""
    inputs = make_inputs("float32", length=768, superchunk=256, heads=2, group=2, v_dim=256, low=1.9, gate=True)
    check(inputs, jnp.concatenate([packed(768), packed(768)[:, ::-1]]), 256, "float32", cores=2)


def test_smallest_superchunk():
    """One pair, hence no level above the first; a number of cores that does not divide is ignored."""
    check(make_inputs("bfloat16", length=384, superchunk=128, gate=True), packed(384), 128, "bfloat16", cores=2)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "dim"), [(4, 128), (1, 256)])
def test_large_superchunk(group, dim):
    inputs = make_inputs("bfloat16", length=2048, superchunk=1024, group=group, dim=dim, low=1.9, gate=True)
    check(inputs, packed(2048), 1024, "bfloat16")
