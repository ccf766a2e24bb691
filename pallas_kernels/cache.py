"""The decode cache: keys, values and gates of a batch of growing sequences, in pages of a shared pool.

A page holds one superchunk of S tokens. Row b finds its superchunk c in page `table[b, c]` of the pool; rows may share
pages. A key of PaTH attention is written three times: on arrival, raw, to the open block; when its block of 64 closes,
in the frame of the block's end, to the open superchunk; when its superchunk closes, in the frame of the superchunk's
end, to its page. After that its bytes never change. Plain keys (FoX) go to their page at once.

With row vectors, `H_t = I - beta_t w_t^T w_t`, and P = H_last ... H_first over a block or superchunk: a query carried
back from the end of a superchunk to its start is `q P`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.householder import BLOCK_SIZE

SUPERCHUNK = 1024


class OpenSuperchunk(NamedTuple):
    """What PaTH attention keeps per row of the superchunk that is being filled, at least float32."""

    k: Array  # [B, K, U, H], raw keys of the open block; entries past the row's length are left over
    w: Array  # [B, K, U, H]
    beta: Array  # [B, K, U]
    block_k: Array  # [B, K, S, H], keys of closed blocks, in the frame of their block's end
    block_products: Array  # [B, K, blocks, H, H], P of closed blocks


class Cache(NamedTuple):
    """See the module's text. All arrays; under `jax.jit` donate the cache so that `extend` writes in place."""

    length: Array  # [B], tokens seen
    table: Array  # [B, max_pages]
    k: Array  # [pool, K, S, H]
    v: Array  # [pool, K, S, Hv]
    key_norm: Array  # [pool, K], largest norm of the keys of a page, as given
    gate: Array | None  # [pool, N, S], sums of log_forget since the page's start, inclusive
    products: Array | None  # [pool, K, H, H], P of closed superchunks
    open: OpenSuperchunk | None

    @property
    def superchunk(self) -> int:
        """Tokens per page."""
        return self.k.shape[2]

    @property
    def max_length(self) -> int:
        """Tokens a row can hold."""
        return self.table.shape[1] * self.superchunk


def init_cache(
    batch: int,
    max_length: int,
    *,
    num_kv_heads: int,
    num_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype=jnp.bfloat16,
    forget: bool = False,
    path: bool = True,
    superchunk: int | None = None,
    num_pages: int | None = None,
) -> Cache:
    """An empty cache.

    Args:
      batch: rows B.
      max_length: tokens a row can hold at least; rounded up to whole pages.
      num_kv_heads, num_heads, head_dim, v_head_dim: K, N, H and Hv (H by default).
      dtype: of closed keys and of values.
      forget: calls will have log_forget (FoX, PaTH-FoX).
      path: calls will have w and beta (PaTH, PaTH-FoX).
      superchunk: tokens per page S, a multiple of 64; by default 1024, or less where max_length is.
      num_pages: pages of the pool. By default each row owns its pages, pages b * max_pages ... of row b. With a number,
        no row owns any page yet and a `PagePool` hands them out.

    Raises:
      ValueError: for sizes that do not fit.
    """
    for name, value in (("batch", batch), ("max_length", max_length), ("head_dim", head_dim)):
        if value < 1:
            raise ValueError(f"{name}={value} must be positive")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads=} is not a multiple of {num_kv_heads=}")
    if superchunk is None:
        superchunk = min(SUPERCHUNK, -(-max_length // BLOCK_SIZE) * BLOCK_SIZE)
    if superchunk < 1 or superchunk % BLOCK_SIZE:
        raise ValueError(f"{superchunk=} must be a positive multiple of {BLOCK_SIZE}")
    max_pages = -(-max_length // superchunk)
    owned = np.arange(batch * max_pages, dtype=np.int32).reshape(batch, max_pages)
    table = owned if num_pages is None else np.full_like(owned, num_pages)  # a page past the pool: writes are dropped
    pool = owned.size if num_pages is None else num_pages
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    state_dtype = jnp.promote_types(jnp.float32, dtype)
    pages = lambda *shape, dtype=state_dtype: jnp.zeros((pool, *shape), dtype)
    rows = lambda *shape: jnp.zeros((batch, num_kv_heads, *shape), state_dtype)
    return Cache(
        length=jnp.zeros(batch, jnp.int32),
        table=jnp.asarray(table),
        k=pages(num_kv_heads, superchunk, head_dim, dtype=dtype),
        v=pages(num_kv_heads, superchunk, v_head_dim, dtype=dtype),
        key_norm=pages(num_kv_heads),
        gate=pages(num_heads, superchunk) if forget else None,
        products=pages(num_kv_heads, head_dim, head_dim) if path else None,
        open=OpenSuperchunk(
            k=rows(BLOCK_SIZE, head_dim),
            w=rows(BLOCK_SIZE, head_dim),
            beta=rows(BLOCK_SIZE),
            block_k=rows(superchunk, head_dim),
            block_products=rows(superchunk // BLOCK_SIZE, head_dim, head_dim),
        )
        if path
        else None,
    )
