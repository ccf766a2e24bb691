"""What the kernels of the quadratic stage, forward and backward, share: their switches and the choice of masks."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.blockwise.tpu import schedule


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Static switches of the kernels of the quadratic stage."""

    superchunk: int  # tokens S per superchunk
    keys: int  # keys per inner step, a divisor of S
    num_queries: int  # superchunks of queries
    num_keys: int  # superchunks of keys
    tree: bool  # operands come from the frame tree
    logit_scale: float  # base-2 logit of a unit dot product
    window: int | None = None
    vmem_limit: int = 64  # MiB
    interpret: object = False  # as in `pallas_call`
    apart: bool = False  # the queries come after all keys, instead of being their last superchunks; see `schedule`

    @property
    def offset(self):
        """Position of the first superchunk of queries, counted from the first one of keys."""
        return self.num_keys if self.apart else self.num_keys - self.num_queries

    @property
    def has_diagonal(self):
        """Whether queries meet keys of their own superchunk here."""
        return not self.tree and not self.apart


class Gate(NamedTuple):
    """Sums of the log gate over parts of a superchunk, in the logits' units before `Tiling.logit_scale`."""

    inside: Float[Array, "BK G T"] | None  # from the superchunk's start up to and including the token
    tail: Float[Array, "BK G T"]  # from after the token to the superchunk's end
    totals: Float[Array, "BN num_keys"]  # whole superchunks


class Segments(NamedTuple):
    """Segment ids, 0 = padding."""

    ids: Int[Array, "B 1 T"]
    uniform: Int[Array, "B num_keys"]  # the superchunk's id if all its tokens share it, else 0


def when_masks_matter(condition, body, *, tiling, flags, query, block, uniform):
    """Runs `body(masked)` in a kernel if the condition holds, with masks only where some pair of the tile is invisible.

    Args:
      condition: traced bool.
      body: function of a static bool.
      tiling, flags, query, block: the kernel's switches and the fields of its step.
      uniform: reference `Segments.uniform` or None.
    """
    if uniform is None and tiling.window is None:
        pl.when(condition)(lambda: body(False))
        return
    masked = flags & schedule.EDGE != 0
    if uniform is not None:
        batch = pl.program_id(0) // (pl.num_programs(0) // uniform.shape[0])
        own = uniform[batch, query + tiling.offset]
        same = (uniform[batch, 2 * block] == own) & (uniform[batch, 2 * block + 1] == own)
        masked = masked | (own <= 0) | jnp.logical_not(same)
    pl.when(condition & masked)(lambda: body(True))
    pl.when(condition & jnp.logical_not(masked))(lambda: body(False))
