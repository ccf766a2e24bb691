"""Switch that runs the accelerator kernels in Pallas's interpret mode, on any platform."""

import os

import jax

_context = jax.make_user_context(default_value=None)


def interpret(mode=True):
    """Context manager under which the implementations "tpu" and "gpu" run in interpret mode, on any platform.

    For tests and debugging: the kernels' own array code is executed, slowly. The environment variable
    PALLAS_KERNELS_INTERPRET=1 does the same for a whole process. Functions under `jax.jit` are traced anew inside.

    Args:
      mode: True, or what `pallas_call(interpret=...)` takes, e.g. `pltpu.InterpretParams(detect_races=True)`.
    """
    return _context(mode)


def active_mode():
    """False, or the mode in which a call made now is interpreted."""
    return _context.value or os.environ.get("PALLAS_KERNELS_INTERPRET") == "1"
