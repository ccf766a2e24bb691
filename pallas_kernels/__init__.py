"""Attention kernels for PaTH, PaTH-FoX and the Forgetting Transformer; importable alone (jax, jaxtyping, numpy).

Axis legend, the same letters everywhere:

    B batch            T query length      S key length        N query heads      K key/value heads
    G = N // K         H head dim of q, k, w                   Hv head dim of v
    C tile size (tokens per tile of the quadratic stage)       U block size of the UT transform

Public arrays are ordered `B T N H`. Inside, arrays are tile-major (`tiles B K G C H`), so that one tile is one
contiguous slice. Log-space values are natural logarithms and start with `log_`; cotangents start with `d`.
"""

from pallas_kernels.attention_weights import attention_weights, weighted_values
from pallas_kernels.cache import init_cache
from pallas_kernels.decode import extend
from pallas_kernels.dispatch import explain
from pallas_kernels.forgetting_attention import forgetting_attention
from pallas_kernels.householder import householder_transform
from pallas_kernels.interpreter import interpret
from pallas_kernels.page_pool import PagePool
from pallas_kernels.path_attention import path_attention

__all__ = [
    "PagePool",
    "attention_weights",
    "explain",
    "extend",
    "forgetting_attention",
    "householder_transform",
    "init_cache",
    "interpret",
    "path_attention",
    "weighted_values",
]
