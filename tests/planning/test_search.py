"""The search for the largest batch, on memories that are formulas."""

import pytest

from path_jax.planning.search import largest_batch


@pytest.mark.parametrize("batch_size", [8, 80])
def test_a_linear_memory_takes_few_compilations(batch_size):
    compiled = []

    def peak(size):
        compiled.append(size)
        return 100 + 7 * size

    found = largest_batch(peak, 8, batch_size, 100 + 7 * batch_size, 1000)
    assert found.batch_size == 128 and found.peak_bytes == 996  # 128 rows take 996 of 1000, 136 would take 1052
    assert found.num_compiled == len(compiled) + 1 <= 4


def test_a_memory_that_bends_still_gives_a_size_that_was_compiled():
    peak = lambda size: 100 + 7 * size + size**2 // 20
    found = largest_batch(peak, 8, 8, peak(8), 1000)
    assert found.batch_size and found.peak_bytes == peak(found.batch_size) <= 1000


def test_nothing_fits():
    found = largest_batch(lambda size: 2000 + size, 8, 8, 2008, 1000)
    assert (found.batch_size, found.peak_bytes) == (0, 0)


def test_the_search_ends_at_64_times_the_batch():
    assert largest_batch(lambda size: 10, 2, 8, 10, 1000).batch_size <= 512
