"""Attention weights as an array, for looking at them and for changing them; the kernels never form it.

Dense and from the definition: O(T S) memory per head. Not supported: decode caches.
"""

from jaxtyping import Array, Float, Int

from pallas_kernels.blockwise import reference
from pallas_kernels.call import make_call


def attention_weights(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    w: Float[Array, "B S K H"] | None = None,
    beta: Float[Array, "B S K"] | None = None,
    log_forget: Float[Array, "B S N"] | None = None,
    *,
    scale: float | None = None,
    gate_scale: float = 1.0,
    window: int | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B N T S"]:
    """`softmax_j(s_ij)` of `path_attention` (with w and beta) or `forgetting_attention` (without).

    Args:
      q, k, w, beta, log_forget, scale, gate_scale, window, segment_ids: as in the two operations.

    Returns:
      Weights in float32, or float64 for float64 queries. Rows sum to 1, those of padding to 0.

    Raises:
      ValueError: for shapes, dtypes or values that do not fit, naming them.
    """
    call = make_call(
        q, k, k, w, beta, log_forget, segment_ids=segment_ids, scale=scale, gate_scale=gate_scale, window=window
    )
    return reference.attention_weights(call.options, call.inputs)[0]


def weighted_values(weights: Float[Array, "B N T S"], v: Float[Array, "B S K Hv"]) -> Float[Array, "B T N Hv"]:
    """`o_i = sum_j weights_ij v_j` in the dtype of the weights; query head n uses value head n // (N // K).

    Raises:
      ValueError: if the heads do not fit.
    """
    if weights.shape[1] % v.shape[2]:
        raise ValueError(f"weights {weights.shape} of {weights.shape[1]} heads do not fit {v.shape[2]} value heads")
    return reference.weighted_values(weights, v.astype(weights.dtype))
