"""Sequence mixers, one contract.

    mixer(x: [B, T, D], *, positions=None [B, T], segment_ids=None [B, T], cache=None, lengths=None [B])
        -> (y: [B, T, D], cache)

Documents of a packed sequence (segment_ids) do not see each other. `cache=None` is training and full forward passes.
With the cache that `mixer.init_state(batch, max_length, embed_dim)` made or the last call returned, the call appends T
tokens to every row, or the first `lengths[b]` of them to row b: prefill, chunks and single steps are one call.
"""

import functools

from path_jax.mixers.attention import ForgettingAttention
from path_jax.mixers.base_conv import BaseConv
from path_jax.mixers.based import Based
from path_jax.mixers.deltanet import DeltaNet
from path_jax.mixers.h3 import H3
from path_jax.mixers.hyena import Hyena
from path_jax.mixers.mamba import Mamba
from path_jax.mixers.path_attention import PathAttention
from path_jax.mixers.stick_breaking import StickBreakingAttention

MIXERS = {
    "path": PathAttention,
    "path_fox": functools.partial(PathAttention, forget_gate=True),
    "fox": ForgettingAttention,
    "rope": functools.partial(ForgettingAttention, gate="none", rope_theta=10000.0),
    "nope": functools.partial(ForgettingAttention, gate="none"),
    "stick_breaking": StickBreakingAttention,
    "deltanet": DeltaNet,
    "mamba": Mamba,
    "based": Based,
    "h3": H3,
    "hyena": Hyena,
    "base_conv": BaseConv,
}

__all__ = [
    "MIXERS",
    "BaseConv",
    "Based",
    "DeltaNet",
    "ForgettingAttention",
    "H3",
    "Hyena",
    "Mamba",
    "PathAttention",
    "StickBreakingAttention",
]
