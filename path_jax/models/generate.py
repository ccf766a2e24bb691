"""Continuing token sequences with a decode cache, greedily or by sampling."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from path_jax.models.cache import init_cache, unrolled
from path_jax.models.decoder_lm import DecoderLM, LMCache
from path_jax.models.sampling import Sampling, check_sampling


def generate(
    model: DecoderLM,
    params: Mapping[str, Any],
    prompt: Int[Array, "T"] | Int[Array, "B T"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: jax.Array | None = None,
    stop_token: int | Sequence[int] | None = None,
    on_token: Callable[[Int[np.ndarray, "B"], Bool[np.ndarray, "B"]], Any] | None = None,
    cache_dtype=None,
) -> Int[Array, "B S"]:
    """Continues every row of `prompt` by `max_new_tokens` tokens.

    The prompt is read once; every new token then costs one step of the model. One compilation serves all calls with the
    same model, shapes and options; `rng` and the lengths of the prompts may change.

    Args:
      model: The language model.
      params: Its parameters, unrolled, or scanned, which every call copies into the unrolled form.
      prompt: Token ids in [0, V), at least one per row; int [T] or [B, T], or B sequences of any lengths.
      max_new_tokens: At least 1.
      temperature: Divides the logits before sampling, >= 0; 0 takes the likeliest token.
      top_k: Samples among the k likeliest tokens only (more where the k-th is tied).
      top_p: Samples among the fewest likeliest tokens that hold this much probability, in (0, 1], after `top_k`.
      rng: Key of `jax.random`, needed where temperature > 0.
      stop_token: One or more tokens that end a row once generated; the rest of the row is filled with the first.
      on_token: Called with every step's tokens and with which rows run on, as soon as they are there; generation stops
        where it returns True.
      cache_dtype: Of cached keys and values; the model's compute dtype by default.

    Returns:
      int32 [B, S], S the longest prompt + max_new_tokens: each row its prompt, what follows it, and where its prompt is
      shorter, filling. A prompt [T] gives B = 1.

    Raises:
      ValueError: for an argument out of range.
    """
    tokens, lengths = check_prompt(prompt, model.config.vocab_size, max_new_tokens)
    sampling = check_sampling(model.config.vocab_size, temperature, top_k, top_p, rng, stop_token)
    rng = jax.random.key(0) if rng is None else rng

    config, params = unrolled(model.config, params)
    cache = init_cache(config, len(tokens), tokens.shape[1] + max_new_tokens, dtype=cache_dtype or config.dtype)
    model = DecoderLM(config)
    state = prefill(model, sampling, max_new_tokens, params, tokens, lengths, cache, rng)
    if on_token is None:
        state = _decode(model, sampling, max_new_tokens - 1, params, state, rng)
    else:
        for step in range(max_new_tokens):
            state = _decode(model, sampling, 1, params, state, rng) if step else state
            is_running = ~np.asarray(state.is_stopped)
            if on_token(np.asarray(state.new[:, step]), is_running) or not is_running.any():
                break
    new = np.asarray(state.new[:, : int(state.step)])
    return jnp.asarray(append_rows(tokens, lengths, new, max_new_tokens, sampling.fill))


def append_rows(tokens, lengths, new: Int[np.ndarray, "B t"], max_new_tokens: int, fill: int) -> Int[np.ndarray, "B S"]:
    """Each row its prompt, what follows it, and filling."""
    out = np.full((len(tokens), tokens.shape[1] + max_new_tokens), fill, np.int32)
    for row, (length, new_tokens) in enumerate(zip(lengths, new)):
        out[row, :length] = tokens[row, :length]
        out[row, length : length + len(new_tokens)] = new_tokens
    return out


class DecodeState(NamedTuple):
    """Between two steps."""

    cache: LMCache  # of all tokens but the last
    new: Array  # [B, max_new_tokens], tokens so far
    is_stopped: Array  # [B]
    step: Array  # tokens so far


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def prefill(model, sampling, max_new_tokens, params, tokens, lengths, cache, rng):
    """Reads the prompts and takes the first token after them."""
    out = model.apply({"params": params}, tokens, cache=cache, lengths=lengths)
    last = jnp.take_along_axis(out.hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    logits = model.apply({"params": params}, last, method="unembed")
    batch = len(tokens)
    new = jnp.zeros((batch, max_new_tokens), jnp.int32)
    state = DecodeState(out.cache, new, jnp.zeros(batch, bool), jnp.zeros((), jnp.int32))
    return _take_token(sampling, logits, state, rng)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(model, sampling, num_steps, params, state, rng):
    """Up to `num_steps` further tokens."""
    end = state.step + num_steps

    def take_step(state):
        token = jax.lax.dynamic_slice_in_dim(state.new, state.step - 1, 1, axis=1)
        lengths = jnp.where(state.is_stopped, 0, 1)
        out = model.apply({"params": params}, token, cache=state.cache, lengths=lengths)
        return _take_token(sampling, out.logits[:, 0], state._replace(cache=out.cache), rng)

    return jax.lax.while_loop(lambda state: (state.step < end) & ~state.is_stopped.all(), take_step, state)


def _take_token(sampling: Sampling, logits: Float[Array, "B V"], state: DecodeState, rng) -> DecodeState:
    """One more token per row, of these logits."""
    token = sampling.take(logits, jax.random.fold_in(rng, state.step))
    token = jnp.where(state.is_stopped, sampling.fill, token)
    new = jax.lax.dynamic_update_slice_in_dim(state.new, token[:, None], state.step, axis=1)
    is_stopped = state.is_stopped | sampling.is_stop(token)
    return DecodeState(state.cache, new, is_stopped, state.step + 1)


def check_prompt(prompt, vocab_size: int, max_new_tokens: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Tokens, padded behind, and how many there are.

    Raises:
      ValueError: for anything but rows of ids, or no new tokens.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    is_ragged = isinstance(prompt, Sequence) and any(np.ndim(row) == 1 for row in prompt)
    rows = [np.asarray(row) for row in prompt] if is_ragged else list(np.atleast_2d(np.asarray(prompt)))
    for array in rows:
        if array.dtype.kind not in "iu" or array.ndim != 1 or array.size == 0:
            raise ValueError(f"prompt is {array.dtype} {list(array.shape)}; give at least one integer per row")
        if array.min() < 0 or array.max() >= vocab_size:
            raise ValueError(f"prompt has ids {array.min()} to {array.max()}; they must be in [0, {vocab_size=})")
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max(initial=1)), np.int32)
    for row, array in enumerate(rows):
        tokens[row, : len(array)] = array
    return tokens, lengths
