"""One validated attention call: what the public operations hand to an implementation.

All checks on user input live here and in the signatures of the operations, so implementations need none.
"""

import dataclasses
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.blockwise import pruning


class Inputs(NamedTuple):
    """The arrays of a call; also the tuple of their cotangents. `w is None`: no reflections (FoX)."""

    q: Array  # [B, T, N, H]
    k: Array  # [B, S, K, H]
    v: Array  # [B, S, K, Hv]
    w: Array | None  # [B, S, K, H]
    beta: Array | None  # [B, S, K]
    log_forget: Array | None  # [B, S, N]
    segment_ids: Array | None  # [B, S]

    @property
    def accumulator_dtype(self):
        """float32, or float64 when the queries are float64."""
        return jnp.promote_types(jnp.float32, self.q.dtype)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in a call, with defaults filled in."""

    scale: float
    gate_scale: float
    window: int | None
    prune_mass: float | None
    interpret: object = False  # how to interpret accelerator kernels, or False
    keep_versions: bool = (
        False  # keep what the linear stage computed for the backward pass, where an implementation can
    )


class AttentionCall(NamedTuple):
    """A checked call of an attention operation."""

    inputs: Inputs
    options: Options


def make_call(
    q, k, v, w=None, beta=None, log_forget=None, *, segment_ids, scale, gate_scale, window=None, prune=None
) -> AttentionCall:
    """Checks the arguments and fills in defaults.

    Raises:
      ValueError: naming the offending shapes, dtypes or values.
    """
    _check_array("q", q, "B T N H")
    _check_array("k", k, "B S K H")
    _check_array("v", v, "B S K Hv")
    batch, length, num_heads, head_dim = q.shape
    kv_length, num_kv_heads = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch and head dim")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k {k.shape} and v {v.shape} must agree in batch, length and heads")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads (q {q.shape}) are not a multiple of {num_kv_heads} key heads (k {k.shape})"
        )
    if 0 in (batch, length, head_dim, v.shape[3]):
        raise ValueError(f"empty axis in q {q.shape} or v {v.shape}")
    if length > kv_length:
        raise ValueError(f"{length} queries but only {kv_length} keys: queries are the last positions of the keys")
    if (w is None) != (beta is None):
        raise ValueError("w and beta must be given together")
    if w is not None:
        if length != kv_length:
            raise ValueError(f"q {q.shape} and k {k.shape} must have one length")
        _check_array("w", w, "B T K H", k.shape)
        _check_array("beta", beta, "B T K", k.shape[:3])
    if log_forget is not None:
        _check_array("log_forget", log_forget, "B S N", (batch, kv_length, num_heads))
    if segment_ids is not None:
        if not hasattr(segment_ids, "dtype") or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids must be an integer array, got {getattr(segment_ids, 'dtype', type(segment_ids))}"
            )
        if segment_ids.shape != (batch, kv_length):
            raise ValueError(f"segment_ids {segment_ids.shape} must be {(batch, kv_length)}")
        _check_not_negative("segment_ids", segment_ids)
        if log_forget is not None:
            # Padding lies in no path, so its gate changes nothing; its gradient shall be 0 and not rounding.
            log_forget = jnp.where(segment_ids[:, :, None] > 0, log_forget, 0)
    if window is not None and (not isinstance(window, numbers.Integral) or window < 1):
        raise ValueError(f"{window=} must be a positive integer or None")
    options = Options(
        scale=head_dim**-0.5 if scale is None else _check_number("scale", scale),
        gate_scale=_check_number("gate_scale", gate_scale),
        window=None if window is None or window >= kv_length else int(window),
        prune_mass=_prune_mass(prune, log_forget),
    )
    return AttentionCall(Inputs(q, k, v, w, beta, log_forget, segment_ids), options)


def _check_array(name, x, axes, shape=None):
    if not hasattr(x, "shape") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating-point array, got {getattr(x, 'dtype', type(x).__name__)}")
    if len(x.shape) != len(axes.split()) or (shape is not None and x.shape != shape):
        expected = f"[{axes}]" if shape is None else f"[{axes}] = {shape}"
        raise ValueError(f"{name} has shape {x.shape}, expected {expected}")


def _check_not_negative(name, x):
    """Checked when the values are at hand; under tracing negative ids count as padding."""
    is_at_hand = not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
    if is_at_hand and (smallest := np.asarray(x).min()) < 0:
        raise ValueError(f"{name} must be >= 0 (0 = padding), got {smallest}")


def _check_number(name, value):
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{name}={value!r} must be a number known when the call is traced")
    return float(value)


def _prune_mass(prune, log_forget):
    if prune is None:
        return None
    if log_forget is None:
        raise ValueError(f"{prune=} needs log_forget: the forget gate is what bounds the dropped mass")
    mass = pruning.AUTO_MASS if prune == "auto" else prune
    if not isinstance(mass, numbers.Real) or not 0 < mass < 1:
        raise ValueError(f"{prune=} must be None, 'auto' or a number in (0, 1)")
    return float(mass)
