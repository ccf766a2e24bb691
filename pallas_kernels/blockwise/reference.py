"""Attention from its definition, dense, in the inputs' precision (at least float32). No tricks: this is the oracle.

Memory is O(T S) forward and O(T S H) for gradients of PaTH. `prune` is accepted and drops nothing, which keeps every
bound.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.call import AttentionCall, Inputs, Options


def refuses(call: AttentionCall) -> str | None:
    """Every legal call is served."""
    del call
    return None


def path_logits(q, k, w, beta):
    """`q_i H_i H_{i-1} ... H_{j+1} k_j` for all i, j: when token t arrives, every key so far is hit by H_t.

    Args:
      q: [B, T, K, G, H]; k, w: [B, T, K, H]; beta: [B, T, K].

    Returns:
      [B, K, G, T, T]; entries with j > i are 0.
    """
    length = q.shape[1]

    def arrive(keys, token):
        index, q, k, w, beta = token
        along = jnp.einsum("bskh,bkh->bsk", keys, w)
        keys = keys - (beta[:, None] * along)[..., None] * w[:, None]
        keys = keys.at[:, index].set(k)  # H_t is not applied to its own key
        return keys, jnp.einsum("bskh,bkgh->bkgs", keys, q)

    tokens = (jnp.arange(length), *(jnp.moveaxis(x, 1, 0) for x in (q, k, w, beta)))
    return jnp.moveaxis(jax.lax.scan(arrive, jnp.zeros_like(k), tokens)[1], 0, 3)


def attention_weights(options: Options, inputs: Inputs):
    """Weights [B, N, T, S] and log-sum-exp [B, N, T], in the accumulator dtype; values are not looked at."""
    dtype = inputs.accumulator_dtype
    q, k = (x.astype(dtype) for x in (inputs.q, inputs.k))
    batch, length, num_heads, _ = q.shape
    kv_length, num_kv_heads = k.shape[1:3]
    q = q.reshape(batch, length, num_kv_heads, -1, q.shape[-1])
    if inputs.w is None:
        logits = jnp.einsum("btkgh,bskh->bkgts", q, k)
    else:
        logits = path_logits(q, k, inputs.w.astype(dtype), inputs.beta.astype(dtype))
    logits = options.scale * logits.reshape(batch, num_heads, length, kv_length)
    if inputs.log_forget is not None:
        gate = jnp.moveaxis(jnp.cumsum(inputs.log_forget.astype(dtype), axis=1), 1, 2)
        logits += options.gate_scale * (gate[:, :, kv_length - length :, None] - gate[:, :, None, :])

    distance = jnp.arange(kv_length - length, kv_length)[:, None] - jnp.arange(kv_length)[None, :]
    mask = distance >= 0
    if options.window is not None:
        mask &= distance < options.window
    if inputs.segment_ids is not None:
        query_ids = inputs.segment_ids[:, kv_length - length :, None]
        mask = (mask & (query_ids == inputs.segment_ids[:, None, :]) & (query_ids > 0))[:, None]
    # A row that sees nothing gets logits 0 before the mask is applied again, so that neither value nor gradient is NaN.
    sees_something = mask.any(-1, keepdims=True)
    logits = jnp.where(mask, logits, jnp.where(sees_something, -jnp.inf, 0))
    weights = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return weights, jnp.where(sees_something[..., 0], lse, -jnp.inf)


def weighted_values(weights, v):
    """`o_i = sum_j weights_ij v_j`: [B, N, T, S] and [B, S, K, Hv] to [B, T, N, Hv]."""
    batch, num_heads, length, kv_length = weights.shape
    weights = weights.reshape(batch, v.shape[2], -1, length, kv_length)
    return jnp.einsum("bkgts,bskv->btkgv", weights, v).reshape(batch, length, num_heads, -1)


def attention(options: Options, inputs: Inputs):
    """Output [B, T, N, Hv] and log-sum-exp [B, N, T], in the accumulator dtype."""
    weights, lse = attention_weights(options, inputs)
    return weighted_values(weights, inputs.v.astype(weights.dtype)), lse
