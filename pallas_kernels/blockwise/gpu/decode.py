"""Attention of a few queries to the closed superchunks of a decode cache, on NVIDIA GPUs: page by page, then merged.

Array code carries the queries from page to page, a chain of small products. Then nothing depends on the page before:
a kernel attends to every part of every page by itself, reading keys, values and gates where they lie in their pools,
and array code merges what it found. Sums of gates from a page to the queries are the same for all keys of the page, so
they are left to the merging.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise.gpu.layout import LEAST, LOG2E
from pallas_kernels.blockwise.pages import Softmax, carried, finite, num_steps
from pallas_kernels.lazily import on_platform

TILE_ROWS = 64  # of queries that a thread block takes at most: what one wgmma takes
TILE_GROUPS = 16  # query heads at most, each with gates of its own
KEYS = 64  # of one step of a kernel; pages hold whole blocks of so many
_MOST_BYTES = 1 << 29  # of what is found in all pages
_MANY_BLOCKS = 2 * 132  # two for every multiprocessor of an H100; there are 108 in an A100


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is static in a call of a kernel."""

    batch: int
    num_kv_heads: int
    num_pages: int  # of a row
    superchunk: int
    num_parts: int  # of a page
    num_versions: int  # of the queries: one per page, or 1
    num_tiles: int  # of query rows of a key head
    num_groups: int  # query heads of a tile
    width: int  # tokens of a query head
    head_dim: int
    v_head_dim: int
    gate_factor: float  # log2 e included
    window: int | None
    interpret: object  # as in Options

    @property
    def rows(self):
        """Of a tile, in units of 8; row `g * width + t` is token t of query head g."""
        return -(-self.num_groups * self.width // 8) * 8

    @property
    def num_steps(self):
        """Steps over the keys of a part."""
        return self.superchunk // KEYS // self.num_parts


def attend_pages(
    name: str, kernel: Callable[[], Callable], q, k, v, products, gate, inside, position, pages, needed, *,
    gate_scale, window, interpret=False,
):  # fmt: skip
    """`pages.attend_pages`, for float32 queries and products.

    Args:
      name: of the implementation.
      kernel: returns `decode_mosaic.attend_parts` or its like; called where it is about to be traced.
      interpret: as in Options.
    """
    arguments = q, k, v, products, gate, inside, position, pages, needed
    function = functools.partial(_attend, kernel, gate_scale, window, interpret)
    if interpret:
        return function(*arguments)
    out = jax.ShapeDtypeStruct((*q.shape[:4], v.shape[3]), q.dtype)
    return on_platform("cuda", name, function, arguments, (out, jax.ShapeDtypeStruct(q.shape[:4], q.dtype)))


def _attend(kernel, gate_scale, window, interpret, q, k, v, products, gate, inside, position, pages, needed):
    def attend(q, inside, position):
        return _attend_tile(
            kernel(), gate_scale, window, interpret, q, k, v, products, gate, inside, position, pages, needed
        )

    # What was found in each page takes memory: not always of all tokens at once.
    width = q.shape[3]
    most = _MOST_BYTES // (4 * v.shape[3] * pages.shape[1] * math.prod(q.shape[:3]))
    num_pieces = -(-width // min(max(most, 1), TILE_ROWS))
    if num_pieces == 1:
        return attend(q, inside, position)
    piece = -(-width // num_pieces)

    def split(x, axis):
        if x is None:
            return None
        x = jnp.pad(x, [(0, num_pieces * piece - width if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], num_pieces, piece, *x.shape[axis + 1 :]), axis, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :width]

    out, lse = jax.lax.map(lambda x: attend(*x), (split(q, 3), split(inside, 3), split(position, 1)))
    return join(out), join(lse)


def _attend_tile(kernel, gate_scale, window, interpret, q, k, v, products, gate, inside, position, pages, needed):
    """Of at most TILE_ROWS tokens."""
    batch, num_kv_heads, groups, width, head_dim = q.shape
    num_pages, superchunk = pages.shape[1], k.shape[2]
    most = min(groups, TILE_GROUPS, TILE_ROWS // width)
    num_groups = max(n for n in range(1, most + 1) if groups % n == 0)
    num_tiles = groups // num_groups
    size = Geometry(
        batch=batch,
        num_kv_heads=num_kv_heads,
        num_pages=num_pages,
        superchunk=superchunk,
        num_parts=_num_parts(superchunk // KEYS, num_tiles * num_kv_heads * num_pages * batch),
        num_versions=1 if products is None else num_pages,
        num_tiles=num_tiles,
        num_groups=num_groups,
        width=width,
        head_dim=head_dim,
        v_head_dim=v.shape[3],
        gate_factor=gate_scale * LOG2E,
        window=window,
        interpret=interpret,
    )
    versions = q[None].astype(k.dtype) if products is None else _versions(q, products, pages, needed, k.dtype)
    rows = versions.reshape(-1, num_groups * width, head_dim)
    rows = jnp.pad(rows, [(0, 0), (0, size.rows - rows.shape[1]), (0, 0)])
    gates = shift = limits = None
    if gate is not None:
        totals = gate[pages, ..., -1]  # [B, P, K, G]
        between = _sums_before(totals)
        shift = gate_scale * (inside + jnp.moveaxis(between, 1, 0)[..., None])  # [P, B, K, G, t]
        gates = gate, totals
    if window is not None:
        limits = jnp.tile((position - window).astype(jnp.int32), (1, num_groups))
        limits = jnp.pad(limits, [(0, 0), (0, TILE_ROWS - limits.shape[1])])
    out, lse = kernel(rows, k, v, gates, limits, pages.astype(jnp.int32), needed.astype(jnp.int32), size)

    def unpack(x):
        """[parts B K tiles, rows, ...] -> [P, parts of a page, B, K, G, t, ...]."""
        x = x[:, : num_groups * width]
        return x.reshape(num_pages, size.num_parts, batch, num_kv_heads, groups, width, *x.shape[2:])

    out, lse = unpack(out), unpack(lse)
    is_there = jnp.moveaxis(needed, 2, 0)[:, None, ..., None, None] & (lse > LEAST)
    lse = lse / LOG2E if shift is None else lse / LOG2E + shift[:, None]
    lse = jnp.where(is_there, lse, -jnp.inf)
    maximum = lse.max((0, 1))
    weights = jnp.exp(lse - finite(maximum))
    # What was not needed was not written either.
    out = (weights[..., None] * jnp.where(is_there[..., None], out, 0)).sum((0, 1))
    return Softmax(maximum, weights.sum((0, 1)), out).result()


def _num_parts(num_blocks, num_pages):
    """Parts into which each page of `num_blocks` x KEYS keys is cut: several where there are few pages in all."""
    choices = [n for n in range(1, max(num_blocks // 2, 1) + 1) if num_blocks % n == 0]
    return next((n for n in choices if n * num_pages >= _MANY_BLOCKS), choices[-1])


def _sums_before(x):
    """Sums over axis 1 of what comes before."""
    return jnp.cumsum(jnp.pad(x[:, :-1], [(0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)]), axis=1)


def _versions(q, products, pages, needed, dtype):
    """Queries in the frame of each page's end [P, B, K, G, t, H]; 0 behind the last page that is needed."""

    def visit(i, carry):
        q, versions = carry
        versions = jax.lax.dynamic_update_index_in_dim(versions, q.astype(dtype), i, axis=0)
        return carried(q, products[pages[:, i]]), versions

    versions = jnp.zeros((pages.shape[1], *q.shape), dtype)
    return jax.lax.fori_loop(0, num_steps(needed), visit, (q, versions))[1]
