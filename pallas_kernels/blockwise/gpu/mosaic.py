"""implementation="gpu": kernels in Pallas:Mosaic GPU, for Hopper."""

import functools

import jax

from pallas_kernels import interpreter
from pallas_kernels.blockwise.gpu import devices, operation
from pallas_kernels.call import AttentionCall

OLDEST_JAX = (0, 11)


def refuses(call: AttentionCall) -> str | None:
    """Why the kernels cannot serve the call, or None."""
    if jax.version.__version_info__ < OLDEST_JAX:
        return f"needs JAX 0.11 or later, this is {jax.__version__}"
    capability = devices.compute_capability()
    if capability is not None and capability[0] != 9 and not interpreter.active_mode():
        return f"needs a Hopper GPU (compute capability 9.0), this has {capability[0]}.{capability[1]}"
    return operation.refuses(call)


def _kernels():
    from pallas_kernels.blockwise.gpu import backward, block_backward, forward, lift, lift_backward, tile_forward

    return operation.Kernels(
        forward.attention_forward, backward.query_gradient, backward.key_gradient, tile_forward.tile_forward,
        lift.lift_forward, lift_backward.lift_backward, lift_backward.node_gradient, block_backward.block_backward,
    )  # fmt: skip


forward = functools.partial(operation.forward, "gpu", _kernels)
backward = functools.partial(operation.backward, "gpu", _kernels)
