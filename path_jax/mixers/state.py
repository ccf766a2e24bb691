"""What mixers keep between calls when they decode: attention kernels a cache of pages, the others plain arrays."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import PagePool
from pallas_kernels.cache import Cache
from path_jax.parallel.attention import init_cache


class State(NamedTuple):
    """One layer's state; row b of every array belongs to row b of the batch, but for pages of the cache's pool."""

    attention: Cache
    history: Mapping[str, Array]  # name of a short convolution or shift: its last inputs [B, W, ...]

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens seen."""
        return self.attention.length


class RecurrentState(NamedTuple):
    """One layer's state where no attention cache is kept; row b of every array belongs to row b of the batch."""

    length: Int[Array, "B"]  # tokens seen
    history: Mapping[str, Array]  # name of a short convolution or shift: its last inputs [B, W, ...]
    memory: Mapping[str, Array]  # name: what a recurrence carries [B, ...]


def init_state(
    batch: int, max_length: int, *, histories: Mapping[str, tuple[int, ...]], dtype, **cache_options
) -> State:
    """State before the first token.

    Args:
      histories: shape [W, ...] of each history.
      dtype: of keys, values and histories.
      **cache_options: see `pallas_kernels.init_cache`.
    """
    dtype = jnp.float32 if dtype is None else dtype
    history = {name: jnp.zeros((batch, *shape), dtype) for name, shape in histories.items()}
    return State(init_cache(batch, max_length, dtype=dtype, **cache_options), history)


def init_recurrent_state(
    batch: int,
    *,
    histories: Mapping[str, tuple[int, ...]],
    memories: Mapping[str, tuple[int, ...]],
    dtype=None,
    superchunk: int | None = None,
    num_pages: int | None = None,
) -> RecurrentState:
    """State before the first token, all zeros.

    Args:
      batch: rows B.
      histories: shape [W, ...] of each history, of `dtype`, float32 by default.
      memories: shape [...] of each memory, of float32 at least.
      dtype: see above.
      superchunk: tokens per page of a cache; of no meaning here.
      num_pages: must be None.

    Raises:
      ValueError: for a number of pages.
    """
    del superchunk
    if num_pages is not None:
        raise ValueError(f"{num_pages=}: the state of this mixer has no pages")
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    zeros = lambda shapes, dtype: {name: jnp.zeros((batch, *shape), dtype) for name, shape in shapes.items()}
    wide = jnp.promote_types(dtype, jnp.float32)
    return RecurrentState(jnp.zeros(batch, jnp.int32), zeros(histories, dtype), zeros(memories, wide))


def lengths_of(
    x: Float[Array, "B T D"], state: State | RecurrentState | None, segment_ids, lengths
) -> Int[Array, "B"] | None:
    """How many of each row's tokens a call with a state appends: `lengths`, or all; None for a call without one.

    Raises:
      ValueError: where packed documents meet a state, or lengths do without.
    """
    if state is None:
        if lengths is not None:
            raise ValueError("lengths belong to a cache; without one, padding has segment id 0")
        return None
    if segment_ids is not None:
        raise ValueError("with a cache every row is one document: pass lengths instead of segment_ids")
    return jnp.full(x.shape[0], x.shape[1], jnp.int32) if lengths is None else lengths


def take_rows(state: State | RecurrentState, rows: Int[Array, "R"]) -> State | RecurrentState:
    """The state of some rows, each at most once; a row B, past the last one, is an empty one that keeps nothing.

    Pages stay where they are, so that this copies what rows have besides: open superchunks, histories, memories.
    """
    take = lambda x, fill=0: jnp.take(x, rows, axis=0, mode="fill", fill_value=fill)
    if isinstance(state, RecurrentState):
        return jax.tree.map(take, state)
    cache = state.attention
    table = take(cache.table, len(cache.k))  # a page past the pool: writes are dropped
    cache = cache._replace(length=take(cache.length), table=table, open=jax.tree.map(take, cache.open))
    return State(cache, jax.tree.map(take, state.history))


def put_rows(
    state: State | RecurrentState, part: State | RecurrentState, rows: Int[Array, "R"]
) -> State | RecurrentState:
    """The state after `part`, made by `take_rows` with these rows, has gone on."""
    put = lambda x, new: x.at[rows].set(new, mode="drop")
    if isinstance(state, RecurrentState):
        return jax.tree.map(put, state, part)
    cache, new = state.attention, part.attention
    cache = new._replace(
        length=put(cache.length, new.length), table=cache.table, open=jax.tree.map(put, cache.open, new.open)
    )
    return State(cache, jax.tree.map(put, state.history, part.history))


class StatePages:
    """`pallas_kernels.PagePool` for a whole state: histories follow their rows. Errors are those of the pool."""

    def __init__(self, state: State):
        """For a state without tokens whose cache has `num_pages`.

        Raises:
          ValueError: for a mixer that keeps no pages.
        """
        if isinstance(state, RecurrentState):
            raise ValueError("the state of this mixer has no pages to share")
        self._pool = PagePool(state.attention)

    @property
    def num_used(self) -> int:
        """Pages that some row uses."""
        return self._pool.num_used

    @property
    def num_free(self) -> int:
        """Pages that no row uses."""
        return self._pool.num_free

    def reserve(self, state: State, new_tokens) -> State:
        """Pages for `new_tokens` more tokens per row, an int or one per row."""
        return state._replace(attention=self._pool.reserve(state.attention, new_tokens))

    def fork(self, state: State, parent: int, child: int) -> State:
        """Makes the empty row `child` a copy of row `parent` that shares its full pages."""
        history = jax.tree.map(lambda x: x.at[child].set(x[parent]), state.history)
        return State(self._pool.fork(state.attention, parent, child), history)

    def release(self, state: State, row: int) -> State:
        """Empties a row; pages that nobody else uses become free."""
        history = jax.tree.map(lambda x: x.at[row].set(0), state.history)
        return State(self._pool.release(state.attention, row), history)
