"""Attention of queries to keys before them (`blockwise.pairs`) by the kernels of the quadratic stage.

To the kernels the keys are superchunks in front of those of the queries, all whole tiles. Gates between a key and the
place behind all keys are sums of their own, so the kernels' superchunks of keys have no totals to add.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise.pairs import Pair, PairGradients, PairOptions, result_types
from pallas_kernels.blockwise.tpu import layout, tuning
from pallas_kernels.blockwise.tpu.arithmetic import EMPTY, LOG2E
from pallas_kernels.blockwise.tpu.backward import attention_backward
from pallas_kernels.blockwise.tpu.forward import attention_forward
from pallas_kernels.blockwise.tpu.tiling import Gate, Tiling
from pallas_kernels.lazily import on_platform


def refuses_pair(options: PairOptions, pair: Pair) -> str | None:
    """Why the kernels cannot serve the pair, or None."""
    dtypes = {x.dtype for x in pair[:3]}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype("bfloat16"), jnp.dtype("float32")}:
        return f"queries, keys and values must all be bfloat16 or all float32, got {', '.join(map(str, dtypes))}"
    if options.window is not None:
        return "no window"
    if options.scale <= 0:
        return f"scale must be positive, got {options.scale}"
    lengths = pair.query.shape[3], pair.key.shape[2]
    if lengths[0] % 128 or lengths[1] % 256:
        return f"{lengths[0]} queries and {lengths[1]} keys are no multiples of 128 and 256"
    return None


def forward_pair(options: PairOptions, pair: Pair):
    """See `blockwise.pairs`."""
    return _run(_forward, options, (pair,), has_gradients=False)


def backward_pair(options: PairOptions, pair: Pair, lse, delta, dout) -> PairGradients:
    """See `blockwise.pairs`."""
    return _run(_backward, options, (pair, lse, delta, dout), has_gradients=True)


def _run(function, options, arguments, has_gradients):
    function = functools.partial(function, options)
    if options.interpret:
        return function(*arguments)
    return on_platform("tpu", "tpu", function, arguments, result_types(arguments[0], has_gradients))


def _setting(options, pair, direction):
    """Switches, operands and keywords of the kernels."""
    batch, num_kv_heads, group, length, head_dim = pair.query.shape
    num_keys = pair.key.shape[2]
    largest = tuning.largest_superchunk(pair.query.dtype)
    superchunk = next(s for s in (1024, 512, 256, 128) if s <= largest and not length % s and not num_keys % (2 * s))
    tiling = Tiling(
        superchunk=superchunk,
        keys=min(tuning.keys(num_keys, head_dim, direction), superchunk),
        num_queries=length // superchunk,
        num_keys=num_keys // superchunk,
        tree=False,
        apart=True,
        logit_scale=options.scale * LOG2E,
        vmem_limit=tuning.chip().vmem,
        interpret=options.interpret,
    )
    gate = segments = None
    if pair.key_gate is not None:
        tail = pair.key_gate.reshape(-1, group, num_keys) / options.scale
        totals = jnp.zeros((batch * num_kv_heads * group, tiling.num_keys + tiling.num_queries), jnp.float32)
        gate = Gate(inside=None, tail=tail, totals=totals)
    if pair.key_ids is not None:
        segments = layout.whole_segments(jnp.concatenate([pair.key_ids, pair.query_ids], axis=1), superchunk)
    return tiling, (_rows(pair.query)[None], _rows(pair.key)[None, :, None], _rows(pair.value)), gate, segments


def _rows(x):
    """[B, K, ..., H] -> [B K, ..., H in whole lanes]."""
    x = x.reshape(-1, *x.shape[2:])
    return layout.pad(x, x.ndim - 1, 0, layout.padded(x.shape[-1]))


def _forward(options, pair):
    tiling, operands, gate, segments = _setting(options, pair, "forward")
    out, lse = attention_forward(*operands, tiling, gate=gate, segments=segments)
    out_type, lse_type = result_types(pair, has_gradients=False)
    is_empty, lse = (lse == EMPTY).reshape(lse_type.shape), (lse / LOG2E).reshape(lse_type.shape)
    lse = lse if pair.query_gate is None else lse + pair.query_gate
    return _unpadded(out, out_type.shape), jnp.where(is_empty, -jnp.inf, lse)


def _backward(options, pair, lse, delta, dout):
    tiling, operands, gate, segments = _setting(options, pair, "backward")
    relative = lse if pair.query_gate is None else lse - pair.query_gate
    relative = jnp.where(jnp.isneginf(lse), -EMPTY, relative * LOG2E)
    per_row = lambda x: x.reshape(-1, x.shape[2], 1, x.shape[3])
    dquery, dkey, dvalue, *sums = attention_backward(
        *operands, _rows(dout), per_row(relative), per_row(delta), tiling, gate=gate, segments=segments,
        dq_scale=options.scale, dk_scale=options.scale,
    )  # fmt: skip
    found = PairGradients(dquery[0], dkey[0, :, 0], dvalue, *sums)
    types = result_types(pair, has_gradients=True)
    return jax.tree.map(lambda x, kind: _unpadded(x, kind.shape), found, types)


def _unpadded(x, shape):
    """Undoes `_rows`."""
    return x[..., : shape[-1]].reshape(shape)
