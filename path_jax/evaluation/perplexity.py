"""Perplexity of held-out documents by sliding windows.

Each document is read by itself, so nothing depends on the order or packing of a corpus. Recurrent evaluation with a
carried state is not offered: every window is a full forward pass.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from path_jax.data import Document
from path_jax.models import DecoderLM

# Multiples of this visit documents in an order of which every beginning is spread over the whole corpus.
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def target_losses(
    model: DecoderLM,
    params: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Returns `-log p(targets_t | tokens_0 ... tokens_t)` in nats, float32; meaningless where segment_ids is 0."""
    logits = model.apply({"params": params}, tokens, segment_ids=segment_ids).logits
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def make_target_losses(model: DecoderLM) -> Callable[..., Float[Array, "B T"]]:
    """Returns a compiled `target_losses` of one model, to be called with params and arrays of one shape."""
    return jax.jit(functools.partial(target_losses, model))


@dataclasses.dataclass(frozen=True)
class _Window:
    """Inputs [start, stop) of a document, of which the targets of inputs [first, stop) are scored."""

    document: int
    start: int
    first: int
    stop: int


class Perplexity:
    """Loss per target of held-out documents, each target scored once.

    A window of `window` inputs advances by `stride` and scores the targets that no earlier window has scored. So a
    target has at least `window - stride` inputs of context before its own, and less only near the start of its
    document. Calling the object with parameters returns

      loss: mean of -log p over the scored targets, in nats;
      perplexity: exp(loss);
      bits_per_byte: loss / ln 2. That is bits per token, which for byte tokens is bits per byte;
      tokens: number of scored targets.

    Args:
      model: The language model.
      documents: Texts whose first token is context only, as `path_jax.data` makes them.
      window: Inputs per forward pass, at least 1.
      stride: Advance of the window in [1, window]; `window` makes windows that do not overlap.
      batch_size: Windows per forward pass.
      max_tokens: Number of targets to score, or None for all. The beginnings of documents spread over the corpus are
        scored, each of about the same length; the choice is the same in every call. None reads a lazy corpus as a
        whole.

    Raises:
      ValueError: for a number out of range, or documents without a target.
    """

    def __init__(
        self,
        model: DecoderLM,
        documents: Sequence[Document],
        *,
        window: int,
        stride: int,
        batch_size: int = 8,
        max_tokens: int | None = None,
    ):
        for name, value in (("window", window), ("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 1 <= stride <= window:
            raise ValueError(f"stride={stride} must be in [1, window={window}], or targets between windows are lost")
        self._documents = _beginnings(documents, max_tokens, window)
        if not self._documents:
            raise ValueError("no held-out document has two tokens, so there is nothing to score")
        self._window, self._stride, self._batch_size = window, stride, batch_size
        self._losses = make_target_losses(model)

    def scored_tokens(self) -> list[Int[np.ndarray, "n"]]:
        """Returns the targets that are scored, one array per document."""
        return [tokens[1:] for tokens in self._documents]

    def per_token_loss(self, params: Mapping[str, Any]) -> list[Float[np.ndarray, "n"]]:
        """Returns the loss of each target in nats, one float32 array per document, as `scored_tokens` lists them."""
        losses = [np.zeros(len(tokens) - 1, np.float32) for tokens in self._documents]
        windows = list(self._windows())
        for begin in range(0, len(windows), self._batch_size):
            batch = windows[begin : begin + self._batch_size]
            rows = np.asarray(self._losses(params, *self._arrays(batch)))
            for window, row in zip(batch, rows):
                scored = row[window.first - window.start : window.stop - window.start]
                losses[window.document][window.first : window.stop] = scored
        return losses

    def __call__(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Returns loss, perplexity, bits_per_byte and tokens; sums are float64."""
        losses = self.per_token_loss(params)
        num_tokens = sum(map(len, losses))
        loss = sum(float(x.sum(dtype=np.float64)) for x in losses) / num_tokens
        return {
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "bits_per_byte": loss / math.log(2),
            "tokens": float(num_tokens),
        }

    def _windows(self) -> Iterator[_Window]:
        for number, tokens in enumerate(self._documents):
            start = first = 0
            while first < len(tokens) - 1:
                stop = min(start + self._window, len(tokens) - 1)
                yield _Window(number, start, first, stop)
                start, first = start + self._stride, stop

    def _arrays(self, batch: Sequence[_Window]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns tokens, targets and segment ids [batch_size, window]; every batch has that shape, so one compiles."""
        tokens, targets, segment_ids = np.zeros((3, self._batch_size, self._window), np.int32)
        for row, window in enumerate(batch):
            source, size = self._documents[window.document], window.stop - window.start
            tokens[row, :size] = source[window.start : window.stop]
            targets[row, :size] = source[window.start + 1 : window.stop + 1]
            segment_ids[row, :size] = 1
        return tokens, targets, segment_ids


def _beginnings(documents: Sequence[Document], max_tokens: int | None, window: int) -> list[np.ndarray]:
    """Returns the tokens to read of each document that has a target, with `max_tokens` targets if there are so many.

    Documents are taken in a spread order until one window of each would fill the budget, then share it: all are cut at
    one common length. Cutting into fewer than a window's tokens would score targets with too little context only.
    """
    if max_tokens is None:
        return [document.tokens for document in documents if len(document.tokens) > 1]
    chosen, size = {}, 0
    for index in np.argsort(np.arange(len(documents)) * _GOLDEN_RATIO % 1, kind="stable"):
        if size >= max_tokens:
            break
        tokens = documents[int(index)].tokens
        if len(tokens) > 1:
            chosen[int(index)] = tokens
            size += min(len(tokens) - 1, window)
    chosen = [chosen[index] for index in sorted(chosen)]
    num_targets = np.array([len(tokens) - 1 for tokens in chosen], np.int64)
    cut, high = 0, max_tokens  # the largest common length whose sum stays within the budget, by bisection
    while cut < high:
        middle = (cut + high + 1) // 2
        cut, high = (middle, high) if np.minimum(num_targets, middle).sum() <= max_tokens else (cut, middle - 1)
    left = max_tokens - int(np.minimum(num_targets, cut).sum())
    is_longer = num_targets > cut
    lengths = np.minimum(num_targets, cut) + (is_longer & (np.cumsum(is_longer) <= left))
    return [tokens[: length + 1] for tokens, length in zip(chosen, lengths) if length]
