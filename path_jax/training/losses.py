"""Next-token cross-entropy with z-loss, as sums and weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]):
    """Per-token cross-entropy and squared log-partition, both in nats and float32."""
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_partition - target_logits, jnp.square(log_partition)


def next_token_loss(
    unembed: Callable,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk_size: int = 0,
):
    """Weighted sums of cross-entropy and z-loss, without ever holding the logits of more than a chunk.

    Args:
      unembed: hidden states -> float32 logits.
      weights: 1 where the target counts.
      chunk_size: tokens per row whose logits exist at a time, recomputed in the backward pass; 0 for all at once.

    Returns:
      (sum of weight * cross-entropy, sum of weight * log_partition^2, sum of weights).
    """

    def sums(hidden, targets, weights):
        loss, squared = token_losses(unembed(hidden), targets)
        return jnp.sum(loss * weights), jnp.sum(squared * weights)

    length = hidden.shape[1]
    if not chunk_size or chunk_size >= length:
        return *sums(hidden, targets, weights), weights.sum()

    def chunks(x):
        x = jnp.pad(x, [(0, 0), (0, -length % chunk_size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:]), 1, 0)

    def body(total, chunk):
        loss, squared = jax.checkpoint(sums)(*chunk)
        return (total[0] + loss, total[1] + squared), None

    zero = jnp.zeros((), jnp.float32)
    (loss, squared), _ = jax.lax.scan(body, (zero, zero), (chunks(hidden), chunks(targets), chunks(weights)))
    return loss, squared, weights.sum()
