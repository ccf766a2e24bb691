"""PaTH and PaTH-FoX attention, the public operation.

Not supported: fewer queries than keys (decoding has its own cache), sliding windows.
"""

from jaxtyping import Array, Float, Int

from pallas_kernels.attend import attend
from pallas_kernels.call import AttentionCall, make_call


def path_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    w: Float[Array, "B T K H"],
    beta: Float[Array, "B T K"],
    log_forget: Float[Array, "B T N"] | None = None,
    *,
    scale: float | None = None,
    gate_scale: float = 1.0,
    prune: float | str | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
):
    """Causal attention whose position encoding is a product of data-dependent reflections.

        s_ij = scale * q_i H_i H_{i-1} ... H_{j+1} k_j + gate_scale * (c_i - c_j),   j <= i
        H_t = I - beta_t w_t w_t^T,   c = cumsum(log_forget),   o_i = sum_j softmax_j(s_ij) v_j

    Time is that of causal flash attention plus a linear stage; memory is linear in T in the forward pass, and the
    backward pass stores inputs, output and lse and recomputes the rest (transiently O(T log T)).

    Args:
      q: queries, any floating dtype.
      k: keys; N is a multiple of K (grouped queries: query head n uses key head n // (N // K)).
      v: values; Hv may differ from H.
      w: reflection directions, used as given: unit norm is the caller's duty, dw is with respect to w as given. Keep w
        and beta in float32; rounding a direction moves every logit whose path crosses it.
      beta: reflection strengths in [0, 2].
      log_forget: log forget gates per query head, <= 0, natural logarithm; None for PaTH without a gate.
      scale: logit scale, H**-0.5 by default.
      gate_scale: factor of the gate; pass the logit scale to reproduce flash-linear-attention's PaTH-FoX.
      prune: None, or a bound on the attention mass dropped per row ("auto" = e**-10): skips tiles that the forget gate
        has decayed below it. Needs log_forget, |w| <= 1 and beta in [0, 2].
      segment_ids: packed documents, each a contiguous run of one positive id; 0 is padding, which attends to nothing.
      implementation: "reference", "xla" or None for the best that accepts the call; see `explain`.
      return_lse: also return the log-sum-exp of the logits, differentiable.

    Returns:
      o [B, T, N, Hv] in q's dtype (padding: 0), and with return_lse also lse [B, N, T] float32 (padding: -inf). Both
      are accumulated in float32; float64 inputs are computed in float64.

    Raises:
      ValueError: for shapes, dtypes or values that do not fit, naming them.
      NotImplementedError: when the named implementation cannot serve the call.

    Source: Yang et al., "PaTH Attention: Position Encoding via Accumulating Householder Transformations", section 3;
    the frame tree replaces their right-to-left sweep. With log_forget: their PaTH-FoX.
    """
    call = _as_call(
        q, k, v, w, beta, log_forget, scale=scale, gate_scale=gate_scale, prune=prune, segment_ids=segment_ids
    )
    return attend(call, implementation, return_lse)


def _as_call(
    q, k, v, w, beta, log_forget=None, *, scale=None, gate_scale=1.0, prune=None, segment_ids=None
) -> AttentionCall:
    if w is None or beta is None:
        raise ValueError("path_attention needs w and beta; forgetting_attention has neither")
    return make_call(
        q, k, v, w, beta, log_forget, segment_ids=segment_ids, scale=scale, gate_scale=gate_scale, prune=prune
    )


path_attention.as_call = _as_call  # for explain
