"""PaTH's linear stage on Hopper: the kernels of its two directions, and the products between them as array code."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise.gpu import layout, tree
from pallas_kernels.blockwise.gpu.layout import TILE, Geometry
from pallas_kernels.call import Inputs

_HALF = TILE // 2


class Versions(NamedTuple):
    """Level-indexed operands of the quadratic stage, and what they came from."""

    q: jax.Array | None  # None where there is one tile
    k: jax.Array | None
    transition: jax.Array  # products over tiles [B tiles, K H, H]
    nodes: jax.Array | None  # products over the segments of the tree


def run_tiles(kernels, inputs: Inputs, inside, ids, size: Geometry, cotangents=None):
    """Versions of queries and keys, and what else `tile_forward` returns."""
    operands = (layout.key_tiles(x) for x in (inputs.q, inputs.k, inputs.v, inputs.w))
    beta = layout.rows_of_heads(inputs.beta.astype(jnp.float32))
    q, k, transition, *rest = kernels.tile_forward(*operands, beta, inside, ids, size, cotangents)
    if size.num_keys == 1:
        return Versions(None, None, transition, None), rest
    nodes = tree.nodes(transition, size)
    q, k = (kernels.lift_forward(x, nodes, size, keys=keys) for x, keys in ((q, False), (k, True)))
    return Versions(q, k, transition, nodes), rest


class Gradient(NamedTuple):
    """Cotangents of the inputs, and what the attention inside tiles adds to others."""

    q: jax.Array  # [B, T, N, H]
    k: jax.Array
    w: jax.Array
    beta: jax.Array
    v: jax.Array  # float32 [B tiles, 128, K Hv], by queries of the same tile
    row_sums: jax.Array  # of the logits' cotangents inside tiles [B, N, tiles, 128]
    column_sums: jax.Array


def gradient(kernels, inputs: Inputs, versions: Versions, kept, dq, dk, size: Geometry, scale: float) -> Gradient:
    """Backward pass.

    Args:
      kept: of `tile_forward`.
      dq, dk: cotangents of the versions, like them; ignored where there is one tile.
      scale: of the logits.
    """
    dtype, group = inputs.q.dtype, size.num_heads // size.num_kv_heads
    q_tiles, k_tiles, w_tiles = (layout.key_tiles(x) for x in (inputs.q, inputs.k, inputs.w))
    if size.num_keys == 1:
        dq, dk, dtransition = (jnp.zeros_like(x) for x in (q_tiles, k_tiles, versions.transition))
    else:
        # In float32, like what comes back: 16-bit nodes would take 16-bit cotangents.
        _, pull_back = jax.vjp(lambda x: tree.nodes(x, size), versions.transition.astype(jnp.float32))
        carried_q, dq = kernels.lift_backward(dq, versions.nodes, size, keys=False)
        carried_k, dk = kernels.lift_backward(dk, versions.nodes, size, keys=True)
        dnodes = kernels.node_gradient(versions.q, carried_q, versions.k, carried_k, size)
        (dtransition,) = pull_back(dnodes)

    # Block 1 behind block 0: q -> q P0, k -> k P1^T, P = P1 P0, and logits between them. Tile t, tokens i and j, key
    # head k, query head g of its group, a, b, c along the head.
    blocks = lambda x: x.reshape(len(x), 2, _HALF, size.num_kv_heads, -1, size.head_dim)
    matrices = lambda x: x.reshape(*x.shape[:-2], size.num_kv_heads, size.head_dim, size.head_dim)
    by_head = lambda x: x.reshape(len(x), size.num_kv_heads, group, _HALF, _HALF)
    total = lambda *terms: sum(tree.einsum(size, *term) for term in terms).astype(dtype)
    dlogits = (kept.dlogits.astype(jnp.float32) * scale).astype(dtype)
    q_inner, k_inner = blocks_of(kept.q_inner, size), blocks_of(kept.k_inner, size)[:, :, :, 0]
    p, dp, across = matrices(kept.products), matrices(dtransition.astype(dtype)), by_head(dlogits[:, 2])
    dq, dk = blocks(dq), blocks(dk)[:, :, :, :, 0]
    dq1 = total(("tikgb,tkab->tikga", dq[:, 1], p[:, 0]), ("tkgij,tjka->tikga", across, k_inner))
    dk0 = total(("tjka,tkab->tjkb", dk[:, 0], p[:, 1]), ("tkgij,tikga->tjka", across, q_inner))
    dp0 = total(("tikga,tikgb->tkab", q_inner, dq[:, 1]), ("tkca,tkcb->tkab", p[:, 1], dp))
    dp1 = total(("tjka,tjkb->tkab", dk[:, 0], k_inner), ("tkac,tkbc->tkab", dp, p[:, 0]))
    dq, dk = jnp.stack([dq[:, 0], dq1], 1), jnp.stack([dk0, dk[:, 1]], 1)

    halves = lambda x: x.reshape(-1, _HALF, x.shape[-1])
    flat = lambda x: x.reshape(2 * len(x), _HALF, -1)
    own = dlogits[:, :2]
    beta = layout.rows_of_heads(inputs.beta.astype(jnp.float32))
    dq_tiles, rest, dw, dbeta = kernels.block_backward(
        halves(q_tiles), halves(k_tiles), halves(w_tiles), beta.reshape(*beta.shape[:2], -1, _HALF),
        kept.inverse.reshape(-1, *kept.inverse.shape[2:]), flat(dq), flat(dk),
        jnp.stack([dp0, dp1], 1).reshape(2 * len(p), -1, size.head_dim),
        own.reshape(-1, *own.shape[2:]), size,
    )  # fmt: skip
    by_block = own.reshape(len(own), 2, size.num_kv_heads, group, _HALF, _HALF)
    dk = dk.astype(jnp.float32) + rest.reshape(dk.shape)
    dk += tree.einsum(size, "tskgij,tsikga->tsjka", by_block, blocks(q_tiles))
    tokens = lambda x, num_heads, head_dim: layout.from_tiles(
        x.reshape(-1, TILE, x.shape[-1]), size.batch, 0, inputs.q.shape[1], num_heads, head_dim
    )
    head_dim = inputs.q.shape[3]
    length = inputs.beta.shape[1]
    row_sums, column_sums = _sums(kept.dlogits.astype(jnp.float32), size)
    dv = kept.dv.reshape(len(p), TILE, size.num_kv_heads, group, size.v_head_dim).sum(3)
    return Gradient(
        tokens(dq_tiles, size.num_heads, head_dim),
        tokens(flat(dk), size.num_kv_heads, head_dim).astype(inputs.k.dtype),
        tokens(dw, size.num_kv_heads, head_dim).astype(inputs.w.dtype),
        dbeta.reshape(*dbeta.shape[:2], -1)[:, :, :length].swapaxes(1, 2).astype(inputs.beta.dtype),
        dv.reshape(len(p), TILE, -1),
        row_sums,
        column_sums,
    )


def blocks_of(x, size: Geometry):
    """[B tiles, 64, heads H] -> [B tiles, 64, K, heads / K, H]."""
    return x.reshape(len(x), _HALF, size.num_kv_heads, -1, size.head_dim)


def _sums(dlogits, size):
    """Sums over keys and over queries of cotangents [B tiles, 3, N, 64, 64], both [B, N, tiles, 128]."""
    first, second, across = (dlogits[:, i] for i in range(3))
    rows = jnp.concatenate([first.sum(-1), (second + across).sum(-1)], -1)
    columns = jnp.concatenate([(first + across).sum(-2), second.sum(-2)], -1)
    return tuple(x.reshape(size.batch, size.num_keys, size.num_heads, TILE).swapaxes(1, 2) for x in (rows, columns))
