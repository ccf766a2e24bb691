"""implementation="gpu": kernels in Pallas:Mosaic GPU, for Hopper."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import interpreter
from pallas_kernels.blockwise.gpu import decode, devices, operation
from pallas_kernels.call import AttentionCall

OLDEST_JAX = (0, 11)


def refuses(call: AttentionCall) -> str | None:
    """Why the kernels cannot serve the call, or None."""
    return _is_missing() or operation.refuses(call)


def _is_missing():
    """What the kernels need and do not have here, or None."""
    if jax.version.__version_info__ < OLDEST_JAX:
        return f"needs JAX 0.11 or later, this is {jax.__version__}"
    capability = devices.compute_capability()
    if capability is not None and capability[0] != 9 and not interpreter.active_mode():
        return f"needs a Hopper GPU (compute capability 9.0), this has {capability[0]}.{capability[1]}"
    return None


def _kernels():
    from pallas_kernels.blockwise.gpu import backward, block_backward, forward, lift, lift_backward, tile_forward

    return operation.Kernels(
        forward.attention_forward, backward.query_gradient, backward.key_gradient, tile_forward.tile_forward,
        lift.lift_forward, lift_backward.lift_backward, lift_backward.node_gradient, block_backward.block_backward,
    )  # fmt: skip


forward = functools.partial(operation.forward, "gpu", _kernels)
backward = functools.partial(operation.backward, "gpu", _kernels)


def refuses_pages(k, v) -> str | None:
    """Why the kernels cannot read pools of keys and values [pool, K, S, H], or None."""
    if k.dtype != v.dtype or k.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the cache must be bfloat16 or float16, got {k.dtype}"
    if not {k.shape[3], v.shape[3]} <= {64, 128}:  # padding would copy the pools
        return f"the cache must have heads of 64 or 128 numbers, got {k.shape[3]} and {v.shape[3]}"
    return _is_missing()


def _page_kernel():
    from pallas_kernels.blockwise.gpu import decode_mosaic

    return decode_mosaic.attend_parts


attend_pages = functools.partial(decode.attend_pages, "gpu", _page_kernel)
