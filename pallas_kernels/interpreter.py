"""Switch that runs the accelerator kernels in Pallas's interpret mode, on any platform."""

import os

import jax

_context = jax.make_user_context(default_value=None)


def interpret():
    """Context manager under which the implementations "tpu" and "gpu" run in interpret mode, on any platform.

    For tests and debugging: the kernels' own array code is executed, slowly. The environment variable
    PALLAS_KERNELS_INTERPRET=1 does the same for a whole process. Functions under `jax.jit` are traced anew inside.
    """
    return _context(True)


def is_active() -> bool:
    """Whether a call made now runs in interpret mode."""
    return bool(_context.value) or os.environ.get("PALLAS_KERNELS_INTERPRET") == "1"
