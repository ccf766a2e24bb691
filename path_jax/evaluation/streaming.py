"""Reading texts of any length in bounded memory, through the decode cache.

Rows are read C tokens per call of the model. What is held at a time is the cache and the activations of one chunk; the
logits of fewer tokens than that. Nothing has size T x T or T x V. One process and one device.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.cache import init_cache, unrolled
from path_jax.models.decoder_lm import LMCache

CHUNK = 512
_LOGIT_TOKENS = 64  # of a row, whose logits exist at a time
_NEW_TOKENS = 64  # generated tokens, and those of answers, are padded to multiples of this: few programs compile


class Prefix(NamedTuple):
    """Rows that have been read."""

    cache: LMCache
    hidden: Float[Array, "B D"]  # of each row's last token, after the final norm


class Reader:
    """A model that reads rows of tokens, `batch_size` at a time.

    Programs are compiled once for a model, batch size, chunk and cache size, whatever the texts.

    Args:
      model: The language model, scanned or unrolled.
      params: Its parameters.
      batch_size: Rows B of a call; fewer are filled up.
      max_length: Tokens that a row can have, with what is generated after it.
      chunk: Tokens C of a row per call; no more than `max_length` are taken.
      cache_dtype: Of keys and values; the model's compute dtype by default.

    Raises:
      ValueError: for a number out of range, or rows longer than the model can read.
    """

    def __init__(
        self,
        model: DecoderLM,
        params: Mapping[str, Any],
        *,
        batch_size: int,
        max_length: int,
        chunk: int = CHUNK,
        cache_dtype=None,
    ):
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self._config, self._params = unrolled(model.config, params)
        self._model = DecoderLM(self._config)
        self.batch_size, self.max_length, self._chunk = batch_size, max_length, min(chunk, max_length)
        self._cache_options = {} if cache_dtype is None else {"dtype": jnp.dtype(cache_dtype)}
        _check_capacity(self._config, max_length)

    def losses(self, rows: Sequence[Int[np.ndarray, "t"]]) -> list[Float[np.ndarray, "t-1"]]:
        """Returns `-log p(row_t | row_0 ... row_{t-1})` for t >= 1 in nats, float32; any number of rows.

        Args:
          rows: Token ids, at most `max_length` + 1 in a row: the last is never read.
        """
        found = [np.zeros(max(len(row) - 1, 0), np.float32) for row in rows]
        for begin in range(0, len(rows), self.batch_size):
            batch = rows[begin : begin + self.batch_size]
            inputs, targets = [row[:-1] for row in batch], [row[1:] for row in batch]
            cache = self._start(inputs)
            for start, tokens, count in self._chunks(inputs):
                following = self._slice(targets, start)[1]
                cache, losses = _read_losses(self._model, self._params, cache, tokens, following, count)
                for out, values, size in zip(found[begin:], np.asarray(losses), count):
                    out[start : start + size] = values[:size]
        return found

    def read(self, prompts: Sequence[Int[np.ndarray, "t"]]) -> Prefix:
        """Reads up to `batch_size` prompts, of one token at least each."""
        if len(prompts) > self.batch_size or not all(map(len, prompts)):
            raise ValueError(f"give up to {self.batch_size} prompts of at least one token each")
        cache = self._start(prompts)
        hidden = jnp.zeros((self.batch_size, self._config.embed_dim), jnp.dtype(self._config.dtype))
        prefix = Prefix(cache, self._placed(hidden))
        for _, tokens, count in self._chunks(prompts):
            prefix = _read(self._model, self._params, prefix, tokens, count)
        return prefix

    def score(
        self, prefix: Prefix, answers: Sequence[Int[np.ndarray, "a"]]
    ) -> list[tuple[Float[np.ndarray, "a"], Bool[np.ndarray, "a"]]]:
        """Scores answers, each of at least one token, after rows that have been read; `prefix` stays as it is.

        While it runs there are two caches, `prefix` and a copy that grows.

        Returns:
          For each answer the losses of its tokens in nats, given those before, and whether they are the likeliest.
        """
        size = _padded(max(map(len, answers)))
        tokens, count = self._filled(answers, size)
        losses, is_greedy = jax.device_get(_score(self._model, self._params, prefix, tokens, count))
        return [(x[: len(a)], y[: len(a)]) for a, x, y in zip(answers, losses, is_greedy)]

    def generate(self, prefix: Prefix, num_new: int) -> Int[np.ndarray, "B num_new"]:
        """Continues all rows greedily by `num_new` tokens, and uses `prefix` up."""
        _, new = _generate(self._model, _padded(num_new), self._params, prefix, num_new)
        return np.asarray(new)[:, :num_new]

    def _start(self, rows) -> LMCache:
        longest = max(map(len, rows), default=0)
        if longest > self.max_length:
            raise ValueError(f"a row has {longest} tokens, more than max_length={self.max_length}")
        return self._placed(init_cache(self._config, self.batch_size, self.max_length, **self._cache_options))

    def _placed(self, arrays):
        """Where the parameters are: a program whose results are elsewhere than what it was given compiles twice."""
        param = jax.tree.leaves(self._params)[0]
        sharding = param.sharding if isinstance(param, jax.Array) else None
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return jax.device_put(arrays, sharding)

    def _chunks(self, rows):
        """(start, tokens [B, C], how many of them are there [B]) until the longest row ends."""
        for start in range(0, max(map(len, rows), default=0), self._chunk):
            yield self._slice(rows, start)

    def _slice(self, rows, start):
        return start, *self._filled([row[start : start + self._chunk] for row in rows], self._chunk)

    def _filled(self, rows, size):
        """Tokens [B, size], zeros behind, and how many there are."""
        tokens, count = np.zeros((self.batch_size, size), np.int32), np.zeros(self.batch_size, np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)], count[index] = row, len(row)
        return tokens, count


def capacity(config: ModelConfig, wanted: int) -> int:
    """The longest row, up to `wanted` tokens, that a cache of the model holds; learned positions end somewhere."""
    low, high = 0, wanted + 1
    while high - low > 1:
        middle = wanted if low == 0 and high == wanted + 1 else (low + high) // 2
        try:
            _check_capacity(config, middle)
            low = middle
        except ValueError:
            high = middle
    return low


def answer_room(num_new: int) -> int:
    """Tokens that `Reader.max_length` needs beyond the prompts for answers and generated texts of so many."""
    return _padded(num_new)


def _padded(size: int) -> int:
    return -(-size // _NEW_TOKENS) * _NEW_TOKENS


def _check_capacity(config: ModelConfig, max_length: int) -> None:
    """Raises ValueError if rows cannot be that long."""
    jax.eval_shape(lambda: init_cache(config, 1, max_length))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read_losses(model, params, cache, tokens, targets, count):
    out = model.apply({"params": params}, tokens, cache=cache, lengths=count)
    losses, _ = _target_losses(model, params, out.hidden, targets)
    return out.cache, losses


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(model, params, prefix, tokens, count):
    out = model.apply({"params": params}, tokens, cache=prefix.cache, lengths=count)
    last = jnp.take_along_axis(out.hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return Prefix(out.cache, jnp.where(count[:, None] > 0, last, prefix.hidden))


@functools.partial(jax.jit, static_argnums=0)
def _score(model, params, prefix, tokens, count):
    out = model.apply({"params": params}, tokens, cache=prefix.cache, lengths=count)
    hidden = jnp.concatenate([prefix.hidden[:, None], out.hidden[:, :-1]], axis=1)
    return _target_losses(model, params, hidden, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _generate(model, size, params, prefix, num_new):
    def likeliest(hidden):
        return jnp.argmax(model.apply({"params": params}, hidden, method="unembed"), axis=-1).astype(jnp.int32)

    def take_step(i, carry):
        prefix, new = carry
        token = jax.lax.dynamic_slice_in_dim(new, i - 1, 1, axis=1)
        out = model.apply({"params": params}, token, cache=prefix.cache)
        prefix = Prefix(out.cache, out.hidden[:, 0])
        return prefix, jax.lax.dynamic_update_slice_in_dim(new, likeliest(prefix.hidden)[:, None], i, axis=1)

    new = jnp.zeros((len(prefix.hidden), size), jnp.int32).at[:, 0].set(likeliest(prefix.hidden))
    return jax.lax.fori_loop(1, num_new, take_step, (prefix, new))


def _target_losses(
    model: DecoderLM, params, hidden: Float[Array, "B C D"], targets: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
    """-log p of targets in nats, and whether they are the likeliest; the logits of a few tokens exist at a time."""
    batch, length = targets.shape
    size = math.gcd(length, _LOGIT_TOKENS)

    def score(piece):
        logits = model.apply({"params": params}, piece[0], method="unembed")
        chosen = jnp.take_along_axis(logits, piece[1][..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.argmax(logits, axis=-1) == piece[1]

    pieces = (hidden.reshape(batch, -1, size, hidden.shape[-1]), targets.reshape(batch, -1, size))
    pieces = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), pieces)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, length), jax.lax.map(score, pieces))
