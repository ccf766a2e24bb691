"""Next-token cross-entropy with z-loss, as sums and weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from path_jax.parallel.sharding import constrain


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

    return *_sum_over_chunks(sums, (hidden, targets, weights), chunk_size), weights.sum()


def teacher_divergence(
    unembed: Callable,
    hidden: Float[Array, "B T D"],
    teacher_unembed: Callable,
    teacher_hidden: Float[Array, "B T D"],
    weights: Float[Array, "B T"],
    *,
    chunk_size: int = 0,
):
    """Sum of weight * KL(teacher's next-token distribution || ours) in nats, and the sum of weights.

    Arguments as for `next_token_loss`.
    """

    def sums(hidden, teacher_hidden, weights):
        ours, theirs = (jax.nn.log_softmax(x) for x in (unembed(hidden), teacher_unembed(teacher_hidden)))
        return (jnp.sum(weights * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)),)

    return *_sum_over_chunks(sums, (hidden, teacher_hidden, weights), chunk_size), weights.sum()


def _sum_over_chunks(sums, arrays, chunk_size):
    """`sums(*arrays)`, chunk by chunk along axis 1 where a size is given."""
    length = arrays[0].shape[1]
    if not chunk_size or chunk_size >= length:
        return sums(*arrays)

    num_chunks = -(-length // chunk_size)

    def chunks(x):
        # Token t goes to chunk t % num_chunks, so that every chunk spans all shards of the sequence.
        x = jnp.pad(x, [(0, 0), (0, -length % num_chunks)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(x.shape[0], -1, num_chunks, *x.shape[2:]), 2, 0)
        return constrain(x, None, "batch", "length", *[None] * (x.ndim - 3))

    cut = tuple(chunks(x) for x in arrays)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, *(x[0] for x in cut)))
    add = lambda total, chunk: (jax.tree.map(jnp.add, total, jax.checkpoint(sums)(*chunk)), None)
    return jax.lax.scan(add, zeros, cut)[0]
