"""Which tile is computed in which grid step: static tables that the kernels read from SMEM.

The sequence is cut into superchunks of S tokens. A step multiplies one superchunk of queries with one *key block*, two
neighbouring superchunks of keys: long steps amortise the cost of a grid step (about 300 cycles). The superchunk of the
queries itself and, for odd superchunks, its left neighbour share a key block and are treated apart from whole blocks.

With a frame tree the step also names the slot, i.e. the tree level at which its two tiles meet; without one (FoX) there
is one slot, and the step of the queries' own key block computes the causal diagonal as well.
"""

import functools

import numpy as np

# Fields of a step. A table is passed flat, so that SMEM holds it without padding.
QUERY, BLOCK, SLOT, FLAGS, FIELDS = 0, 1, 2, 3, 4
# What a step computes. DIAGONAL: the superchunk's own keys; LEFT: the first superchunk of the key block, for queries of
# the second; WHOLE: an earlier key block; EDGE: the window ends inside the tile, so it needs a mask.
DIAGONAL, LEFT, WHOLE, EDGE = 1, 2, 4, 8
TILE = DIAGONAL | LEFT | WHOLE  # whether it computes anything
# First and last of the steps that share an accumulator: that of one (slot, query superchunk); in the backward pass
# also of one (slot, key block), and of one key block over all slots.
FIRST, LAST = 16, 32
FIRST_OF_KEYS, LAST_OF_KEYS, FIRST_OF_BLOCK, LAST_OF_BLOCK = 64, 128, 256, 512


def slot(query: int, key: int) -> int:
    """Tree level at which two superchunks meet: the frame between them is the middle of the level's segment."""
    return (query ^ key).bit_length() - 1


def _tiles(num_queries, num_keys, superchunk, tree, window, apart):
    """(query superchunk, key block, slot, kinds), queries ascending and for each of them keys descending."""
    if apart:
        yield from ((a, block, 0, WHOLE) for a in range(num_queries) for block in reversed(range(num_keys // 2)))
        return
    for a in range(num_queries):
        position = a + num_keys - num_queries
        near = 0 if tree else DIAGONAL
        if position % 2 and (window is None or window > 1):
            near |= LEFT
        yield a, position >> 1, 0, near | (EDGE if window is not None and window < 2 * superchunk else 0)
        for block in range((position >> 1) - 1, -1, -1):
            nearest = (position - 2 * block - 2) * superchunk + 1
            farthest = (position - 2 * block + 1) * superchunk - 1
            if window is None or nearest < window:
                edge = EDGE if window is not None and farthest >= window else 0
                yield a, block, slot(position, 2 * block) if tree else 0, WHOLE | edge


def _mark(tiles, key, first, last):
    """Adds the flags `first` and `last` to the first and last tile of each group."""
    ends = {}
    for n, tile in enumerate(tiles):
        ends.setdefault(key(tile), [n, n])[1] = n
    firsts, lasts = (set(end[i] for end in ends.values()) for i in (0, 1))
    return [
        (*tile[:3], tile[3] | (first if n in firsts else 0) | (last if n in lasts else 0))
        for n, tile in enumerate(tiles)
    ]


def _table(tiles):
    return np.array(tiles, np.int32).reshape(-1, FIELDS)


@functools.lru_cache
def forward_steps(
    num_queries: int, num_keys: int, superchunk: int, tree: bool, window: int | None, apart: bool = False
):
    """Steps of one head, query superchunk by query superchunk.

    Args:
      num_queries: superchunks of queries, the last of the `num_keys` superchunks of keys.
      superchunk: tokens per superchunk.
      tree: with a frame tree; the diagonal is then computed elsewhere and a step may have no tile.
      window: query i sees keys i - window + 1 ... i; None: all.
      apart: the queries come after the keys, of which there is an even number of superchunks, and see all of them;
        without tree and window.

    Returns:
      int32 [steps, 4]: query superchunk, key block, slot and flags of each step.
    """
    tiles = list(_tiles(num_queries, num_keys, superchunk, tree, window, apart))
    return _table(_mark(tiles, lambda tile: tile[0], FIRST, LAST))


@functools.lru_cache
def backward_steps(
    num_queries: int, num_keys: int, superchunk: int, tree: bool, window: int | None, apart: bool = False
):
    """Steps of one head, key block by key block (descending), for each of them by slot and queries (ascending).

    A key block that no query sees has one step without a tile, which writes its zeros. Arguments and result as for
    `forward_steps`.
    """
    seen = [t for t in _tiles(num_queries, num_keys, superchunk, tree, window, apart) if t[3] & TILE]
    blocks = {block for _, block, _, _ in seen}
    unseen = [(0, block, 0, 0) for block in range((num_keys + 1) // 2) if block not in blocks]
    tiles = sorted(seen + unseen, key=lambda tile: (-tile[1], tile[2], tile[0]))
    # A block that nobody sees shares no accumulator of queries.
    tiles = _mark(tiles, lambda tile: (tile[0], tile[2]) if tile[3] else tile[1], FIRST, LAST)
    tiles = _mark(tiles, lambda tile: (tile[1], tile[2]), FIRST_OF_KEYS, LAST_OF_KEYS)
    return _table(_mark(tiles, lambda tile: tile[1], FIRST_OF_BLOCK, LAST_OF_BLOCK))


def read(table, n):
    """Fields of step n of a flat table in SMEM."""
    return tuple(table[FIELDS * n + field] for field in range(FIELDS))
