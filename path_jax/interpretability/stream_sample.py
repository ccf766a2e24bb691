"""Residual streams of random tokens of a corpus, with the layers at which their best tokens saturate."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from path_jax.data import Batch
from path_jax.interpretability.hooks import Site, run
from path_jax.interpretability.logit_lens import unpacked
from path_jax.interpretability.saturation import saturation_layers
from path_jax.models import DecoderLM
from path_jax.models.sampling import largest


class StreamSample(NamedTuple):
    """Random tokens of a corpus, in no particular order."""

    streams: Float[np.ndarray, "L n D"]  # float32 residual streams after every layer
    layers: Int[np.ndarray, "k n"]  # at which the ranks saturate
    ids: Int[np.ndarray, "n k"]  # the model's best tokens
    rows: Int[np.ndarray, "n"]  # in which row of the corpus each token stands, over all batches
    positions: Int[np.ndarray, "n"]  # where in the row


def collect_streams(
    model: DecoderLM,
    params,
    batches: Iterable[Int[Array, "B T"] | Batch],
    k: int,
    *,
    num_tokens: int,
    seed: int = 0,
    chunk_size: int = 1024,
    as_published: bool = False,
) -> StreamSample:
    """Residual streams and saturation layers of random tokens of a corpus.

    Every token of the corpus draws a number, and those with the least `num_tokens` numbers are kept: a uniform sample
    without replacement, whatever the batches, in one pass. Only tokens that are kept so far reach the logit lens, and a
    batch without one is not run at all. On the host takes 4 * L * num_tokens * D bytes; on the device the residual
    streams of a batch [L, B, T, D] exist at once, and logits of one layer and `chunk_size` tokens.

    Args:
      model, params, k: see `logit_lens.top_tokens`.
      batches: tokens [B, T], or `Batch`, whose padding is left out. Each further shape is compiled anew.
      num_tokens: how many; all, if the corpus has fewer.
      seed: of the sample.
      chunk_size: tokens that go through the logit lens at a time.
      as_published: see `saturation_layers`.

    Raises:
      ValueError: for a number out of range, or if there are no tokens.
    """
    if not 1 <= k < model.config.vocab_size:
        raise ValueError(f"{k=} must be at least 1 and less than the vocabulary of {model.config.vocab_size}")
    if min(num_tokens, chunk_size) < 1:
        raise ValueError(f"{num_tokens=} and {chunk_size=} must be at least 1")
    rng, num_rows, num_layers = np.random.default_rng(seed), 0, model.config.num_layers
    numbers = np.full(num_tokens, np.inf)  # of the tokens kept; infinite where there is none yet
    streams = np.empty((num_layers, num_tokens, model.config.embed_dim), np.float32)
    ids = np.empty((num_layers, num_tokens, k), np.int32)
    places = np.empty((2, num_tokens), np.int64)
    for batch in batches:
        tokens, is_token, inputs = unpacked(batch)
        new = np.flatnonzero(is_token)
        drawn = np.concatenate([numbers, rng.random(len(new))])
        best = np.argsort(drawn, kind="stable")[:num_tokens]
        accepted = best[best >= num_tokens] - num_tokens
        slots = np.setdiff1d(np.arange(num_tokens), best)  # as many are given up
        rows, columns = np.unravel_index(new[accepted], np.shape(tokens))
        numbers[slots], places[:, slots] = drawn[num_tokens + accepted], (num_rows + rows, columns)
        num_rows += len(tokens)
        if not len(accepted):
            continue
        captured = _captured(model, params, jnp.asarray(tokens), inputs)
        for start in range(0, len(accepted), chunk_size):
            part, slot = new[accepted[start : start + chunk_size]], slots[start : start + chunk_size]
            chosen = np.resize(part, chunk_size)  # one shape, compiled once; what is repeated is cut off
            x, (_, best_ids) = jax.device_get(_read(model, params, captured, chosen, k))
            streams[:, slot], ids[:, slot] = x[:, : len(slot)], best_ids[:, : len(slot)]
    is_kept = np.isfinite(numbers)
    if not is_kept.any():
        raise ValueError("there are no tokens")
    if not is_kept.all():
        streams, ids, places = streams[:, is_kept], ids[:, is_kept], places[:, is_kept]
    return StreamSample(streams, saturation_layers(ids, as_published=as_published), ids[-1], *places)


@functools.partial(jax.jit, static_argnames="model")
def _captured(model, params, tokens, inputs) -> list[Float[Array, "B T D"]]:
    """Residual streams after every layer."""
    streams = [Site(layer, "resid_post") for layer in range(model.config.num_layers)]
    _, values = run(model, params, tokens, capture=streams, **inputs)
    return [values[site] for site in streams]


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _read(model, params, streams, chosen, k):
    """Streams [L, chunk, D] of the chosen tokens of a batch, and logits and ids [L, chunk, k] of their best tokens."""
    x = jnp.stack([stream.reshape(-1, stream.shape[-1])[chosen] for stream in streams])
    top = jax.lax.map(lambda x: largest(model.apply({"params": params}, x, method="lens"), k), x)
    return x.astype(jnp.float32), top
