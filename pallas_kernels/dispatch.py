"""Chooses the implementation of a call, by asking each for its reason to refuse.

The one place that names implementations and block sizes. `reference` is never chosen automatically.
"""

from collections.abc import Callable

from pallas_kernels.blockwise import reference, xla
from pallas_kernels.call import AttentionCall

_REFUSES = {"reference": reference.refuses, "xla": xla.refuses}
_AUTOMATIC = ("xla",)  # best first
_NOT_YET = {
    "tpu": "Mosaic TPU kernels are not part of this version",
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


def choose(call: AttentionCall, implementation: str | None) -> str:
    """Name of the implementation to use.

    Raises:
      ValueError: for an unknown name.
      NotImplementedError: when the named implementation, or every automatic one, refuses the call.
    """
    reasons = refusals(call)
    if implementation is not None and implementation not in reasons:
        raise ValueError(f"{implementation=} is unknown; choose from {', '.join(sorted(reasons))} or None")
    candidates = _AUTOMATIC if implementation is None else (implementation,)
    for name in candidates:
        if reasons[name] is None:
            return name
    raise NotImplementedError("; ".join(f"{name}: {reasons[name]}" for name in candidates))


def tile_size(length: int) -> int:
    """Tokens per tile of the xla implementation: 256, or less where padding the last tile would cost more than 15 %."""
    smallest = 8
    while smallest < min(length, 64):
        smallest *= 2
    candidates = (
        [size for size in (256, 128, 64) if size <= smallest or size < 2 * length] if smallest == 64 else [smallest]
    )

    def padded(size):
        return -(-length // size) * size

    return next(size for size in candidates if padded(size) <= 1.15 * min(map(padded, candidates)))
