"""Groups are groups, and their tables multiply permutations."""

import numpy as np
import pytest
from data.slow_readers import permutations_of

from path_jax.data.group_words import multiplication_table


@pytest.mark.parametrize("group, order", [("s3", 6), ("a4", 12), ("s4", 24), ("a5", 60), ("s5", 120), ("z7", 7)])
def test_tables_are_groups(group, order):
    table, every = multiplication_table(group), np.arange(order)
    assert table.shape == (order, order)
    np.testing.assert_array_equal(table[0], every)
    np.testing.assert_array_equal(table[:, 0], every)
    np.testing.assert_array_equal(table[table[:, :, None], every], table[every[:, None, None], table])
    for lines in table, table.T:  # every element once in each row and column: there are inverses
        np.testing.assert_array_equal(np.sort(lines, axis=1), np.broadcast_to(every, table.shape))


@pytest.mark.parametrize("group", ["a4", "s4", "a5"])
def test_tables_multiply_permutations(group):
    """As matrices do; products of even permutations are even."""
    matrices = np.array([np.eye(len(p))[:, list(p)] for p in permutations_of(group)])
    products = np.einsum("aij,bjk->abik", matrices, matrices)
    np.testing.assert_array_equal(products, matrices[multiplication_table(group)])
    assert group[0] == "s" or np.allclose(np.linalg.det(matrices), 1)


def commutators(table):
    """The elements of the subgroup that all a b a^-1 b^-1 generate."""
    inverse = np.argmin(table, axis=1)
    found = np.unique(table[table, table[inverse[:, None], inverse]])
    while len(more := np.unique(table[found[:, None], found])) > len(found):
        found = more
    return found


def test_a5_is_not_solvable():
    """It is its own commutator subgroup, and that of S5; A4's is smaller."""
    assert [len(commutators(multiplication_table(group))) for group in ("a5", "s5", "a4", "z6")] == [60, 60, 4, 1]
