"""Interventions on what a layer carries from token to token: recurrent states, and caches of keys and values."""

import numbers
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from path_jax.interpretability.hooks import unrolled_model
from path_jax.models import DecoderLM, LMOutput
from path_jax.models.cache import init_cache


def state_patch(
    model: DecoderLM,
    params,
    base: Int[Array, "B T"],
    source: Int[Array, "B T"],
    at: int | Int[Array, "B"],
    layers: Sequence[int],
    *,
    parts: Sequence[str] | None = None,
    **cache_options,
) -> LMOutput:
    """Runs `base` with the states that some layers have after the first `at` tokens of `source`.

    Both beginnings are read into decode caches; those layers' states change places; then the rest of `base` follows.

    Args:
      at: 0 < at < T; an int, which saves work, or one for each row.
      layers: whose states are replaced.
      parts: of a state, all by default: "memory" (what a recurrence carries) and "history" (the last inputs of short
        convolutions) of a recurrent mixer, "attention" (keys, values, gates) and "history" of an attention.
      **cache_options: see `models.cache.init_cache`.

    Returns:
      Output at all T positions, the first `at` of which are base's own; no cache.

    Raises:
      ValueError: for a layer, a part or a number of tokens that there is not.
      NotImplementedError: for a mixer that exposes its weights, which has no cache.
    """
    model, params = unrolled_model(model, params)
    (batch, length), num_layers = base.shape, model.config.num_layers
    if base.shape != source.shape:
        raise ValueError(f"base {base.shape} and source {source.shape} differ in shape")
    if not all(0 <= layer < num_layers for layer in layers):
        raise ValueError(f"layers {tuple(layers)} are not all among the model's {num_layers}")
    if isinstance(at, numbers.Integral) and not 0 < at < length:
        raise ValueError(f"{at=} must be between 0 and the length {length}")
    apply = lambda tokens, cache, lengths: model.apply({"params": params}, tokens, cache=cache, lengths=lengths)
    empty = init_cache(model.config, batch, length, **cache_options)
    if isinstance(at, numbers.Integral):
        before = apply(base[:, :at], empty, None)
        lent = apply(source[:, :at], empty, None).cache
        after = apply(base[:, at:], _exchanged(before.cache, lent, layers, parts), None)
        join = lambda x, y: jnp.concatenate([x, y], axis=1)
        return LMOutput(join(before.logits, after.logits), join(before.hidden, after.hidden))

    # Rows are cut at places of their own: what is not there is padding behind a row's tokens.
    index, at = jnp.arange(length), jnp.asarray(at)
    before = apply(base, empty, at)
    lent = apply(source, empty, at).cache
    rest = jnp.take_along_axis(base, (index + at[:, None]) % length, axis=1)
    after = apply(rest, _exchanged(before.cache, lent, layers, parts), length - at)

    def join(x: Float[Array, "B T D"], y: Float[Array, "B T D"]):
        moved = jnp.take_along_axis(y, ((index - at[:, None]) % length)[..., None], axis=1)
        return jnp.where((index < at[:, None])[..., None], x, moved)

    return LMOutput(join(before.logits, after.logits), join(before.hidden, after.hidden))


def _exchanged(cache, source, layers, parts):
    """A cache in which the layers have the source's states, or parts of them."""
    if parts is None:
        return tuple(source[i] if i in layers else state for i, state in enumerate(cache))
    names = [name for name in cache[0]._fields if name != "length"]
    if unknown := set(parts) - set(names):
        raise ValueError(f"a state has no {sorted(unknown)}; its parts are {names}")
    lent = [{name: getattr(state, name) for name in parts} for state in source]
    return tuple(state._replace(**lent[i]) if i in layers else state for i, state in enumerate(cache))
