"""Loss by position up to a multiple of the training length, from one full forward pass or through the decode cache.

A model that extrapolates has a curve that keeps falling, or stays flat, beyond its training length.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from path_jax.data import Document
from path_jax.evaluation.perplexity import make_target_losses
from path_jax.evaluation.streaming import CHUNK, Reader
from path_jax.models import DecoderLM

_MAX_FORWARD = 16384  # tokens of a text that one forward pass reads, unless told otherwise


class LossByPosition:
    """Mean loss in nats of the targets at each range of positions.

    Calling the object with parameters returns `loss_at_00064`, the mean over the bucket of positions that ends at 64
    tokens, for every bucket, and `loss_within_train_length` and `loss_beyond_train_length`, the means over the
    positions up to and beyond the training length. `losses` then has the mean of every position.

    Args:
      model: The language model.
      documents: Held-out texts. Those of at least `multiple * train_length + 1` tokens are read from their start, one
        by one. Where there are too few, consecutive shorter documents are joined into long ones without the opening
        tokens of all but the first. No token is read twice.
      train_length: Sequence length of training.
      multiple: The model reads `multiple * train_length` tokens, at least 2.
      batch_size: Texts per forward pass.
      max_documents: Long texts to read.
      num_buckets: Ranges of positions, at most one for each position.
      chunk: Tokens of a text per call of the model, which keeps a decode cache, so that memory hardly grows with the
        length; 0 for one forward pass. By default 0 for texts of up to 16384 tokens and 512 for longer ones.

    Raises:
      ValueError: for a number out of range, or a corpus without one long text.
    """

    def __init__(
        self,
        model: DecoderLM,
        documents: Sequence[Document],
        *,
        train_length: int,
        multiple: int = 4,
        batch_size: int = 2,
        max_documents: int = 16,
        num_buckets: int = 16,
        chunk: int | None = None,
    ):
        for name, value, least in (
            ("train_length", train_length, 1),
            ("multiple", multiple, 2),
            ("batch_size", batch_size, 1),
            ("max_documents", max_documents, 1),
            ("num_buckets", num_buckets, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        length = multiple * train_length
        chunk = (0 if length <= _MAX_FORWARD else CHUNK) if chunk is None else chunk
        if chunk < 0:
            raise ValueError(f"chunk={chunk} must be at least 0")
        if num_buckets > length:
            raise ValueError(f"num_buckets={num_buckets} is more than the {length} positions; lower it")
        self._rows = long_rows(documents, length + 1, max_documents)
        self._train_length, self._batch_size = train_length, batch_size
        self._edges = np.linspace(0, length, num_buckets + 1).round().astype(int)
        self._model, self._chunk = model, chunk
        self._losses = make_target_losses(model)
        self.losses: np.ndarray | None = None  # [T]

    def loss_by_position(self, params: Mapping[str, Any]) -> Float[np.ndarray, "T"]:
        """Returns the mean loss in nats of the target at each position, float64 [multiple * train_length]."""
        num_rows, width = self._rows.shape
        if self._chunk:
            reader = Reader(self._model, params, batch_size=self._batch_size, max_length=width - 1, chunk=self._chunk)
            return np.mean(reader.losses(list(self._rows)), axis=0, dtype=np.float64)
        total = np.zeros(width - 1)
        for begin in range(0, num_rows, self._batch_size):
            rows = self._rows[begin : begin + self._batch_size]
            missing = self._batch_size - len(rows)  # the last batch is filled up, so that one shape compiles
            is_real = np.pad(np.ones_like(rows[:, 1:]), [(0, missing), (0, 0)])
            padded = np.pad(rows, [(0, missing), (0, 0)])
            losses = np.asarray(self._losses(params, padded[:, :-1], padded[:, 1:], is_real))
            total += losses[: len(rows)].sum(axis=0, dtype=np.float64)
        return total / num_rows

    def __call__(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Returns the mean loss of each bucket, within and beyond the training length."""
        losses = self.losses = self.loss_by_position(params)
        buckets = zip(self._edges[:-1], self._edges[1:])
        curve = {f"loss_at_{stop:05d}": float(losses[start:stop].mean()) for start, stop in buckets}
        return curve | {
            "loss_within_train_length": float(losses[: self._train_length].mean()),
            "loss_beyond_train_length": float(losses[self._train_length :].mean()),
        }


def long_rows(documents: Sequence[Document], width: int, max_rows: int) -> Int[np.ndarray, "R T"]:
    """Returns texts of exactly `width` tokens: long documents' starts first, then short documents joined.

    Args:
      documents: Texts that open with a token that is context only; a joined text keeps only the first of these.
      width: Tokens of a row, at least 1.
      max_rows: Rows to return at most, at least 1.

    Returns:
      int32 [R, width] with 1 <= R <= max_rows.

    Raises:
      ValueError: The documents together are too short for one row.
    """
    long, joined, pending, num_pending, num_tokens = [], [], [], 0, 0
    for document in documents:
        tokens = document.tokens
        num_tokens += len(tokens)
        if len(tokens) >= width:
            long.append(tokens[:width])
            if len(long) == max_rows:
                break
        elif len(joined) < max_rows:
            pending.append(tokens[1:] if pending else tokens)
            num_pending += len(pending[-1])
            if num_pending >= width:
                joined.append(np.concatenate(pending)[:width])
                pending, num_pending = [], 0
    rows = (long + joined)[:max_rows]
    if not rows:
        raise ValueError(
            f"the held-out documents hold {num_tokens} tokens, too few for one text of {width}; hold out more text or "
            "lower the length"
        )
    return np.stack(rows).astype(np.int32)
