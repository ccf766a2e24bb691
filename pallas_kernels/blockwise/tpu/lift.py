"""Linear stage above the superchunk: the frame tree's versions of queries and keys, level by level.

At slot u superchunk c is read as a query when bit u of c is set and as a key when it is clear, never as both, so one
array holds all versions: row block (u, c) has the queries of the group or, at index 0 of the group, the keys. From slot
u to u + 1 a query of a right sibling moves through the left sibling's product, and a key of a left sibling through the
right sibling's; all else stays where it is:

    q(u + 1) = q(u) P_u[c >> u - 1]    if bit u of c is set,     P_{u+1}[s] = P_u[2 s + 1] P_u[2 s].
    k(u + 1) = k(u) P_u[c >> u + 1]^T  if it is clear,

Products are formed in float32, versions rounded to the operands' dtype.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise.tpu import lanes
from pallas_kernels.blockwise.tpu.arithmetic import NT, TN, dot

_IN_HBM = pl.BlockSpec(memory_space=pl.ANY)


def num_slots(num_chunks: int) -> int:
    """Levels at which two superchunks can meet."""
    return (num_chunks - 1).bit_length()


def _level_starts(num_chunks):
    """Per level, where its products start in the stack of all products; the last entry is the stack's length."""
    starts = [0]
    for level in range(max(1, num_slots(num_chunks) - 1)):
        starts.append(starts[-1] + (num_chunks >> level))
    return starts


def stack_bytes(num_chunks: int, head_dim: int) -> int:
    """VMEM that the backward kernel needs for products and their cotangents; it grows with the length."""
    return 2 * 4 * _level_starts(num_chunks)[-1] * head_dim**2


def _copy(source, target, semaphore):
    copy = pltpu.make_async_copy(source, target, semaphore)
    copy.start()
    copy.wait()


def _merge(stack, transition, starts, kv, semaphore):
    """Fills the stack: the head's transitions, then the products of 2, 4, ... of them."""
    _copy(transition.at[kv], stack.at[pl.ds(0, transition.shape[1])], semaphore)
    for below, above, end in zip(starts, starts[1:], starts[2:]):

        def merge_pair(s, _, below=below, above=above):
            stack[above + s] = dot(stack[below + 2 * s + 1], stack[below + 2 * s])

        jax.lax.fori_loop(0, end - above, merge_pair, None)


def _is_query(chunk, level):
    return (chunk >> level) & 1 == 1


def _has_queries_above(chunk, level, num_chunks):
    """Whether some query meets the keys of this chunk above the level: then its right sibling there is complete."""
    return (((chunk >> (level + 1)) + 1) << (level + 1)) < num_chunks


def _forward_kernel(
    q_top, k_top, transition, versions, stack, query, key, staged, semaphores, semaphore, *, num_chunks
):
    kv, chunk = pl.program_id(0), pl.program_id(1)
    starts = _level_starts(num_chunks)
    slots, superchunk = versions.shape[0], key.shape[0]
    buffer = chunk & 1

    def each_copy(chunk, act):
        """Acts on the copies of a superchunk's versions to HBM: a whole group of queries or one head of keys."""
        buffer, rows = chunk & 1, pl.ds(chunk * superchunk, superchunk)
        for level in range(slots):
            source, target = staged.at[buffer, level], versions.at[level, kv]
            queries = pltpu.make_async_copy(source, target.at[:, rows], semaphores.at[buffer, level])
            keys = pltpu.make_async_copy(source.at[0], target.at[0, rows], semaphores.at[buffer, level])
            pl.when(_is_query(chunk, level))(functools.partial(act, queries))
            pl.when(jnp.logical_not(_is_query(chunk, level)))(functools.partial(act, keys))

    pl.when(chunk == 0)(lambda: _merge(stack, transition, starts, kv, semaphore))
    pl.when(chunk >= 2)(lambda: each_copy(chunk - 2, lambda copy: copy.wait()))
    query[...], key[...] = q_top[0], k_top[0]
    for level in range(slots):
        is_query = _is_query(chunk, level)

        @pl.when(is_query)
        def _(level=level):
            staged[buffer, level] = query[...]

        @pl.when(jnp.logical_not(is_query))
        def _(level=level):
            staged[buffer, level, 0] = key[...]

        if level + 1 == slots:
            break

        @pl.when(is_query & (chunk >> (level + 1) > 0))
        def _(level=level):
            left = stack[starts[level] + (chunk >> level) - 1].astype(query.dtype)
            for g in range(query.shape[0]):
                query[g] = dot(query[g], left).astype(query.dtype)

        @pl.when(jnp.logical_not(is_query) & _has_queries_above(chunk, level, num_chunks))
        def _(level=level):
            right = stack[starts[level] + (chunk >> level) + 1].astype(key.dtype)
            key[...] = dot(key[...], right, NT).astype(key.dtype)

    each_copy(chunk, lambda copy: copy.start())

    @pl.when(chunk == num_chunks - 1)
    def _():
        each_copy(chunk - 1, lambda copy: copy.wait())
        each_copy(chunk, lambda copy: copy.wait())


def _backward_kernel(
    versions, dversions, transition, dq_top, dk_top, dtransition, stack, dstack, dquery, dkey, semaphore, *, num_chunks
):
    kv, chunk = pl.program_id(0), pl.program_id(1)
    starts = _level_starts(num_chunks)
    slots, groups, dtype = versions.shape[0], versions.shape[2], versions.dtype

    @pl.when(chunk == 0)
    def _():
        _merge(stack, transition, starts, kv, semaphore)
        dstack[...] = jnp.zeros_like(dstack)

    dquery[...] = jnp.zeros_like(dquery)
    dkey[...] = jnp.zeros_like(dkey)
    for level in reversed(range(slots)):
        is_query = _is_query(chunk, level)
        if level + 1 < slots:

            @pl.when(is_query & (chunk >> (level + 1) > 0))
            def _(level=level):
                index = starts[level] + (chunk >> level) - 1
                left, dleft = stack[index].astype(dtype), dstack[index]
                for g in range(groups):
                    above = dquery[g].astype(dtype)
                    dleft += dot(versions[level, 0, g], above, TN)
                    dquery[g] = dot(above, left, NT)
                dstack[index] = dleft

            @pl.when(jnp.logical_not(is_query) & _has_queries_above(chunk, level, num_chunks))
            def _(level=level):
                index = starts[level] + (chunk >> level) + 1
                above = dkey[...].astype(dtype)
                dstack[index] += dot(above, versions[level, 0, 0], TN)
                dkey[...] = dot(above, stack[index].astype(dtype))

        @pl.when(is_query)
        def _(level=level):
            dquery[...] += dversions[level, 0].astype(jnp.float32)

        has_right_sibling = ((chunk >> level) + 1) << level < num_chunks

        @pl.when(jnp.logical_not(is_query) & has_right_sibling)
        def _(level=level):
            dkey[...] += dversions[level, 0, 0].astype(jnp.float32)

    dq_top[0], dk_top[0] = dquery[...].astype(dtype), dkey[...].astype(dtype)

    @pl.when(chunk == num_chunks - 1)
    def _():
        for below, above, end in reversed(list(zip(starts, starts[1:], starts[2:]))):

            def split_pair(s, _, below=below, above=above):
                left, right, product = below + 2 * s, below + 2 * s + 1, dstack[above + s]
                dstack[right] += dot(product, stack[left], NT)
                dstack[left] += dot(stack[right], product, TN)

            jax.lax.fori_loop(0, end - above, split_pair, None)
        _copy(dstack.at[pl.ds(0, num_chunks)], dtransition.at[kv], semaphore)


def _specs(groups, superchunk, head_dim, slots):
    """Blocks of (queries, keys, versions) for the grid (kv head, superchunk)."""
    return (
        pl.BlockSpec((1, groups, superchunk, head_dim), lambda kv, c: (kv, 0, c, 0)),
        pl.BlockSpec((1, superchunk, head_dim), lambda kv, c: (kv, c, 0)),
        pl.BlockSpec((slots, 1, groups, superchunk, head_dim), lambda kv, c: (0, kv, 0, c, 0)),
    )


def _call(kernel, operands, in_specs, out_specs, out_shape, scratch, num_chunks, name, vmem_limit, interpret):
    return pl.pallas_call(
        functools.partial(kernel, num_chunks=num_chunks),
        grid=(operands[-1].shape[0], num_chunks),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        name=name,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit << 20
        ),
    )(*operands)


def lift_forward(q_top, k_top, transition, *, key_length: int, vmem_limit: int, interpret=False):
    """Versions of all levels above the superchunk.

    Args:
      q_top: [BK, G, T, H] queries in the frame of their superchunk's start.
      k_top: [BK, T, H] keys in the frame of its end.
      transition: [BK, T / S, H, H] float32, products over whole superchunks.
      key_length: allocated length of the result, >= T.
      vmem_limit: MiB.

    Returns:
      [slots, BK, G, key_length, H] in q_top's dtype; what the quadratic stage never reads is left unwritten.
    """
    num_kv, groups, length, head_dim = q_top.shape
    num_chunks = transition.shape[1]
    superchunk, slots = length // num_chunks, num_slots(num_chunks)
    queries, keys, _ = _specs(groups, superchunk, head_dim, slots)
    scratch = [
        pltpu.VMEM((_level_starts(num_chunks)[-1], head_dim, head_dim), jnp.float32),
        pltpu.VMEM((groups, superchunk, head_dim), q_top.dtype),
        pltpu.VMEM((superchunk, head_dim), q_top.dtype),
        pltpu.VMEM((2, slots, groups, superchunk, head_dim), q_top.dtype),
        pltpu.SemaphoreType.DMA((2, slots)),
        pltpu.SemaphoreType.DMA(()),
    ]
    shape = lanes.result((slots, num_kv, groups, key_length, head_dim), q_top.dtype, q_top)
    return _call(
        _forward_kernel, (q_top, k_top, transition), [queries, keys, _IN_HBM], _IN_HBM, shape, scratch, num_chunks,
        "lift_forward", vmem_limit, interpret,
    )  # fmt: skip


def lift_backward(versions, dversions, transition, *, vmem_limit: int, interpret=False):
    """Cotangents (q_top, k_top, transition) of `lift_forward`, in the dtypes there.

    Args:
      versions, dversions: the result of `lift_forward` and its cotangent.
      transition: [BK, T / S, H, H] float32.
      vmem_limit: MiB.
    """
    slots, num_kv, groups, key_length, head_dim = versions.shape
    num_chunks = transition.shape[1]
    superchunk = key_length // (-(-num_chunks // 2) * 2)
    queries, keys, blocks = _specs(groups, superchunk, head_dim, slots)
    stack = pltpu.VMEM((_level_starts(num_chunks)[-1], head_dim, head_dim), jnp.float32)
    length = num_chunks * superchunk
    shapes = [
        lanes.result((num_kv, groups, length, head_dim), versions.dtype, versions),
        lanes.result((num_kv, length, head_dim), versions.dtype, versions),
        lanes.result(transition.shape, jnp.float32, versions),
    ]
    scratch = [
        stack,
        stack,
        pltpu.VMEM((groups, superchunk, head_dim), jnp.float32),
        pltpu.VMEM((superchunk, head_dim), jnp.float32),
        pltpu.SemaphoreType.DMA(()),
    ]
    return _call(
        _backward_kernel, (versions, dversions, transition), [blocks, blocks, _IN_HBM],
        [queries, keys, _IN_HBM], shapes, scratch, num_chunks, "lift_backward", vmem_limit, interpret,
    )  # fmt: skip
