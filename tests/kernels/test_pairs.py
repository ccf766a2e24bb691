"""Attention to keys that all come before the queries: the definition in float64, then XLA, then the TPU kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.recurrence import enable_x64

from pallas_kernels import dispatch
from pallas_kernels.blockwise.pairs import Pair, PairOptions
from pallas_kernels.blockwise.tpu import pairs as tpu_pairs


def random_pair(lengths, *, dims=(16, 24), group=2, batch=1, gate=True, documents=False, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 5)
    (rows, columns), (dim, value_dim) = lengths, dims
    normal = lambda i, *shape: jax.random.normal(keys[i], (batch, 2, *shape)).astype(dtype)
    query_gate = key_gate = query_ids = key_ids = None
    if gate:
        query_gate = jnp.cumsum(jax.nn.log_sigmoid(2 + normal(3, group, rows).astype("float32")), -1) - 0.7
        key_gate = jax.lax.cumsum(jax.nn.log_sigmoid(2 + normal(4, group, columns).astype("float32")), 3, reverse=True)
    if documents:  # one goes on from keys to queries; padding at the end
        key_ids = jnp.asarray(np.repeat([1, 2], [columns // 3, columns - columns // 3])[None].repeat(batch, 0))
        query_ids = jnp.asarray(np.repeat([2, 3, 0], [rows // 2, rows // 4, rows - rows // 2 - rows // 4])[None])
        query_ids = query_ids.repeat(batch, 0)
    arrays = normal(0, group, rows, dim), normal(1, columns, dim), normal(2, columns, value_dim)
    return Pair(*arrays, query_gate, key_gate, query_ids, key_ids, jnp.asarray(columns))


def definition(options, pair):
    logits = options.scale * jnp.einsum("bkgqh,bkch->bkgqc", pair.query, pair.key)
    if pair.query_gate is not None:
        logits += pair.query_gate[..., None] + pair.key_gate[..., None, :]
    if options.window is not None:
        rows, columns = logits.shape[-2:]
        near = pair.distance + jnp.arange(rows)[:, None] - jnp.arange(columns) < options.window
        logits = jnp.where(near, logits, -jnp.inf)
    if pair.query_ids is not None:
        same = (pair.query_ids[..., None] == pair.key_ids[:, None]) & (pair.query_ids > 0)[..., None]
        logits = jnp.where(same[:, None, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    finite = jnp.where(jnp.isneginf(lse), 0, lse)
    return jnp.einsum("bkgqc,bkcv->bkgqv", jnp.exp(logits - finite[..., None]), pair.value), lse


def assert_as_defined(implementation, options, pair, tolerance):
    """Output, lse and cotangents; those with a log-sum-exp to which another pair of the queries has contributed."""
    dout = jax.random.normal(jax.random.key(1), (*pair.query.shape[:-1], pair.value.shape[-1])).astype(pair.value.dtype)
    with enable_x64(True):
        wide = lambda x: jnp.asarray(x, "float64") if jnp.issubdtype(x.dtype, jnp.floating) else x
        exact, exact_dout = jax.tree.map(wide, pair), wide(dout)
        out, lse = definition(options, exact)
        other_out, other_lse = 0.5 * jnp.ones_like(out), jnp.zeros_like(lse)

        def merged(arrays):
            out, lse = definition(options, exact._replace(**arrays))
            total = jnp.logaddexp(lse, other_lse)
            weight = lambda x: jnp.exp(x - total)[..., None]
            return weight(lse) * out + weight(other_lse) * other_out, total

        names = [n for n in ("query", "key", "value", "query_gate", "key_gate") if getattr(pair, n) is not None]
        whole, pullback, total = jax.vjp(merged, {n: getattr(exact, n) for n in names}, has_aux=True)
        wanted, delta = pullback(exact_dout)[0], (exact_dout * whole).sum(-1)
    narrow = lambda x: jnp.asarray(np.asarray(x), "float32")
    found_out, found_lse = dispatch.forward_pair(implementation, options, pair)
    found = dispatch.backward_pair(implementation, options, pair, narrow(total), narrow(delta), dout)
    assert_near(found_out, out, tolerance)
    np.testing.assert_array_equal(np.isneginf(found_lse), np.isneginf(lse))
    assert_near(jnp.where(jnp.isneginf(found_lse), 0, found_lse), np.where(np.isneginf(lse), 0, lse), tolerance)
    for name in names:
        assert_near(getattr(found, name), wanted[name], tolerance)


def assert_near(found, wanted, tolerance):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize(
    "lengths, options, kinds",
    [
        ((24, 40), PairOptions(0.3), dict(batch=2, documents=True)),
        ((24, 24), PairOptions(0.3, window=30), dict(gate=False)),
        ((16, 1024), PairOptions(-0.3), dict(group=1)),  # two tiles of keys
    ],
)
def test_xla(lengths, options, kinds):
    assert_as_defined("xla", options, random_pair(lengths, **kinds), 1e-5)


@pytest.mark.parametrize(
    "lengths, kinds",
    [
        ((256, 512), dict(documents=True)),
        pytest.param((256, 512), dict(group=1, gate=False, batch=2, dims=(128, 64)), marks=pytest.mark.slow),
        pytest.param((384, 768), dict(documents=True, batch=2), marks=pytest.mark.slow),
    ],
)
def test_tpu_kernels(lengths, kinds):
    assert_as_defined("tpu", PairOptions(0.3, interpret=True), random_pair(lengths, **kinds), 1e-5)


@pytest.mark.slow
def test_tpu_kernels_in_bfloat16():
    pair = random_pair((256, 512), dtype="bfloat16", documents=True)
    assert_as_defined("tpu", PairOptions(0.3, interpret=True), pair, 2e-2)


def test_what_the_kernels_refuse():
    """And that XLA then serves, whatever implementation was named for the rest of a call."""
    pair = random_pair((128, 256), dtype="float16")
    reasons = [
        (PairOptions(0.3), pair, "must all be bfloat16 or all float32"),
        (PairOptions(0.3, window=9), random_pair((128, 256)), "no window"),
        (PairOptions(-0.3), random_pair((128, 256)), "scale must be positive"),
        (PairOptions(0.3), random_pair((128, 384)), "128 queries and 384 keys"),
    ]
    for options, pair, reason in reasons:
        assert reason in tpu_pairs.refuses_pair(options, pair)
        for name in ("tpu", "reference", None):
            assert dispatch.forward_pair(name, options, pair)[0].shape == (1, 2, 2, 128, 24)
    assert tpu_pairs.refuses_pair(PairOptions(0.3), random_pair((128, 256))) is None
