"""Scans over chunks of a sequence for recurrences that have a product form within a chunk."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from path_jax.nn.layers import document_index


class Chunk(NamedTuple):
    """Which of a chunk's C tokens meet each other and the state."""

    visible: Bool[Array, "B C C"]  # token t sees token s: of its document, not later, and there
    reads: Bool[Array, "B C"]  # the state before the chunk is of token t's document
    writes: Bool[Array, "B C"]  # token s is there and of the document that is open after the chunk
    keeps: Bool[Array, "B"]  # that document was open before the chunk
    count: Int[Array, "B"]  # how many tokens are there; they come first


def scan_chunks(step: Callable, state, inputs: tuple, *, segment_ids, lengths, chunk_size: int):
    """Applies `step(state, chunk, *inputs) -> (state, outputs)` to one chunk after the other.

    The backward pass recomputes what lies within a chunk.

    Args:
      step: gets and returns arrays [B, C, ...].
      state: before the first token, of the document of the first token.
      inputs: arrays [B, T, ...].
      segment_ids: int [B, T] or None, one document per row.
      lengths: int [B], how many tokens of a row are there, or None for all. The others do not reach the state.
      chunk_size: C; of the last chunk the tokens that are missing are zeros.

    Returns:
      The last state and the outputs [B, T, ...].
    """
    batch, length = inputs[0].shape[:2]
    size = min(chunk_size, length)
    num_chunks = -(-length // size)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, num_chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, num_chunks, size, *x.shape[2:]), 1, 0)

    lengths = jnp.full(batch, length) if lengths is None else lengths
    counts = jnp.clip(lengths - size * jnp.arange(num_chunks)[:, None], 0, size)
    ids = split(jnp.ones((batch, length), jnp.int32) if segment_ids is None else document_index(segment_ids))
    ids_before = jnp.concatenate([ids[:1, :, 0], ids[:-1, :, -1]])

    def visit(state, chunk_inputs):
        ids, before, count, inputs = chunk_inputs
        is_there = jnp.arange(size) < count[:, None]
        open_id = jnp.take_along_axis(ids, jnp.maximum(count - 1, 0)[:, None], axis=1)
        same = ids[:, :, None] == ids[:, None, :]
        chunk = Chunk(
            visible=same & is_there[:, None, :] & jnp.tri(size, dtype=bool),
            reads=ids == before[:, None],
            writes=is_there & (ids == open_id),
            keeps=open_id[:, 0] == before,
            count=count,
        )
        return step(state, chunk, *inputs)

    # Within a scan nothing is shared with the forward pass anyway.
    visit = jax.checkpoint(visit, prevent_cse=False)
    state, outputs = jax.lax.scan(visit, state, (ids, ids_before, counts, tuple(map(split, inputs))))
    merge = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, num_chunks * size, *x.shape[3:])[:, :length]
    return state, jax.tree.map(merge, outputs)
