"""Attention of a few queries to the closed superchunks of a decode cache, on TPU: one pass over the pages of each row.

Step i of a row and key head reads the i-th nearest page. The queries stay in VMEM and move through the page's product
before the next one. Pages that are not needed are neither read nor computed: the step's block index repeats.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise.tpu import lanes, tuning
from pallas_kernels.blockwise.tpu.arithmetic import EMPTY, MASKED, NT, dot


def _kernel(*refs, names, num_steps, gate_scale, window):
    refs = dict(zip(names, refs))
    row, head, i = (pl.program_id(axis) for axis in range(3))
    flat = (row * pl.num_programs(1) + head) * num_steps + i
    x, maximum, total, acc = (refs[name] for name in ("x", "maximum", "total", "acc"))
    superchunk = refs["k"].shape[2]

    @pl.when(i == 0)
    def _():
        x[...] = refs["q"][0, 0]
        maximum[...] = jnp.full_like(maximum, EMPTY)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)
        if "gate" in refs:
            refs["between"][...] = jnp.zeros_like(refs["between"])

    @pl.when(refs["needed"][flat] != 0)
    def _():
        k, v = refs["k"][0, 0], refs["v"][0, 0]
        s = dot(x[...].astype(k.dtype), k, NT)
        if "gate" in refs:
            gate = refs["gate"][0, 0]
            later = refs["between"][...] + gate[:, superchunk - 1 :] - gate  # from each key to the queries' superchunk
            s += gate_scale * (refs["inside"][0, 0] + dot(refs["of_group"][...], later))
        if window is not None:
            key = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            s = jnp.where(refs["position"][0] + (i + 1) * superchunk - key < window, s, MASKED)
        peak = jnp.maximum(maximum[...], s.max(axis=1, keepdims=True))
        p, decay = jnp.exp(s - peak), jnp.exp(maximum[...] - peak)
        total[...] = decay * total[...] + p.sum(axis=1, keepdims=True)
        acc[...] = decay * acc[...] + dot(p.astype(v.dtype), v)
        maximum[...] = peak

    @pl.when(i + 1 < refs["num_moves"][row * pl.num_programs(1) + head])
    def _():
        if "products" in refs:
            x[...] = dot(x[...], refs["products"][0, 0])
        if "gate" in refs:
            refs["between"][...] += refs["gate"][0, 0][:, superchunk - 1 :]

    @pl.when(i == num_steps - 1)
    def _():
        is_empty = total[...] == 0
        refs["out"][0, 0] = acc[...] / jnp.where(is_empty, 1.0, total[...])
        log_sum = maximum[...] + jnp.log(jnp.where(is_empty, 1.0, total[...]))
        refs["lse"][0, 0] = jnp.where(is_empty, EMPTY, log_sum)


def refuses_pages(k, v) -> str | None:
    """Why the kernel cannot read pools of keys and values, or None."""
    if k.dtype != v.dtype or k.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the cache must be bfloat16 or float32, got {k.dtype}"
    return None


def attend_pages(q, k, v, products, gate, inside, position, pages, needed, *, gate_scale, window, interpret=False):
    """`pages.attend_pages`, for float32 queries and float32 or bfloat16 pools."""
    batch, num_kv_heads, groups, width, head_dim = q.shape
    superchunk, v_head_dim, num_steps = k.shape[2], v.shape[3], pages.shape[1]
    rows = groups * width
    step = jnp.arange(num_steps)
    num_moves = jnp.max(jnp.where(needed, step + 1, 0), axis=-1).astype(jnp.int32)  # steps up to the last needed one
    nearest = jax.lax.cummax(jnp.where(needed, step, 0), axis=2)  # the step whose page is in VMEM
    held = jnp.take_along_axis(jnp.broadcast_to(pages[:, None], needed.shape), nearest, axis=2)
    passed = jnp.minimum(step, jnp.maximum(num_moves - 1, 0)[..., None])
    passed = jnp.take_along_axis(jnp.broadcast_to(pages[:, None], needed.shape), passed, axis=2)
    prefetch = {
        "held": held.ravel(),
        "passed": passed.ravel(),
        "needed": needed.ravel().astype(jnp.int32),
        "num_moves": num_moves.ravel(),
    }
    flat = lambda b, h, i: (b * num_kv_heads + h) * num_steps + i
    of_pool = lambda *shape: pl.BlockSpec((1, 1, *shape), lambda b, h, i, held, *_: (held[flat(b, h, i)], h, 0, 0))
    of_passed = lambda *shape: pl.BlockSpec((1, 1, *shape), lambda b, h, i, _, p, *__: (p[flat(b, h, i)], h, 0, 0))
    of_row = lambda *shape: pl.BlockSpec((1, 1, *shape), lambda b, h, i, *_: (b, h, 0, 0))
    inputs = {
        "q": (q.reshape(batch, num_kv_heads, rows, head_dim), of_row(rows, head_dim)),
        "k": (k, of_pool(superchunk, head_dim)),
        "v": (v, of_pool(superchunk, v_head_dim)),
    }
    if products is not None:
        inputs["products"] = (products, of_passed(head_dim, head_dim))
    scratch = {"x": (rows, head_dim), "maximum": (rows, 1), "total": (rows, 1), "acc": (rows, v_head_dim)}
    if gate is not None:
        of_group = jnp.repeat(jnp.eye(groups, dtype=jnp.float32), width, axis=0)
        inputs["gate"] = (gate, of_passed(groups, superchunk))
        inputs["inside"] = (inside.reshape(batch, num_kv_heads, rows, 1), of_row(rows, 1))
        inputs["of_group"] = (of_group, pl.BlockSpec((rows, groups), lambda *_: (0, 0)))
        scratch["between"] = (groups, 1)
    if window is not None:
        tiled = jnp.tile(position, (1, groups))[..., None]
        inputs["position"] = (tiled, pl.BlockSpec((1, rows, 1), lambda b, *_: (b, 0, 0)))
    outputs = {"out": (rows, v_head_dim), "lse": (rows, 1)}
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            names=(*prefetch, *inputs, *outputs, *scratch),
            num_steps=num_steps,
            gate_scale=gate_scale,
            window=window,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(batch, num_kv_heads, num_steps),
            in_specs=[block for _, block in inputs.values()],
            out_specs=[of_row(*shape) for shape in outputs.values()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        ),
        out_shape=[lanes.result((batch, num_kv_heads, *shape), jnp.float32, q) for shape in outputs.values()],
        name="decode_pages",
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tuning.chip().vmem << 20
        ),
    )(*prefetch.values(), *(x for x, _ in inputs.values()))
    lse = lse.reshape(q.shape[:4])
    return out.reshape(batch, num_kv_heads, groups, width, -1), jnp.where(lse == EMPTY, -jnp.inf, lse)
