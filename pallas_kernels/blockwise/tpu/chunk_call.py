"""How the two superchunk kernels are called: one grid step per superchunk, each spread over two steps."""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise.tpu import lanes
from pallas_kernels.blockwise.tpu.transform import PAIR


def pad_rows(x):
    """Pads the second last axis of [..., r, 128] with zeros to a whole register tile of 8 rows."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, max(0, 8 - x.shape[-2])), (0, 0)])


@dataclasses.dataclass(frozen=True)
class ChunkGrid:
    """Grid over the superchunks of all key/value heads; a core gets an equal part of their list and one step more.

    A block of lag 0 is that of the step's own superchunk, a block of lag 1 that of the previous one.
    """

    heads: int
    length: int
    superchunk: int
    max_cores: int

    @property
    def num_chunks(self):
        """Superchunks of a head."""
        return self.length // self.superchunk

    @property
    def cores(self):
        """Cores that share the list; 1 if `max_cores` do not divide it."""
        return self.max_cores if self.heads * self.num_chunks % self.max_cores == 0 else 1

    @property
    def per_core(self):
        """Superchunks of a core."""
        return self.heads * self.num_chunks // self.cores

    def by_pair(self, x):
        """[..., T] -> [..., T / S, S / 128, 128], one row per pair."""
        return x.reshape(*x.shape[:-1], self.num_chunks, self.superchunk // PAIR, PAIR)

    def block(self, shape, index, lag):
        """Block of an operand; `index` gets head and superchunk."""

        def block_index(core, step):
            flat = core * self.per_core + jnp.clip(step - lag, 0, self.per_core - 1)
            return index(lax.div(flat, self.num_chunks), lax.rem(flat, self.num_chunks))

        return pl.BlockSpec(shape, block_index)

    def rows(self, width, lag):
        """Block of [BK, T, width]."""
        return self.block((1, self.superchunk, width), lambda h, c: (h, c, 0), lag)

    def grouped_rows(self, group, width, lag):
        """Block of [BK, G, T, width]."""
        return self.block((1, group, self.superchunk, width), lambda h, c: (h, 0, c, 0), lag)

    def matrices(self, rows, columns, lag):
        """Block of [BK, T / S, rows, columns]."""
        return self.block((1, 1, rows, columns), lambda h, c: (h, c, 0, 0), lag)

    def call(self, kernel, inputs, outputs, scratch, *, name, like, vmem_limit, interpret, **parameters):
        """Runs `kernel(*references, names=names, **parameters)`.

        Args:
          kernel: function of the references to inputs, outputs and scratch, in that order.
          inputs: {name: (array, block)}.
          outputs: {name: (shape, dtype, block)}.
          scratch: {name: (shape, dtype)}, in VMEM.
          name: of the kernel.
          like: array whose mesh axes the results vary over.
          vmem_limit: MiB.
          interpret: as in `pallas_call`.
          **parameters: static.

        Returns:
          {name: array} of the outputs.
        """
        results = pl.pallas_call(
            functools.partial(kernel, names=(*inputs, *outputs, *scratch), **parameters),
            grid=(self.cores, self.per_core + 1),
            in_specs=[block for _, block in inputs.values()],
            out_specs=[block for *_, block in outputs.values()],
            out_shape=[lanes.result(shape, dtype, like) for shape, dtype, _ in outputs.values()],
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
            name=name,
            interpret=interpret,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit << 20
            ),
        )(*[x for x, _ in inputs.values()])
        return dict(zip(outputs, results))
