"""Words of the Mosaic GPU kernels: layouts, shared memory, loads, and the one product that interpret mode cannot run.

The kernels need JAX 0.11 or later; import this file only where they are about to run.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.gpu.layout import TILE

HALF = TILE // 2  # rows of one of the two compute warpgroups
MATRIX = plgpu.Layout.WGMMA
ROWS = MATRIX.reduce(1)  # one value per row
COLUMNS = MATRIX.reduce(0)  # one value per column


def swizzled(shape, dtype):
    """Shared memory as wgmma reads it; rows of 64, 128, ... 16-bit numbers, or of half as many 32-bit ones."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def vector(*shape, dtype=jnp.float32):
    """Shared memory without a transform."""
    return plgpu.SMEM(shape, dtype)


def barriers(count, arrivals=1):
    """An array of barriers."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def load(ref, layout, *, optimized=True):
    """Registers in a layout, from shared memory or (optimized=False) global memory."""
    return plgpu.load(ref, layout=layout, optimized=optimized)


def full(shape, value, layout):
    """A constant in a layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along(x, axis, like):
    """Repeats a value per row (axis 0) or per column (axis 1) over the matrix `like`."""
    return jax.lax.broadcast_in_dim(x, like.shape, [axis])


def places(length, start, layout):
    """start, start + 1, ...: positions of the rows (ROWS) or columns (COLUMNS) of a tile."""
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=layout) + start


def hide(x, value, places, window, ids):
    """A tile with `value` where a query does not see a key.

    One condition after the other, each of two vectors: masks and matrices of distances would take registers, the latter
    even between the steps of a loop, and so do positions of columns that are not read from memory.

    Args:
      x: tile of queries and keys.
      value: a number.
      places: positions of queries and of keys, each spread over the tile; None where all keys lie before the queries
        and inside the window.
      window: how many keys a query sees, or None.
      ids: None, or the documents of queries and of keys, each spread over the tile, one of them with `no_padding`.
    """
    if places is not None:
        query, key = places
        x = jnp.where(query >= key, x, value)
        if window is not None:
            x = jnp.where(query - window < key, x, value)
    return x if ids is None else jnp.where(ids[0] == ids[1], x, value)


def no_padding(ids):
    """Documents, with a number in place of 0 that no document has: padding sees nothing and is not seen."""
    return jnp.where(ids > 0, ids, -1)


def await_reuse(barrier):
    """Producer: waits for a free buffer, and orders the ordinary loads from it before the copy that follows."""
    plgpu.barrier_wait(barrier)
    plgpu.commit_smem()


def drain(steps, stages, *arrays):
    """Producer: waits for the last use of every buffer, before the barriers go out of scope."""

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def wait(i):
        for array in arrays:
            plgpu.barrier_wait(array.at[jax.lax.rem(i, int32(stages))])


def int32(x):
    """Scalars of the kernels have 32 bits, whatever `jax_enable_x64` says."""
    return jnp.asarray(x, jnp.int32)


def loop(start, stop, body, carry):
    """`jax.lax.fori_loop` over int32."""
    return jax.lax.fori_loop(int32(start), int32(stop), body, carry)


def accumulate(interpret, *terms):
    """[acc + a @ b for acc, a, b in terms]; acc and a in registers, b in shared memory.

    Interpret mode has neither `run_state` nor products with an operand in registers: there it is an ordinary product.
    This is the only text of the kernels that differs between the two.
    """
    if interpret:
        return [acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32) for acc, a, b in terms]

    def run(refs):
        for ref, (_, a, b) in zip(refs, terms):
            plgpu.wgmma(ref, a, b)

    return pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc, _, _ in terms))


def interpret_mode(mode):
    """`interpret` of Pallas' GPU kernels, for a value of `pallas_kernels.interpret`."""
    return plgpu.InterpretGPUParams() if mode is True else mode or None


def compiler_params():
    """Of all kernels; approx_math: exp2 is the hardware's."""
    return plgpu.CompilerParams(approx_math=True)
