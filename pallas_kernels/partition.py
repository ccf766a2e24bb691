"""Lets the compiler's partitioner split kernels over batch and heads.

The partitioner knows nothing about custom kernels: under `jax.jit` with sharded arguments it would refuse them. Every
batch row and every key/value head with its group of query heads is independent, so along these axes each device can run
the kernels on its own shard; all other axes are gathered. Under `jax.shard_map` there is nothing left to do.
"""

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.call import Inputs, Options
from pallas_kernels.lazily import on_platform

# An array's axes, one letter each: b batch, n query heads, k key/value heads, . everything else.
_INPUTS = Inputs("b.n.", "b.k.", "b.k.", "b.k.", "b.k", "b.n", "b.")


def _axes(inputs):
    return Inputs(*(None if x is None else axes for x, axes in zip(inputs, _INPUTS)))


def run_forward(target, function, options: Options, inputs: Inputs, kept=(None, None)):
    """`function(inputs)` = (out, lse, kept) on one platform, split over batch and heads.

    Args:
      target: platform and name of the implementation.
      function: of the inputs of one shard.
      kept: types of what the backward pass wants kept, as a function of the inputs of a shard, and their axes.
    """
    kept_types, kept_axes = kept

    def shard(inputs):
        batch, length, num_heads, _ = inputs.q.shape
        results = (
            jax.ShapeDtypeStruct((batch, length, num_heads, inputs.v.shape[3]), inputs.q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32),
            kept_types and kept_types(inputs),
        )
        return _run(target, function, options, (inputs,), results)

    return _split(target, shard, options, (inputs,), (_axes(inputs),), ("b.n.", "bn.", kept_axes))


def run_backward(target, function, options: Options, inputs: Inputs, out, lse, kept, dout, dlse, kept_axes=None):
    """Cotangents of the inputs, `function(inputs, out, lse, kept, dout, dlse)`; see `run_forward`."""

    def shard(inputs, *others):
        results = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs._replace(segment_ids=None))
        return _run(target, function, options, (inputs, *others), results)

    axes = (_axes(inputs), "b.n.", "bn.", None if kept is None else kept_axes, "b.n.", "bn.")
    arguments = inputs, out, lse, kept, dout, dlse
    return _split(target, shard, options, arguments, axes, _axes(inputs._replace(segment_ids=None)))


def _run(target, function, options, arguments, results):
    return function(*arguments) if options.interpret else on_platform(*target, function, arguments, results)


def _split(target, shard, options, arguments, argument_axes, result_axes):
    simulates = not isinstance(options.interpret, bool) or (options.interpret and target[0] == "cuda")
    if simulates:  # by callbacks, which cannot be partitioned
        return shard(*arguments)
    return by_batch_and_head(shard, arguments, argument_axes, result_axes, arguments[0].k.shape[2])


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
