"""Lets the compiler's partitioner split kernels over batch and heads.

The partitioner knows nothing about custom kernels: under `jax.jit` with sharded arguments it would refuse them. Every
batch row and every key/value head with its group of query heads is independent, so along these axes each device can run
the kernels on its own shard; all other axes are gathered. Under `jax.shard_map` there is nothing left to do.
"""

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

# An array's axes, one letter each: b batch, n query heads, k key/value heads, . everything else.


def by_batch_and_head(function, arguments, argument_axes, result_axes, num_kv_heads: int):
    """`function(*arguments)`, to be split along the axes b and k of its arrays.

    Args:
      function: pure function of arrays that treats batch rows and key/value heads alike.
      arguments: tuple of trees of arrays; the first leaf has axes b and n.
      argument_axes, result_axes: the same trees with a string of letters for every array.
      num_kv_heads: K.

    Returns:
      The results, sharded as the first argument is along batch and heads. Heads must not be split finer than key/value
      heads: for that, repeat keys and values or use `jax.shard_map`.
    """
    leaves, tree = jax.tree.flatten(arguments)
    axes, result_axes = jax.tree.leaves(argument_axes), jax.tree.leaves(result_axes)
    query_axes = axes[0]
    group = leaves[0].shape[query_axes.index("n")] // num_kv_heads
    results = []  # tree of the results, known after the first trace

    def flat_function(*leaves):
        out, out_tree = jax.tree.flatten(function(*jax.tree.unflatten(tree, leaves)))
        results[:] = [out_tree]
        return tuple(out)

    # Constants made while tracing stay inside the inner program.
    flat_function = jax.jit(flat_function)

    def partition(mesh, argument_shapes, result_shapes):
        spec = argument_shapes[0].sharding.spec
        spec = (*spec, *[None] * (len(query_axes) - len(spec)))
        heads = spec[query_axes.index("n")]
        split = {"b": spec[query_axes.index("b")], "n": heads, "k": heads, ".": None}

        def sharding(letters):
            return NamedSharding(mesh, PartitionSpec(*(split[letter] for letter in letters)))

        return mesh, flat_function, tuple(map(sharding, result_axes)), tuple(map(sharding, axes))

    rule, replicated = _rule(axes, result_axes, group)
    partitioned = custom_partitioning(flat_function)
    partitioned.def_partition(
        partition,
        sharding_rule=rule,
        need_replication_factors=replicated,
        **({"g": group} if group > 1 else {}),
    )
    out = partitioned(*leaves)
    return jax.tree.unflatten(results[0], out)


def _rule(argument_axes, result_axes, group):
    """Shardy's rule: factors b and k (times g within query heads), and one of its own for every other axis.

    Returns:
      The rule, and the factors along which nothing may be split, in the order in which they appear.
    """
    replicated = []

    def factor(letter):
        if letter == ".":
            replicated.append(f"x{len(replicated)}")
            return replicated[-1]
        if letter != "n" or group == 1:
            return "b" if letter == "b" else "k"
        if "g" not in replicated:
            replicated.append("g")
        return "(k g)"

    arguments, results = (
        ", ".join(" ".join(map(factor, letters)) for letters in side) for side in (argument_axes, result_axes)
    )
    return f"{arguments} -> {results}", tuple(replicated)
