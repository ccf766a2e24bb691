"""Small problems that decide, once per process, whether kernels are trusted on the GPU at hand.

Compilers and drivers have miscompiled attention kernels before, silently. An implementation is chosen automatically
only where it agrees with plain XLA on the very GPU; that costs the compilation of four small programs, and of two more
for decode steps.
"""

import concurrent.futures
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blockwise import pages, xla_operation
from pallas_kernels.blockwise.gpu import devices, mosaic, triton
from pallas_kernels.call import Inputs, make_call

_MODULES = {"gpu": mosaic, "triton": triton}
_TOLERANCE = 2e-2  # of the largest number; bfloat16 kernels stay below 5e-3


@functools.cache
def failure(name: str) -> str | None:
    """Why an implementation is not trusted on the local GPU; None: it agrees with XLA, or no GPU to ask."""
    module = _MODULES[name]
    return _on_the_gpu(disagreement, module.refuses, module.forward, module.backward)


@functools.cache
def decode_failure(name: str) -> str | None:
    """As `failure`, for the attention of decode steps to pages."""
    module = _MODULES[name]
    return _on_the_gpu(decode_disagreement, module.refuses_pages, module.attend_pages)


def _on_the_gpu(test, *functions):
    if not any(device.platform == "gpu" for device in jax.local_devices()) or devices.compute_capability() is None:
        return None
    # In another thread no trace and no mesh of the caller's is in effect.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(test, *functions).result()


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
        if reason := _difference(lambda: _results(forward, backward, call), expected):
            return reason
    return None


def decode_disagreement(refuses_pages, attend_pages) -> str | None:
    """As `disagreement`, of functions as in `pages`."""
    arguments = _pages_problem()
    if refuses_pages(*arguments[1:3]):
        return None

    def results(function):
        return _Found(*map(np.asarray, jax.jit(functools.partial(function, gate_scale=1.0, window=150))(*arguments)))

    return _difference(lambda: results(attend_pages), results(pages.attend_pages))


class _Found(NamedTuple):
    output: np.ndarray
    log_sum_exp: np.ndarray


def _difference(function, expected) -> str | None:
    try:
        found = function()
    # Compiler and driver have no error in common, and any is a reason to fall back, which `explain` then gives.
    except Exception as error:
        return f"failed on this GPU: {type(error).__name__}: {error}"
    for name, x, y in zip(expected._fields, found, expected):
        error = 0 if x is None else np.abs(x - y).max() / np.abs(y).max()
        if not error <= _TOLERANCE:
            return f"computes a {name} on this GPU that differs from XLA's by {error:.2g} of its maximum"
    return None


def _pages_problem():
    """Two rows and two of three pages, in the order of `pages.attend_pages`; every query sees a key."""
    rng = np.random.default_rng(1)
    normal = lambda *shape, dtype=jnp.float32: jnp.asarray(rng.standard_normal(shape), dtype)
    k, v = normal(3, 1, 128, 64, dtype=jnp.bfloat16), normal(3, 1, 128, 64, dtype=jnp.bfloat16)
    gate = jnp.asarray(np.cumsum(-rng.uniform(0, 0.1, (3, 1, 2, 128)), -1), jnp.float32)
    inside = jnp.asarray(-rng.uniform(0, 1, (2, 1, 2, 3)), jnp.float32)
    position = jnp.asarray([[0, 1, 2], [10, 11, 12]], jnp.int32)
    table, needed = jnp.asarray([[2, 0], [1, 2]], jnp.int32), jnp.asarray([[[True, True]], [[True, False]]])
    return normal(2, 1, 2, 3, 64) / 4, k, v, normal(3, 1, 64, 64) / 8, gate, inside, position, table, needed


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
