"""Forgetting attention (FoX), and plain causal attention without a gate: the public operation."""

from jaxtyping import Array, Float, Int

from pallas_kernels.attend import attend
from pallas_kernels.call import AttentionCall, make_call


def forgetting_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    log_forget: Float[Array, "B S N"] | None,
    *,
    scale: float | None = None,
    gate_scale: float = 1.0,
    window: int | None = None,
    prune: float | str | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
):
    """Causal softmax attention with a data-dependent decay.

        s_ij = scale * q_i k_j + gate_scale * (c_i - c_j),  j <= i,   c = cumsum(log_forget),
        o_i = sum_j softmax_j(s_ij) v_j

    Time and memory are those of causal flash attention: nothing of size T x S is stored.

    Args:
      q: queries, any floating dtype; they are the last T of the S positions.
      k: keys; N is a multiple of K (query head n uses key head n // (N // K)).
      v: values; Hv may differ from H.
      log_forget: log forget gates per query head, <= 0, natural logarithm; None for attention without a gate.
      scale: logit scale, H**-0.5 by default.
      gate_scale: factor of the gate; 1 in the Forgetting Transformer.
      window: query i sees keys i - window + 1 ... i; None for all.
      prune: None, or a bound on the attention mass dropped per row ("auto" = e**-10): skips tiles that the gate has
        decayed below it. Needs log_forget.
      segment_ids: packed documents, each a contiguous run of one positive id; 0 is padding, which attends to nothing.
      implementation: "reference", "xla" or None for the best that accepts the call; see `explain`.
      return_lse: also return the log-sum-exp of the logits, differentiable.

    Returns:
      o [B, T, N, Hv] in q's dtype (padding: 0), and with return_lse also lse [B, N, T] float32 (padding: -inf). Both
      are accumulated in float32; float64 inputs are computed in float64.

    Raises:
      ValueError: for shapes, dtypes or values that do not fit, naming them.
      NotImplementedError: when the named implementation cannot serve the call.

    Source: Lin et al., "Forgetting Transformer: Softmax Attention with a Forget Gate", section 3.
    """
    call = _as_call(
        q, k, v, log_forget, scale=scale, gate_scale=gate_scale, window=window, prune=prune, segment_ids=segment_ids
    )
    return attend(call, implementation, return_lse)


def _as_call(
    q, k, v, log_forget, *, scale=None, gate_scale=1.0, window=None, prune=None, segment_ids=None
) -> AttentionCall:
    return make_call(
        q, k, v, log_forget=log_forget, segment_ids=segment_ids, scale=scale, gate_scale=gate_scale, window=window,
        prune=prune,
    )  # fmt: skip


forgetting_attention.as_call = _as_call  # for explain
