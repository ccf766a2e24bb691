"""Products of operands in shared memory, of which some are split into hi + lo of 16 bits each."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def product(shape, *terms):
    """Sum of a @ b over (a, b) in shared memory, float32."""

    def run(accumulator):
        for a, b in terms:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return plgpu.layout_cast(pl.run_scoped(run, plgpu.ACC(shape, jnp.float32)), plgpu.Layout.WGMMA)


def split(refs, x):
    """Writes x as hi + lo."""
    hi, lo = refs
    rounded = x.astype(hi.dtype)
    hi[...] = rounded
    lo[...] = (x - rounded.astype(jnp.float32)).astype(hi.dtype)
    plgpu.commit_smem()


def crossed(a, b):
    """Terms of (a_hi + a_lo) @ (b_hi + b_lo), without what is below their rounding."""
    return (a[0], b[0]), (a[1], b[0]), (a[0], b[1])
