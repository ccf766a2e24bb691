"""Chooses the implementation of a call, by asking each for its reason to refuse.

The one place that names implementations and platforms. `reference` is never chosen automatically.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import pages, reference, xla_operation
from pallas_kernels.blockwise.gpu import operation as gpu_operation
from pallas_kernels.blockwise.tpu import decode as tpu_decode
from pallas_kernels.blockwise.tpu import operation as tpu_operation
from pallas_kernels.blockwise.tpu import tuning
from pallas_kernels.call import AttentionCall, Inputs, Options

_OPERATIONS = {"tpu": tpu_operation, "gpu": gpu_operation, "xla": xla_operation}
_AUTOMATIC = {"tpu": "tpu"}  # implementation -> the platform it is preferred on; `xla` serves everything else
_NOT_YET = {"triton": "Triton kernels are not part of this version"}


def refusals(call: AttentionCall) -> dict[str, str | None]:
    """Per implementation None, or why it cannot serve the call."""
    implementations = {"reference": reference, **_OPERATIONS}
    return {name: module.refuses(call) for name, module in implementations.items()} | _NOT_YET


def explain(op: Callable, *args, **kwargs) -> dict[str, str | None]:
    """Which implementations accept `op(*args, **kwargs)`.

    Args:
      op: `path_attention` or `forgetting_attention`.
      *args, **kwargs: the arguments of the call; `implementation` is ignored.

    Returns:
      {implementation: None, or the reason it refuses the call}.

    Raises:
      ValueError: when the call itself is wrong.
    """
    kwargs.pop("implementation", None)
    kwargs.pop("return_lse", None)
    return refusals(op.as_call(*args, **kwargs))


def choose(call: AttentionCall, implementation: str | None) -> tuple[str, ...]:
    """Names of the implementations to use: one, or `xla` preceded by those that replace it on their platform.

    Raises:
      ValueError: for an unknown name.
      NotImplementedError: when the named implementation refuses the call.
    """
    reasons = refusals(call)
    if implementation is None:
        return (*(name for name in _AUTOMATIC if reasons[name] is None), "xla")
    if implementation not in reasons:
        raise ValueError(f"{implementation=} is unknown; choose from {', '.join(sorted(reasons))} or None")
    if reasons[implementation] is not None:
        raise NotImplementedError(f"{implementation}: {reasons[implementation]}")
    return (implementation,)


def forward(candidates: tuple[str, ...], options: Options, inputs: Inputs):
    """(out, lse, what the backward pass wants kept) of the candidate made for the platform that is compiled for."""
    functions = _functions(candidates, "forward", options)
    if len(candidates) == 1:
        return functions[0](inputs)
    preferred, fallback = functions

    def without_keeping(inputs):
        kept = jax.eval_shape(preferred, inputs)[2]  # every platform's program has the same results
        return *fallback(inputs)[:2], jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)

    return jax.lax.platform_dependent(inputs, default=without_keeping, **{_AUTOMATIC[candidates[0]]: preferred})


def backward(candidates: tuple[str, ...], options: Options, *residuals):
    """Cotangents of the inputs."""
    functions = _functions(candidates, "backward", options)
    if len(candidates) == 1:
        return functions[0](*residuals)
    preferred, fallback = functions
    return jax.lax.platform_dependent(*residuals, default=fallback, **{_AUTOMATIC[candidates[0]]: preferred})


def _functions(candidates, direction, options):
    # What the kernels keep would be zeros in a program for another platform: only where that is not to be expected.
    keep = candidates[0] == "tpu" and (len(candidates) == 1 or tuning.is_tpu_expected())
    options = dataclasses.replace(options, keep_versions=keep)
    return [functools.partial(getattr(_OPERATIONS[name], direction), options) for name in candidates]


def check_pages(implementation: str | None, dtype) -> None:
    """Raises like `choose`, for the attention of decode steps to a cache of `dtype`."""
    if implementation not in (None, "xla", "tpu"):
        raise ValueError(f"{implementation=} is unknown; choose from tpu, xla or None")
    if implementation == "tpu" and not _tpu_reads(dtype):
        raise NotImplementedError(f"tpu: the cache must be bfloat16 or float32, got {dtype}")


def _tpu_reads(dtype):
    return dtype in (jnp.bfloat16, jnp.float32)


def attend_pages(implementation: str | None, *arguments, interpret, **options):
    """`pages.attend_pages` by the named implementation, or by the best for the platform that is compiled for."""
    in_xla = functools.partial(pages.attend_pages, **options)
    if implementation == "xla" or not _tpu_reads(arguments[1].dtype):
        return in_xla(*arguments)
    in_kernel = functools.partial(
        tpu_decode.attend_pages, **options, vmem_limit=tuning.chip().vmem, interpret=interpret
    )
    if implementation == "tpu":
        return in_kernel(*arguments)
    return jax.lax.platform_dependent(*arguments, tpu=in_kernel, default=in_xla)
