"""Continuing token sequences, greedily or by sampling.

Each new token costs a forward pass over the whole buffer: there is no cache of keys, and prompts of one batch have the
same length.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from path_jax.models.decoder_lm import DecoderLM


def generate(
    model: DecoderLM,
    params: Mapping[str, Any],
    prompt: Int[Array, "T"] | Int[Array, "B T"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: jax.Array | None = None,
    stop_token: int | None = None,
) -> Int[Array, "B S"]:
    """Continues every row of `prompt` by `max_new_tokens` tokens.

    One compilation serves all calls with the same model, shapes and options; `rng` may change.

    Args:
      model: The language model.
      params: Its parameters.
      prompt: Token ids in [0, V), at least one; int [T] or [B, T].
      max_new_tokens: S - T, at least 1.
      temperature: Divides the logits before sampling, >= 0; 0 takes the likeliest token.
      top_k: Samples among the k likeliest tokens only (more where the k-th is tied).
      top_p: Samples among the fewest likeliest tokens that hold this much probability, in (0, 1], after `top_k`.
      rng: Key of `jax.random`, needed where temperature > 0.
      stop_token: Ends a row once it is generated; the rest of the row is filled with it.

    Returns:
      int32 [B, S]: the prompt and what follows it. A prompt [T] gives B = 1.

    Raises:
      ValueError: for an argument out of range.
    """
    prompt = _checked_prompt(prompt, model.config.vocab_size)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be >= 0; 0 is greedy")
    if temperature > 0 and rng is None:
        raise ValueError(f"temperature={temperature} samples, which needs rng; pass rng=jax.random.key(0)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
    if stop_token is not None and not 0 <= stop_token < model.config.vocab_size:
        raise ValueError(f"stop_token={stop_token} must be in [0, vocab_size={model.config.vocab_size})")
    rng = jax.random.key(0) if rng is None else rng
    return _decode(model, params, prompt, rng, max_new_tokens, float(temperature), top_k, top_p, stop_token)


def restrict(logits: Float[Array, "B V"], top_k: int | None, top_p: float | None) -> Float[Array, "B V"]:
    """Returns `logits` with -inf for the tokens that top-k and then top-p sampling leave out."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(descending, axis=-1)
        # A token stays if those before it hold less than top_p: so the first always does.
        is_kept = jnp.cumsum(probability, axis=-1) - probability < top_p
        smallest = jnp.min(jnp.where(is_kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7, 8))
def _decode(model, params, prompt, rng, max_new_tokens, temperature, top_k, top_p, stop_token):
    batch, length = prompt.shape
    fill = 0 if stop_token is None else stop_token
    buffer = jnp.pad(prompt, [(0, 0), (0, max_new_tokens)], constant_values=fill)

    def is_running(carry):
        index, _, is_stopped = carry
        return (index < length + max_new_tokens) & ~jnp.all(is_stopped)

    def step(carry):
        index, buffer, is_stopped = carry
        # What the buffer holds from `index` on does not matter: the model is causal. Only one position is unembedded.
        hidden = model.apply({"params": params}, buffer).hidden
        last = jax.lax.dynamic_index_in_dim(hidden, index - 1, axis=1, keepdims=False)
        logits = model.apply({"params": params}, last, method="unembed")
        if temperature > 0:
            logits = restrict(logits / temperature, top_k, top_p)
            token = jax.random.categorical(jax.random.fold_in(rng, index - length), logits)
        else:
            token = jnp.argmax(logits, axis=-1)
        token = jnp.where(is_stopped, fill, token).astype(buffer.dtype)
        if stop_token is not None:
            is_stopped = is_stopped | (token == stop_token)
        return index + 1, jax.lax.dynamic_update_slice_in_dim(buffer, token[:, None], index, axis=1), is_stopped

    return jax.lax.while_loop(is_running, step, (length, buffer, jnp.zeros(batch, bool)))[1]


def _checked_prompt(prompt, vocab_size: int) -> Int[np.ndarray, "B T"]:
    array = np.asarray(prompt)
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or 0 in array.shape:
        raise ValueError(f"prompt is {array.dtype} {list(array.shape)}; give at least one integer, [T] or [B, T]")
    if array.min() < 0 or array.max() >= vocab_size:
        raise ValueError(f"prompt has ids {array.min()} to {array.max()}; they must be in [0, vocab_size={vocab_size})")
    return np.atleast_2d(array).astype(np.int32)
