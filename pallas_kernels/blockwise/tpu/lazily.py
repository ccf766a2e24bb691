"""A call whose kernels are traced only once a program for a TPU is made of it.

Tracing the kernels takes seconds, and a program that may run on several platforms mentions them on all. Anywhere but on
a TPU, compiling the call explains what to do; Pallas would say less.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

_ELSEWHERE = (
    "implementation='tpu' runs on TPUs only; elsewhere call it under pallas_kernels.interpret() or pass "
    "implementation=None"
)
_call = Primitive("tpu_attention")
_call.multiple_results = True


def on_tpu(function, arguments, results):
    """`function(*arguments)`.

    Args:
      function: of trees of arrays.
      arguments: tuple of trees; the mesh axes over which the first leaf varies are those of the results.
      results: what the function returns, as a tree of `jax.ShapeDtypeStruct`.

    Raises:
      NotImplementedError: when the call is compiled for another platform.
    """
    leaves, tree = jax.tree.flatten(arguments)
    results, result_tree = jax.tree.flatten(results)

    def flat_function(*leaves):
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

    return jax.tree.unflatten(result_tree, _call.bind(*leaves, function=flat_function, results=tuple(results)))


@_call.def_abstract_eval
def _results(*arguments, function, results):
    like = arguments[0]

    def result(x):
        whole = NamedSharding(like.sharding.mesh, PartitionSpec(*[None] * len(x.shape)))
        return jax.core.ShapedArray(x.shape, x.dtype, sharding=whole, manual_axis_type=like.manual_axis_type)

    return [result(x) for x in results]


@_call.def_impl
def _run_now(*leaves, **parameters):
    return jax.jit(lambda *leaves: _call.bind(*leaves, **parameters))(*leaves)


def _batch(leaves, axes, **parameters):
    """One element of the mapped axis after the other."""
    size = next(x.shape[axis] for x, axis in zip(leaves, axes) if axis is not None)
    leaves = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(leaves, axes)
    ]
    results = jax.lax.map(lambda leaves: _call.bind(*leaves, **parameters), leaves)
    return results, [0] * len(results)


def _lower_elsewhere(context, *leaves, **parameters):
    raise NotImplementedError(_ELSEWHERE)


batching.primitive_batchers[_call] = _batch
mlir.register_lowering(_call, _lower_elsewhere)
mlir.register_lowering(
    _call, mlir.lower_fun(lambda *leaves, function, results: function(*leaves), multiple_results=True), platform="tpu"
)
