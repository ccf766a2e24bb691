"""How far back each superchunk of queries must look: documents and pruning, as data that the kernels prefetch.

Both ask `pruning.py` about every pair of superchunks and keep the farthest that is needed, so that one number per
superchunk and head bounds the steps. What lies nearer is computed, needed or not, and masked.
"""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.blockwise import pruning
from pallas_kernels.blockwise.tpu import layout, schedule
from pallas_kernels.blockwise.tpu.arithmetic import LOG2E
from pallas_kernels.blockwise.tpu.tiling import Tiling
from pallas_kernels.call import Inputs, Options


def first_block(options: Options, inputs: Inputs, size: layout.Geometry, tiling: Tiling, gate, segments):
    """First key block that each superchunk of queries needs, int32 [B N, num_queries]; None when all are."""
    if segments is None and options.prune_mass is None:
        return None
    offset = size.num_keys - size.num_queries
    pairs = [(a, b) for a in range(size.num_queries) for b in range(a + offset)]
    pairs = np.array(pairs, np.int32).reshape(-1, 2)
    needed = jnp.ones((len(pairs), size.batch, size.num_heads), bool)
    if segments is not None:
        ids = segments.ids.reshape(size.batch, -1, size.superchunk)
        needed &= pruning.documents_overlap(jnp.moveaxis(ids, 1, 0), pairs, offset)[:, :, None]
    if options.prune_mass is not None:
        needed &= _carries_mass(options, inputs, size, tiling, gate, pairs, offset)
    own = (np.arange(size.num_queries) + offset) >> 1
    blocks = jnp.where(needed, pairs[:, 1, None, None] >> 1, own[-1])
    first = jnp.broadcast_to(own[:, None, None], (size.num_queries, *needed.shape[1:]))
    first = first.at[pairs[:, 0]].min(blocks)
    return jnp.moveaxis(first, 0, -1).reshape(-1, size.num_queries).astype(jnp.int32)


def last_step(tiling: Tiling, first):
    """The forward step at which a superchunk of queries reaches its first key block, int32 [B N, num_queries]."""
    steps = schedule.forward_steps(tiling.num_queries, tiling.num_keys, tiling.superchunk, tiling.tree, tiling.window)
    starts = np.searchsorted(steps[:, schedule.QUERY], np.arange(tiling.num_queries))
    ends = np.append(starts[1:], len(steps)) - 1  # where a window stops before the bound does
    steps_back = steps[starts, schedule.BLOCK] - first
    return jnp.minimum(starts + steps_back, ends).astype(jnp.int32)


def _carries_mass(options, inputs, size, tiling, gate, pairs, offset):
    """Mask [pairs, B, N]."""

    def largest_norms(x, before, num_chunks):
        x = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
        x = layout.pad(x, 1, before, num_chunks * size.superchunk)
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, size.superchunk, -1).max(2), 1, 0)

    heads = (size.batch, size.num_kv_heads, -1)
    query = largest_norms(inputs.q, size.front, size.num_queries).reshape(size.num_queries, *heads)
    norms = pruning.Norms(query, largest_norms(inputs.k, 0, size.key_length // size.superchunk))
    unit = tiling.logit_scale / LOG2E  # of the gate's sums, in natural logarithms
    between = pruning.gate_between(unit * gate.totals.T, pairs, offset)
    starts = unit * gate.inside.reshape(*gate.totals.shape, size.superchunk)[..., 0].T
    needed = pruning.carries_mass(
        norms,
        pairs,
        offset,
        scale=options.scale,
        largest_gate=(between + starts[pairs[:, 0] + offset]).reshape(len(pairs), *heads),
        mass=options.prune_mass,
        num_keys=size.key_length,
    )
    return needed.reshape(len(pairs), size.batch, -1)
