"""implementation="triton": Triton kernels through jax-triton, for Ampere and Ada, and as a second opinion on Hopper."""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise.gpu import decode, devices, operation
from pallas_kernels.call import AttentionCall


def refuses(call: AttentionCall) -> str | None:
    """Why the kernels cannot serve the call, or None."""
    return _is_missing() or operation.refuses(call)


def _is_missing():
    """What the kernels need and do not have here, or None."""
    try:
        version = importlib.metadata.version("jax-triton")
    except importlib.metadata.PackageNotFoundError:
        return "needs jax-triton: pip install 'path-jax[triton]'"
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if jax.version.__version_info__ >= (0, 12) and numbers <= (0, 4):
        return f"jax-triton {version} does not work with JAX {jax.__version__}"
    capability = devices.compute_capability()
    if capability is not None and not (8, 0) <= capability <= (9, 0):
        return f"needs a GPU of compute capability 8.0 to 9.0, this has {capability[0]}.{capability[1]}"
    if capability == (9, 0) and numbers < (0, 4):
        return f"needs jax-triton 0.4 on Hopper, this is {version}"  # older ones cannot choose the PTX version
    return None


def _kernels():
    from pallas_kernels.blockwise.gpu import triton_call

    return operation.Kernels(triton_call.attention_forward, triton_call.query_gradient, triton_call.key_gradient)


forward = functools.partial(operation.forward, "triton", _kernels)
backward = functools.partial(operation.backward, "triton", _kernels)


def refuses_pages(k, v) -> str | None:
    """Why the kernels cannot read pools of keys and values [pool, K, S, H], or None."""
    if k.dtype != v.dtype or k.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"the cache must be bfloat16, float16 or float32, got {k.dtype}"
    if max(k.shape[3], v.shape[3]) > 128:
        return f"the cache must have heads of at most 128 numbers, got {k.shape[3]} and {v.shape[3]}"
    return _is_missing()


def _page_kernel():
    from pallas_kernels.blockwise.gpu import triton_call

    return triton_call.attend_parts


attend_pages = functools.partial(decode.attend_pages, "triton", _page_kernel)
