"""Chooses the implementation of a call, by asking each for its reason to refuse.

The one place that names implementations and platforms. `reference` is never chosen automatically.
"""

import functools
from collections.abc import Callable

import jax

from pallas_kernels.blockwise import reference, xla_operation
from pallas_kernels.blockwise.tpu import operation as tpu_operation
from pallas_kernels.call import AttentionCall

_OPERATIONS = {"tpu": tpu_operation, "xla": xla_operation}
_REFUSES = {"reference": reference.refuses, "xla": xla_operation.refuses, "tpu": tpu_operation.refuses}
_AUTOMATIC = {"tpu": "tpu"}  # platform -> implementation preferred there; `xla` serves everything else
_NOT_YET = {
    "gpu": "Mosaic GPU kernels are not part of this version",
    "triton": "Triton kernels are not part of this version",
}


def refusals(call: AttentionCall) -> dict[str, str | None]:
    """Per implementation None, or why it cannot serve the call."""
    return {name: refuses(call) for name, refuses in _REFUSES.items()} | _NOT_YET


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
        return (*(name for name in _AUTOMATIC.values() if reasons[name] is None), "xla")
    if implementation not in reasons:
        raise ValueError(f"{implementation=} is unknown; choose from {', '.join(sorted(reasons))} or None")
    if reasons[implementation] is not None:
        raise NotImplementedError(f"{implementation}: {reasons[implementation]}")
    return (implementation,)


def run(candidates: tuple[str, ...], direction: str, options, *arrays):
    """Runs "forward" or "backward" of the candidate made for the platform that the program is compiled for."""
    functions = {name: functools.partial(getattr(_OPERATIONS[name], direction), options) for name in candidates}
    fallback = functions[candidates[-1]]
    by_platform = {platform: functions[name] for platform, name in _AUTOMATIC.items() if name in candidates[:-1]}
    if not by_platform:
        return fallback(*arrays)
    return jax.lax.platform_dependent(*arrays, default=fallback, **by_platform)
