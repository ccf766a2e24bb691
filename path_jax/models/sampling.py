"""How a token is taken from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Sampling(NamedTuple):
    """How a token is taken from logits, and which tokens end a row."""

    temperature: float
    top_k: int | None
    top_p: float | None
    stop_tokens: tuple[int, ...]

    @property
    def fill(self) -> int:
        """What follows the end of a row."""
        return self.stop_tokens[0] if self.stop_tokens else 0

    def take(self, logits: Float[Array, "B V"], rng) -> Int[Array, "B"]:
        """A token for each row."""
        if self.temperature > 0:
            logits = restrict(logits / self.temperature, self.top_k, self.top_p)
            return jax.random.categorical(rng, logits).astype(jnp.int32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def is_stop(self, token: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Whether a token ends its row."""
        return jnp.isin(token, jnp.array(self.stop_tokens, jnp.int32))


def check_sampling(vocab_size: int, temperature, top_k, top_p, rng, stop_token) -> Sampling:
    """The arguments of `generate` of these names.

    Raises:
      ValueError: for one out of range.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be >= 0; 0 is greedy")
    if temperature > 0 and rng is None:
        raise ValueError(f"temperature={temperature} samples, which needs rng; pass rng=jax.random.key(0)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
    stop_tokens = () if stop_token is None else tuple(int(token) for token in np.atleast_1d(stop_token))
    for token in stop_tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop_token={token} must be in [0, {vocab_size=})")
    return Sampling(float(temperature), top_k, top_p, stop_tokens)


def restrict(logits: Float[Array, "B V"], top_k: int | None, top_p: float | None) -> Float[Array, "B V"]:
    """Returns `logits` with -inf for the tokens that top-k and then top-p sampling leave out."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = largest(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(descending, axis=-1)
        # A token stays if those before it hold less than top_p: so the first always does.
        is_kept = jnp.cumsum(probability, axis=-1) - probability < top_p
        smallest = jnp.min(jnp.where(is_kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def largest(x: Float[Array, "*rows n"], k: int) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
    """`jax.lax.top_k`, kept apart from what uses it.

    XLA merges top_k with a slice of its result, which on CPUs becomes a sort of the whole row: 30 times slower for a
    vocabulary.
    """
    return jax.lax.optimization_barrier(jax.lax.top_k(x, k))
