"""A call whose kernels are traced only once a program for their platform is made of it.

Tracing the kernels takes seconds, and a program that may run on several platforms mentions them on all. Compiling the
call for another platform explains what to do; Pallas would say less.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

_DEVICES = {"tpu": "TPUs", "cuda": "NVIDIA GPUs"}
_call = Primitive("attention_on_platform")
_call.multiple_results = True


def on_platform(platform: str, implementation: str, function, arguments, results):
    """`function(*arguments)` in programs for one platform.

    Args:
      platform: "tpu" or "cuda".
      implementation: its name, for the error.
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

    out = _call.bind(
        *leaves, platform=platform, implementation=implementation, function=flat_function, results=tuple(results)
    )
    return jax.tree.unflatten(result_tree, out)


@_call.def_abstract_eval
def _results(*arguments, results, **parameters):
    del parameters
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


def _lower(context, *leaves, platform, implementation, function, results, lowered_for=None):
    if platform != lowered_for:
        hint = "elsewhere call it under pallas_kernels.interpret() or" if implementation != "triton" else "elsewhere"
        raise NotImplementedError(
            f"implementation={implementation!r} runs on {_DEVICES[platform]} only; {hint} pass implementation=None"
        )
    return mlir.lower_fun(function, multiple_results=True)(context, *leaves)


batching.primitive_batchers[_call] = _batch
mlir.register_lowering(_call, _lower)
for _platform in _DEVICES:
    mlir.register_lowering(_call, functools.partial(_lower, lowered_for=_platform), platform=_platform)
