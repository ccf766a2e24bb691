"""Which tiles meet which, as small integer tables that the kernels read.

A *row* is one version of one tile together with the contiguous tiles it meets. FoX has one version per tile, which
meets every earlier tile and its own. In the frame tree a tile of queries a has a version at every level l whose bit is
set in a; it meets the 2^l tiles of the left sibling's segment. A tile of keys has one where the bit is clear and a
right sibling exists. Versions are numbered as in `householder.frame_tree`.

Row of queries: (version, tile, first tile of keys, end, version of the keys of the first).
Row of keys:    (version, tile, first tile of queries, end, version of the queries of the first).
"""

import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels.blockwise.gpu.layout import TILE
from pallas_kernels.householder import frame_tree_levels


class Rows(NamedTuple):
    """Rows sorted by tile; those of tile t are starts[t] ... starts[t + 1] - 1."""

    table: np.ndarray  # int32 [R, 5]
    starts: np.ndarray  # int32 [tiles + 1]


def _sorted(rows, num_tiles):
    table = np.array(rows, np.int32).reshape(-1, 5)
    table = table[np.argsort(table[:, 1], kind="stable")]
    return Rows(table, np.searchsorted(table[:, 1], np.arange(num_tiles + 1)).astype(np.int32))


def _reach(num_keys, window):
    """How many tiles back a window reaches."""
    return num_keys if window is None else (window - 2) // TILE + 1


@functools.lru_cache
def query_rows(num_queries: int, num_keys: int, tree: bool, window: int | None) -> Rows:
    """Rows of queries; the tiles of queries are the last of the `num_keys` tiles."""
    if not tree:
        offset, reach = num_keys - num_queries, _reach(num_keys, window)
        first = [max(a + offset - reach, 0) for a in range(num_queries)]
        return _sorted([(a, a, first[a], a + offset + 1, first[a]) for a in range(num_queries)], num_queries)
    rows, query, key = [], 0, 0
    for level, (queries, keys) in enumerate(frame_tree_levels(num_keys)):
        for i, a in enumerate(queries):
            first = ((a >> level) - 1) << level
            rows.append((query + i, a, first, first + (1 << level), key + np.searchsorted(keys, first)))
        query, key = query + len(queries), key + len(keys)
    return _sorted(rows, num_keys)


@functools.lru_cache
def key_rows(num_queries: int, num_keys: int, tree: bool, window: int | None) -> Rows:
    """Rows of keys."""
    if not tree:
        offset, reach = num_keys - num_queries, _reach(num_keys, window)
        first = [max(b - offset, 0) for b in range(num_keys)]
        end = [max(min(b - offset + reach + 1, num_queries), first[b]) for b in range(num_keys)]
        return _sorted([(b, b, first[b], end[b], first[b]) for b in range(num_keys)], num_keys)
    rows, query, key = [], 0, 0
    for level, (queries, keys) in enumerate(frame_tree_levels(num_keys)):
        for i, b in enumerate(keys):
            first = ((b >> level) + 1) << level
            end = min(first + (1 << level), num_keys)
            rows.append((key + i, b, first, end, query + np.searchsorted(queries, first)))
        query, key = query + len(queries), key + len(keys)
    return _sorted(rows, num_keys)
