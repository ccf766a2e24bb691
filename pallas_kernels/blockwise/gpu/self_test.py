"""Small problems that decide, once per process, whether kernels are trusted on the GPU at hand.

Compilers and drivers have miscompiled attention kernels before, silently. An implementation is chosen automatically
only where it agrees with plain XLA on the very GPU; that costs the compilation of four small programs.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blockwise import xla_operation
from pallas_kernels.blockwise.gpu import devices, mosaic, triton
from pallas_kernels.call import Inputs, make_call

_MODULES = {"gpu": mosaic, "triton": triton}
_TOLERANCE = 2e-2  # of the largest number; bfloat16 kernels stay below 5e-3


@functools.cache
def failure(name: str) -> str | None:
    """Why an implementation is not trusted on the local GPU; None: it agrees with XLA, or no GPU to ask."""
    if not any(device.platform == "gpu" for device in jax.local_devices()) or devices.compute_capability() is None:
        return None
    module = _MODULES[name]
    # In another thread no trace and no mesh of the caller's is in effect.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(disagreement, module.refuses, module.forward, module.backward).result()


def disagreement(refuses, forward, backward) -> str | None:
    """What an implementation computes differently from XLA, or None.

    Args:
      refuses, forward, backward: as in `xla_operation`.
    """
    for path in (True, False):
        call = _problem(path)
        if refuses(call):
            return None
        expected = _results(xla_operation.forward, xla_operation.backward, call)
        try:
            found = _results(forward, backward, call)
        except Exception as error:  # whatever a compiler or driver may raise
            return f"failed on this GPU: {type(error).__name__}: {error}"
        for name, x, y in zip(expected._fields, found, expected):
            error = 0 if x is None else np.abs(x - y).max() / np.abs(y).max()
            if not error <= _TOLERANCE:
                return f"computes a {name} on this GPU that differs from XLA's by {error:.2g} of its maximum"
    return None


def _problem(path):
    """A call over four tiles, every number of which matters."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    q, k, v = normal(1, 400, 2, 64), normal(1, 400, 1, 64), normal(1, 400, 1, 64)
    w = normal(1, 400, 1, 64) / 8  # 16 bits: then the linear stage belongs to the kernels
    beta = jnp.asarray(rng.uniform(0, 2, (1, 400, 1)), jnp.float32) / (w.astype(jnp.float32) ** 2).sum(-1)
    log_forget = jnp.asarray(-rng.uniform(0, 0.1, (1, 400, 2)), jnp.float32)
    directions = (w, beta) if path else (None, None)
    return make_call(q, k, v, *directions, log_forget, segment_ids=None, scale=None, gate_scale=1.0)


def _results(forward, backward, call) -> Inputs:
    """Gradients of a call, whose cotangent is its own output: what is wrong forward is wrong here."""

    def run(inputs):
        out, lse, kept = forward(call.options, inputs)
        return backward(call.options, inputs, out, lse, kept, out, jnp.tanh(lse))

    gradients = jax.jit(run)(call.inputs)
    return Inputs(*(None if x is None else np.asarray(x, np.float32) for x in gradients))
