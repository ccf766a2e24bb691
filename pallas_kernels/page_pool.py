"""Hands out the pages of a cache's pool, on the host, between calls of `extend`: growth, sharing, forks, release."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cache import Cache


class PagePool:
    """Who uses which page of a cache made with `init_cache(..., num_pages=P)`.

        pool = PagePool(cache)
        cache = pool.reserve(cache, 2048)                  # pages for 2048 more tokens in every row ...
        cache = pool.reserve(cache, [2048, 0])             # ... or in some
        o, cache = extend(cache, ...)
        cache = pool.fork(cache, 0, 1)                     # row 1 goes on from row 0 and shares its full pages
        cache = pool.release(cache, 0)                     # row 0 starts anew; what row 1 shares stays

    Methods return a cache that takes the place of their argument, which they may consume. Tables live in the cache; a
    pool counts the rows that use each page.
    """

    def __init__(self, cache: Cache):
        """For a cache without tokens whose rows own no pages yet.

        Raises:
          ValueError: if its rows own pages.
        """
        self._num_users = np.zeros(cache.k.shape[0], np.int64)
        if (np.asarray(cache.table) < len(self._num_users)).any():
            raise ValueError("the rows of this cache own their pages; make it with init_cache(..., num_pages=...)")

    @property
    def num_used(self) -> int:
        """Pages that some row uses."""
        return int((self._num_users > 0).sum())

    @property
    def num_free(self) -> int:
        """Pages that no row uses."""
        return len(self._num_users) - self.num_used

    def reserve(self, cache: Cache, new_tokens) -> Cache:
        """Pages for `new_tokens` more tokens per row, an int or one per row.

        Raises:
          ValueError: if a row would outgrow the cache or the pool has too few pages; nothing changes then.
        """
        table, lengths = np.array(cache.table), np.asarray(cache.length)
        needed = -(-(lengths + np.asarray(new_tokens)) // cache.superchunk)
        if (needed > table.shape[1]).any():
            raise ValueError(f"{new_tokens} more tokens outgrow {cache.max_length}, the rows have {lengths.tolist()}")
        is_missing = (np.arange(table.shape[1]) < needed[:, None]) & (table == len(self._num_users))
        table[is_missing] = self._take(int(is_missing.sum()))
        return cache._replace(table=jnp.asarray(table))

    def fork(self, cache: Cache, parent: int, child: int, length: int | None = None) -> Cache:
        """Makes row `child`, which must be empty, a copy of row `parent`.

        Full pages are shared. The page that is being filled is copied, so neither row sees what the other appends.

        Args:
          length: take the first `length` tokens only, whole pages of them; all by default.

        Raises:
          ValueError: if the child has tokens, for an impossible length, or if the pool is exhausted.
        """
        lengths, table = np.asarray(cache.length), np.array(cache.table)
        if lengths[child] or parent == child:
            raise ValueError(f"row {child} is not empty; release it first")
        if length is None:
            length = int(lengths[parent])
        elif not 0 <= length <= lengths[parent] or length % cache.superchunk:
            raise ValueError(f"{length=} must be a multiple of {cache.superchunk} up to {lengths[parent]}")
        self._give(table[child])
        num_shared = length // cache.superchunk
        shared = table[parent, :num_shared]
        table[child] = len(self._num_users)
        table[child, :num_shared] = shared
        source = copy = 0  # a page onto itself
        if length % cache.superchunk:
            source, copy = table[parent, num_shared], self._take(1)[0]
            table[child, num_shared] = copy
        self._num_users[shared] += 1
        cache = cache._replace(table=jnp.asarray(table))
        return _copy_row(cache, parent, child, int(source), int(copy), length)

    def release(self, cache: Cache, row: int) -> Cache:
        """Empties a row; pages that nobody else uses become free."""
        table = np.array(cache.table)
        self._give(table[row])
        table[row] = len(self._num_users)
        return cache._replace(table=jnp.asarray(table), length=cache.length.at[row].set(0))

    def _take(self, count):
        free = np.flatnonzero(self._num_users == 0)[:count]
        if len(free) < count:
            raise ValueError(f"{count} pages are needed and {len(free)} of {len(self._num_users)} are free")
        self._num_users[free] = 1
        return free

    def _give(self, pages):
        self._num_users[pages[pages < len(self._num_users)]] -= 1


@functools.partial(jax.jit, donate_argnums=0)
def _copy_row(cache, parent, child, source, copy, length):
    pages = lambda pool: pool if pool is None else pool.at[copy].set(pool[source])
    rows = lambda x: x.at[child].set(x[parent])
    return cache._replace(
        length=cache.length.at[child].set(length),
        k=pages(cache.k),
        v=pages(cache.v),
        key_norm=pages(cache.key_norm),
        gate=pages(cache.gate),
        open=jax.tree.map(rows, cache.open),
    )
