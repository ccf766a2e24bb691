"""Runs a checked call through one implementation, under one custom derivative.

The forward pass keeps the inputs, the output, the log-sum-exp and what the implementation wants to see again, which
grows as T; the rest of the linear stage is recomputed in the backward pass.
"""

import dataclasses
import functools

import jax

from pallas_kernels import dispatch, interpreter
from pallas_kernels.blockwise import reference
from pallas_kernels.call import AttentionCall


def attend(call: AttentionCall, implementation: str | None, return_lse: bool):
    """What the public operations return."""
    choice = dispatch.choose(call, implementation)
    options, inputs = dataclasses.replace(call.options, interpret=interpreter.active_mode()), call.inputs
    if choice == (("default", "reference"),):
        out, lse = reference.attention(options, inputs)
    else:
        out, lse = _compiled(choice, options, inputs)
    out = out.astype(inputs.q.dtype)
    return (out, lse) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(choice, options, inputs):
    out, lse, _ = dispatch.forward(choice, options, inputs)
    return out, lse


def _attend_fwd(choice, options, inputs):
    out, lse, kept = dispatch.forward(choice, options, inputs)
    return (out, lse), (inputs, out, lse, kept)


def _attend_bwd(choice, options, residuals, cotangents):
    return (dispatch.backward(choice, options, *residuals, *cotangents),)


_attend.defvjp(_attend_fwd, _attend_bwd)
# Outside of `jax.jit` one program, rather than hundreds for one operation each.
_compiled = jax.jit(_attend, static_argnums=(0, 1), inline=True)
