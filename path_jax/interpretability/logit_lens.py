"""The logit lens: which tokens a model would predict if it stopped after a layer.

logits_l = unembed(final_norm(x_l)), x_l the residual stream after block l = 0 ... L - 1

The last ones are the model's own. Only the best tokens are kept, and logits exist for one layer and one chunk of
tokens at a time. The residual streams of a batch [L, B, T, D] exist at once.

Not supported: the embedding (there is no layer -1), a trained lens, decoding with a cache.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from path_jax.data import Batch
from path_jax.interpretability.hooks import Site, run
from path_jax.models import DecoderLM
from path_jax.models.sampling import largest


class TopTokens(NamedTuple):
    """The best tokens of every layer, best first, at every position [B, T] or for each of several tokens [n]."""

    ids: Int[Array, "L *tokens k"]  # int32
    logits: Float[Array, "L *tokens k+1"]  # float32; the last one is of the best token that is not among the ids


def top_tokens(
    model: DecoderLM, params, tokens: Int[Array, "B T"], k: int, *, chunk_size: int = 1024, **inputs
) -> TopTokens:
    """The k best tokens by the logit lens after every layer.

    Compiled, once for each model, k, chunk_size and shape; may be called inside another compiled function. Of equal
    logits the lower id is the better one (published code leaves their order to an unstable sort).

    Args:
      model: scanned or unrolled, with any mixers; params: of either shape.
      tokens: as for the model.
      k: how many, fewer than the vocabulary has.
      chunk_size: tokens of the batch whose logits exist at a time; takes chunk_size * V * 4 bytes.
      **inputs: further arguments of the model: positions, segment_ids.

    Returns:
      TopTokens with ids [L, B, T, k] and logits [L, B, T, k + 1].

    Raises:
      ValueError: for k or chunk_size out of range, or if there are no tokens.

    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020; as used by Lioubashevski et al., "Looking beyond
    the top-1: Transformers determine top tokens in order", 2024 (arXiv 2410.20210).
    """
    if not 1 <= k < model.config.vocab_size:
        raise ValueError(f"{k=} must be at least 1 and less than the vocabulary of {model.config.vocab_size}")
    if chunk_size < 1:
        raise ValueError(f"{chunk_size=} must be at least 1")
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens are {tokens.shape}, not some rows of some tokens [B, T]")
    return _top_tokens(model, params, tokens, dict(inputs), k, chunk_size)


def stream_top_tokens(
    model: DecoderLM, params, batches: Iterable[Int[Array, "B T"] | Batch], k: int, *, chunk_size: int = 1024
) -> Iterator[TopTokens]:
    """The k best tokens after every layer for a corpus, one batch at a time, each read when it is asked for.

    Args:
      model, params, k, chunk_size: see `top_tokens`.
      batches: tokens [B, T], or `Batch`, whose padding is left out. Each further shape is compiled anew.

    Yields:
      For every batch, NumPy ids [L, n, k] and logits [L, n, k + 1] of its n tokens, row after row.

    Raises:
      ValueError: as `top_tokens`.
    """
    for batch in batches:
        tokens, is_token, inputs = unpacked(batch)
        top = top_tokens(model, params, tokens, k, chunk_size=chunk_size, **inputs)
        yield TopTokens(*(x[:, is_token] for x in jax.device_get(top)))


def unpacked(batch: Int[Array, "B T"] | Batch) -> tuple[Int[Array, "B T"], Bool[np.ndarray, "B T"], dict[str, Array]]:
    """Tokens, which of them are no padding, and further arguments of a model."""
    if isinstance(batch, Batch):
        inputs = {"segment_ids": batch.segment_ids, "positions": batch.positions}
        return batch.tokens, np.asarray(batch.segment_ids) != 0, inputs
    return batch, np.ones(np.shape(batch), bool), {}


@functools.partial(jax.jit, static_argnames=("model", "k", "chunk_size"))
def _top_tokens(model, params, tokens, inputs, k, chunk_size) -> TopTokens:
    num_layers, num_tokens = model.config.num_layers, tokens.size
    streams = [Site(layer, "resid_post") for layer in range(num_layers)]
    _, values = run(model, params, tokens, capture=streams, **inputs)  # the compiler drops the logits
    num_chunks = -(-num_tokens // chunk_size)
    chunk_size = -(-num_tokens // num_chunks)
    x = jnp.stack([values[site].reshape(num_tokens, -1) for site in streams])
    x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk_size - num_tokens), (0, 0)])

    def best(x):
        return largest(model.apply({"params": params}, x, method="lens"), k + 1)

    def as_before(x):
        return x.reshape(num_layers, -1, x.shape[-1])[:, :num_tokens].reshape(num_layers, *tokens.shape, x.shape[-1])

    chunks = x.reshape(num_layers * num_chunks, chunk_size, -1)
    logits, ids = map(as_before, jax.lax.map(best, chunks))
    return TopTokens(ids[..., :k], logits)
