"""The step tables of the TPU kernels against the definition of what attention must compute."""

import jax
import numpy as np
import pytest

from pallas_kernels.blockwise.tpu import tuning
from pallas_kernels.blockwise.tpu.schedule import (
    BLOCK,
    DIAGONAL,
    EDGE,
    FIRST,
    FIRST_OF_BLOCK,
    FIRST_OF_KEYS,
    FLAGS,
    LAST,
    LAST_OF_BLOCK,
    LAST_OF_KEYS,
    LEFT,
    QUERY,
    SLOT,
    WHOLE,
    backward_steps,
    forward_steps,
)
from pallas_kernels.call import Inputs

SIZE = 4  # tokens per superchunk
SHAPES = [(1, 1), (2, 2), (5, 5), (8, 8), (1, 6), (3, 8)]  # superchunks of queries and of keys


def tiles(steps, offset):
    """(query superchunk, key superchunk, slot) of every tile, in the queries' position among the keys."""
    found = []
    for query, block, slot, flags in steps:
        position = query + offset
        if flags & DIAGONAL:
            found.append((position, position, slot))
        if flags & LEFT:
            found.append((position, 2 * block, slot))
        if flags & WHOLE:
            found += [(position, 2 * block, slot), (position, 2 * block + 1, slot)]
    return found


@pytest.mark.parametrize("steps_of", [forward_steps, backward_steps])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 9, 13])
@pytest.mark.parametrize("num_queries, num_keys", SHAPES)
def test_every_visible_tile_once(num_queries, num_keys, window, steps_of):
    offset = num_keys - num_queries
    steps = steps_of(num_queries, num_keys, SIZE, False, window)
    found = [tile[:2] for tile in tiles(steps, offset)]
    assert len(found) == len(set(found))
    distance = np.subtract.outer(np.arange(num_keys * SIZE), np.arange(num_keys * SIZE))
    visible = (distance >= 0) & (distance < (window or num_keys * SIZE))
    needed = {
        (a, b)
        for a in range(offset, num_keys)
        for b in range(a + 1)
        if visible[a * SIZE : (a + 1) * SIZE, b * SIZE : (b + 1) * SIZE].any()
    }
    assert needed <= set(found)
    for step in steps:  # a tile without a mask is visible everywhere
        for a, b, _ in tiles([step], offset):
            if a != b and not step[FLAGS] & EDGE:
                assert visible[a * SIZE : (a + 1) * SIZE, b * SIZE : (b + 1) * SIZE].all()


@pytest.mark.parametrize("steps_of", [forward_steps, backward_steps])
@pytest.mark.parametrize("size", [2, 3, 5, 8, 13])
def test_tree_tiles_meet_at_their_common_ancestor(size, steps_of):
    found = tiles(steps_of(size, size, SIZE, True, None), 0)
    assert sorted((a, b) for a, b, _ in found) == [(a, b) for a in range(size) for b in range(a)]
    for a, b, slot in found:
        assert a >> (slot + 1) == b >> (slot + 1) and a >> slot != b >> slot


@pytest.mark.parametrize("steps_of", [forward_steps, backward_steps])
def test_queries_after_all_keys_meet_each_of_them(steps_of):
    found = tiles(steps_of(3, 4, SIZE, False, None, apart=True), 4)
    assert sorted((a, b) for a, b, _ in found) == [(a, b) for a in (4, 5, 6) for b in range(4)]


@pytest.mark.parametrize("tree, apart", [(False, False), (True, False), (False, True)])
def test_accumulators_open_and_close_once(tree, apart):
    forward = forward_steps(6, 6, SIZE, tree, None, apart)
    check_group(forward, (QUERY,), FIRST, LAST, contiguous=True)
    backward = backward_steps(6, 6, SIZE, tree, None, apart)
    computing = backward[backward[:, FLAGS] & (DIAGONAL | LEFT | WHOLE) != 0]
    check_group(computing, (QUERY, SLOT), FIRST, LAST, contiguous=False)
    check_group(backward, (BLOCK, SLOT), FIRST_OF_KEYS, LAST_OF_KEYS, contiguous=True)
    check_group(backward, (BLOCK,), FIRST_OF_BLOCK, LAST_OF_BLOCK, contiguous=True)
    assert set(backward[:, BLOCK]) == {0, 1, 2}


def check_group(steps, fields, first, last, contiguous):
    keys = [tuple(step[list(fields)]) for step in steps]
    for key in set(keys):
        where = [n for n, other in enumerate(keys) if other == key]
        assert [bool(steps[n][FLAGS] & first) for n in where] == [n == where[0] for n in where]
        assert [bool(steps[n][FLAGS] & last) for n in where] == [n == where[-1] for n in where]
        if contiguous:
            assert where == list(range(where[0], where[-1] + 1))


def test_superchunks_shrink_with_the_query_heads_of_a_group():
    """VMEM holds all heads of a group in the backward pass of PaTH; FoX streams them."""

    def size(group, path=True, dtype="bfloat16", length=8192):
        q, k = (jax.ShapeDtypeStruct((1, length, heads, 128), dtype) for heads in (group, 1))
        return tuning.superchunk(Inputs(q, k, k, k if path else None, None, None, None))

    assert tuning.chip().name == "v5e"  # assumed where no TPU is
    assert [size(1), size(8), size(32), size(32, path=False)] == [1024, 1024, 512, 1024]
    assert [size(1, dtype="float32"), size(1, length=1100)] == [256, 256]
