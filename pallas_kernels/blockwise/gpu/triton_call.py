"""The Triton kernels as functions of JAX arrays, with the signatures of the Mosaic ones.

A `Launch` says everything about one launch of a kernel. `attention_forward`, `query_gradient`, `key_gradient` and
`attend_parts` hand theirs to jax-triton; tests hand the same ones to Triton's interpreter. Needs triton, and jax-triton
to run.
"""

import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise.gpu import decode, decode_triton, devices, schedule, triton_kernels
from pallas_kernels.blockwise.gpu.layout import TILE, Geometry

# Triton would write what its own assembler reads; XLA's, which gets to read it, may be older. 8.6: CUDA 12.7.
PTX_VERSION = 86


class Blocks(NamedTuple):
    """How a kernel cuts its work."""

    block_m: int  # queries of a block of logits
    block_n: int  # keys of a block of logits
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """One launch: `kernel[grid](*operands, *results, **constants)` with the warps and stages of `blocks`."""

    kernel: Any
    grid: tuple[int, int, int]
    operands: tuple
    results: tuple[jax.ShapeDtypeStruct, ...]
    constants: dict[str, Any]
    blocks: Blocks


# By compute capability, kernel and head dim: chosen by compiling (what spills no registers or the fewest) until
# `python -m pallas_kernels.benchmark gpu-tune` has timed them. Rows of 8.0 fit into 99 KB of shared memory, which all
# GPUs have from there on, and serve those that have no row of their own.
TABLE = Path(__file__).with_name("blocks.json")
BLOCKS = {(row["capability"], row["kernel"], row["head_dim"]): Blocks(*row["blocks"])
          for row in json.loads(TABLE.read_text())}  # fmt: skip


def blocks_of(kernel: str, size: Geometry, capability: tuple[int, int] | None) -> Blocks:
    """Blocks of a kernel for a call, on GPUs of a compute capability (major, minor); None: unknown."""
    name = "8.0" if capability is None else f"{capability[0]}.{capability[1]}"
    return BLOCKS.get((name, kernel, size.head_dim)) or BLOCKS["8.0", kernel, size.head_dim]


def attention_forward(q, k, v, gate, segment_ids, first_key, partial, size: Geometry):
    """See `forward.attention_forward`."""
    return _call(forward_launch, q, k, v, gate, segment_ids, first_key, partial, size)


def query_gradient(q, k, v, dout, lse, delta, gate, segment_ids, first_key, size: Geometry):
    """See `backward.query_gradient`."""
    return _call(query_launch, q, k, v, dout, lse, delta, gate, segment_ids, first_key, size)


def key_gradient(q, k, v, dout, vectors, gate, segment_ids, last_query, size: Geometry):
    """See `backward.key_gradient`."""
    return _call(key_launch, q, k, v, dout, vectors, gate, segment_ids, last_query, size)


def attend_parts(q, k, v, gates, limits, pages, needed, size: decode.Geometry):
    """See `decode_mosaic.attend_parts`."""
    return _call(parts_launch, q, k, v, gates, limits, pages, needed, size)


def _call(describe, *arguments):
    import jax_triton

    capability = devices.compute_capability()
    launch = describe(*arguments, capability)
    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:
        options = dict(out_type=launch.results, backend_options=dict(ptx_version=PTX_VERSION, enable_fp_fusion=True))
    else:  # jax-triton 0.3, the last for JAX before 0.11
        options = dict(out_shape=launch.results)
    return jax_triton.triton_call(
        *launch.operands,
        kernel=launch.kernel,
        grid=launch.grid,
        name=launch.kernel.__name__,
        num_warps=launch.blocks.num_warps,
        num_stages=launch.blocks.num_stages,
        # Otherwise jax-triton asks the first GPU of this process.
        compute_capability=capability and 10 * capability[0] + capability[1],
        **options,
        **launch.constants,
    )


def forward_launch(q, k, v, gate, segment_ids, first_key, partial, size: Geometry, capability) -> Launch:
    """That of `attention_forward`."""
    rows = schedule.query_rows(size.num_queries, size.num_keys, size.tree, size.window)
    blocks = blocks_of("attention_forward", size, capability)
    operands = _present(
        q, k, v, rows.table, rows.starts, *(gate or [None] * 3), segment_ids, first_key, *(partial or [None] * 2)
    )
    results = (
        jax.ShapeDtypeStruct((size.batch * size.num_queries, TILE, size.num_heads * size.v_head_dim), v.dtype),
        jax.ShapeDtypeStruct((size.batch, size.num_heads, size.num_queries, TILE), jnp.float32),
    )
    grid = size.num_heads, size.num_queries * (TILE // blocks.block_m), size.batch
    constants = _constants(gate, segment_ids, first_key, size, len(rows.table), blocks)
    return Launch(triton_kernels.attention_forward, grid, operands, results, constants, blocks)


def query_launch(q, k, v, dout, lse, delta, gate, segment_ids, first_key, size: Geometry, capability) -> Launch:
    """That of `query_gradient`."""
    table = schedule.query_rows(size.num_queries, size.num_keys, size.tree, size.window).table
    # The longest rows first.
    order = (table[:, 2] - table[:, 3]).argsort(kind="stable").astype("int32")
    blocks = blocks_of("query_gradient", size, capability)
    operands = _present(q, k, v, dout, lse, delta, table, order, *(gate or [None] * 3), segment_ids, first_key)
    results = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((size.batch, size.num_heads, len(table), TILE), jnp.float32),
    )
    grid = size.num_heads, len(table) * (TILE // blocks.block_m), size.batch
    constants = _constants(gate, segment_ids, first_key, size, len(table), blocks)
    return Launch(triton_kernels.query_gradient, grid, operands, results, constants, blocks)


def key_launch(q, k, v, dout, vectors, gate, segment_ids, last_query, size: Geometry, capability) -> Launch:
    """That of `key_gradient`."""
    rows = schedule.key_rows(size.num_queries, size.num_keys, size.tree, size.window)
    blocks = blocks_of("key_gradient", size, capability)
    operands = _present(q, k, v, dout, vectors, rows.table, rows.starts, *(gate or [None] * 3), segment_ids, last_query)
    results = (
        jax.ShapeDtypeStruct(k.shape, k.dtype),
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct((size.batch, size.num_heads, size.num_keys, TILE), jnp.float32),
    )
    grid = size.num_kv_heads, size.num_keys * (TILE // blocks.block_n), size.batch
    constants = _constants(gate, segment_ids, last_query, size, len(rows.table), blocks)
    return Launch(triton_kernels.key_gradient, grid, operands, results, constants, blocks)


def parts_launch(q, k, v, gates, limits, pages, needed, size: decode.Geometry, capability) -> Launch:
    """That of `attend_parts`."""
    power = lambda n: max(16, 1 << (n - 1).bit_length())
    # Chosen by compiling.
    if k.dtype == jnp.float32:
        blocks = Blocks(power(size.rows), 16, 4 if size.rows <= 32 else 8, 2)
    else:
        blocks = Blocks(power(size.rows), 64, 4, 3 if capability == (9, 0) else 2)
    num_parts = size.num_pages * size.num_parts
    num_results = num_parts * size.batch * size.num_kv_heads * size.num_tiles
    results = (
        jax.ShapeDtypeStruct((num_results, size.rows, size.v_head_dim), jnp.float32),
        jax.ShapeDtypeStruct((num_results, size.rows), jnp.float32),
    )
    grid = size.num_kv_heads * size.num_tiles, num_parts, size.batch
    constants = dict(
        GATE=gates is not None,
        WINDOW=limits is not None,
        BATCH=size.batch,
        KV_HEADS=size.num_kv_heads,
        PAGES=size.num_pages,
        SUPERCHUNK=size.superchunk,
        PARTS=size.num_parts,
        VERSIONS=size.num_versions,
        TILES=size.num_tiles,
        GROUPS=size.num_groups,
        WIDTH=size.width,
        ROWS=size.rows,
        MOST_ROWS=decode.TILE_ROWS,
        HEAD_DIM=size.head_dim,
        V_HEAD_DIM=size.v_head_dim,
        GATE_FACTOR=size.gate_factor,
        BLOCK_M=blocks.block_m,
        BLOCK_N=blocks.block_n,
        BLOCK_H=power(size.head_dim),
        BLOCK_V=power(size.v_head_dim),
    )
    operands = _present(q, k, v, *(gates or [None] * 2), limits, pages, needed)
    return Launch(decode_triton.attend_parts, grid, operands, results, constants, blocks)


def _present(*operands):
    """Operands of a kernel, which cannot be None; those that are not there are never read, so any array will do."""
    arrays = [None if x is None else jnp.asarray(x) for x in operands]
    return tuple(arrays[0] if x is None else x for x in arrays)


def _constants(gate, segment_ids, needed, size, num_rows, blocks):
    """Static arguments, the same for all kernels."""
    return dict(
        TREE=size.tree,
        GATE=gate is not None,
        IDS=segment_ids is not None,
        PRUNED=needed is not None,
        WINDOW=size.window or 0,
        BATCH=size.batch,
        HEADS=size.num_heads,
        KV_HEADS=size.num_kv_heads,
        QUERIES=size.num_queries,
        KEYS=size.num_keys,
        ROWS=num_rows,
        HEAD_DIM=size.head_dim,
        V_HEAD_DIM=size.v_head_dim,
        SCALE=size.logit_scale,
        BLOCK_M=blocks.block_m,
        BLOCK_N=blocks.block_n,
    )
