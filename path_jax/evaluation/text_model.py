"""Text in, log-likelihoods and text out: any checkpoint with its vocabulary, as standard benchmarks ask for it.

One process and one device; sequences longer than `max_length` must be cut by the caller.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from path_jax.checkpoints import load_pretrained
from path_jax.checkpoints.folders import read_json
from path_jax.checkpoints.gguf import GgufFile
from path_jax.data import ByteTokenizer, LearnedTokenizer
from path_jax.evaluation.pretrained import vocabulary_of
from path_jax.evaluation.text_codec import opening_of
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.cache import init_cache, unrolled
from path_jax.models.decoder_lm import LMCache
from path_jax.models.generate import generate

_DEFAULT_LENGTH = 2048  # where neither the model nor its configuration has a limit
_MIN_LENGTH = 16  # shorter sequences are padded to this
_LOGIT_ROWS = 256  # positions whose logits exist at a time

Tokens = tuple[int, ...]
Progress = Callable[[int], Any]  # called with how many more are done


class Score(NamedTuple):
    """Of a continuation."""

    log_likelihood: float  # nats, <= 0
    is_greedy: bool  # whether every token of it is the likeliest one


class _Row(NamedTuple):
    """One sequence that the model reads; the last inputs' targets are the tokens of each continuation."""

    context: Tokens
    inputs: Tokens
    continuations: Sequence[Tokens]


class TextModel:
    """A language model with its vocabulary.

    Args:
      config, params: The model, scanned or unrolled.
      tokenizer: See `vocabulary_of`.
      end_ids: Tokens that end a text.
      prefix_id: Token that precedes a text without a context; by default what opens texts, or else ends them.
      add_bos: Whether texts open with a token: True for `prefix_id` (or what the vocabulary opens texts with), False
        for none, None for the vocabulary's own rules. Those of bytes open with 256 if the model has that id.
      max_length: Inputs per forward pass; the model's learned positions bound it.
      batch_size: Rows per forward pass.

    Raises:
      ValueError: for a number out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any],
        tokenizer: ByteTokenizer | LearnedTokenizer,
        *,
        end_ids: Sequence[int] = (),
        prefix_id: int | None = None,
        add_bos: bool | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
    ):
        limit = config.num_positions or np.inf
        self.max_length = int(min(_DEFAULT_LENGTH, limit)) if max_length is None else max_length
        if not 1 <= self.max_length <= limit:
            raise ValueError(f"max_length={max_length} must be at least 1 and at most the model's {limit} positions")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        is_opened = isinstance(tokenizer, ByteTokenizer) and config.vocab_size >= tokenizer.vocab_size
        self._own = () if isinstance(tokenizer, ByteTokenizer) else opening_of(tokenizer)
        self._rule = (tokenizer.bos_id,) if is_opened else self._own
        self.prefix_id = prefix_id if prefix_id is not None else next(iter((*self._rule, *end_ids)), None)
        if self.prefix_id is not None and not 0 <= self.prefix_id < config.vocab_size:
            raise ValueError(f"prefix_id={prefix_id} must be in [0, vocab_size={config.vocab_size})")
        self.config, self.params = unrolled(config, params)
        self.tokenizer, self.end_ids, self.batch_size = tokenizer, tuple(end_ids), batch_size
        self._add_bos = add_bos
        self._model = DecoderLM(self.config)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: str | None = None,
        *,
        max_length: int | None = None,
        prefix_id: int | None = None,
        **options,
    ) -> "TextModel":
        """Loads any checkpoint that `load_pretrained` does.

        Args:
          path, dtype: See `load_pretrained`.
          max_length: By default the length that config.json states, that a run was trained with, or 2048.
          prefix_id: By default the token that the checkpoint opens texts with, or else ends them with.
          **options: `add_bos` and `batch_size`.
        """
        path = Path(path)
        config, params = load_pretrained(path, dtype)
        tokenizer, end_ids = vocabulary_of(path, config)
        raw = read_json(path / "config.json") if path.is_dir() else {}
        if max_length is None and not config.num_positions:
            stated = raw.get("max_position_embeddings", (raw.get("data") or {}).get("sequence_length"))
            max_length = stated if isinstance(stated, int) and stated > 0 else None
        if prefix_id is None:
            prefix_id = _stated_prefix(path, raw, tokenizer)
        return cls(config, params, tokenizer, end_ids=end_ids, prefix_id=prefix_id, max_length=max_length, **options)

    @property
    def reads_bytes(self) -> bool:
        """Whether a token is a byte."""
        return isinstance(self.tokenizer, ByteTokenizer)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Returns the ids of `text`.

        Args:
          text: A string.
          add_bos: See the class, whose choice this overrides. Unless it is given, a text that starts with the opening
            token gets no other.
        """
        ids = self.tokenizer.encode(text).tolist()[len(self._own) :]
        choice = self._add_bos if add_bos is None else add_bos
        opening = self._rule if choice is not False else ()
        if choice and not opening:
            opening = (self.need_prefix(),)
        is_there = add_bos is None and tuple(ids[: len(opening)]) == opening
        return ids if is_there else [*opening, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`."""
        return self.tokenizer.decode(ids)

    def need_prefix(self) -> int:
        """Returns `prefix_id`.

        Raises:
          ValueError: if there is none.
        """
        if self.prefix_id is None:
            raise ValueError("the checkpoint names no token to start a text with; give a prefix token")
        return self.prefix_id

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], on_progress: Progress = lambda n: None
    ) -> list[Score]:
        """Returns the `Score` of every continuation, given its context.

        Equal pairs are computed once, continuations that differ in their last token by one forward pass. A context of
        several other continuations is read once where that saves tokens, and they go on from its decode cache.

        Args:
          pairs: Ids of (context, continuation), neither empty; the last `max_length` + 1 of their ids count.
          on_progress: Called with how many more pairs are done.

        Raises:
          ValueError: for a pair that cannot be scored.
        """
        keys = [self._cut(*pair) for pair in pairs]
        counts = collections.Counter(keys)
        contexts: dict[Tokens, dict[Tokens, list[Tokens]]] = {}  # {context: {its last token and on: continuations}}
        for context, continuation in counts:
            tail = (*context[-1:], *continuation[:-1])
            contexts.setdefault(context, {}).setdefault(tail, []).append(continuation)
        alone, shared = [], []
        for context, tails in contexts.items():
            if self._is_worth_sharing(context, tails):
                shared.append([_Row(context, *item) for item in tails.items()])
            else:
                alone += [_Row(context, context[:-1] + tail, found) for tail, found in tails.items()]
        scores = {}
        for key, score in itertools.chain(self._score_alone(alone), self._score_shared(shared)):
            scores[key] = score
            on_progress(counts[key])
        return [scores[key] for key in keys]

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop: Sequence[str] = (),
        on_progress: Progress = lambda n: None,
        **sampling,
    ) -> list[str]:
        """Returns what follows each prompt, up to a token that ends texts or one of the strings `stop`.

        Args:
          prompts: Ids, not empty; the last `max_length` - max_new_tokens of them count.
          max_new_tokens: At least 1.
          stop: Strings that end a text and do not belong to it.
          on_progress: Called with how many more prompts are done.
          **sampling: `temperature`, `top_k`, `top_p` and `rng` of `generate`; greedy by default.

        Raises:
          ValueError: if no room is left for a prompt, or it is empty.
        """
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ValueError(f"{max_new_tokens=} leaves no room for a prompt in max_length={self.max_length}")
        if not all(map(len, prompts)):
            raise ValueError("a prompt is empty")
        texts = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        for chunk in _chunks(order, self.batch_size):
            rows = [list(prompts[i])[-room:] for i in chunk]
            size = self._padded(len(rows[0]), reserve=max_new_tokens)
            # Rows of zeros fix the shape, so that prompts of all lengths share few compilations.
            fill = [[0] * size] * (self.batch_size + 1 - len(rows))
            texts |= zip(chunk, self._complete(rows, fill, max_new_tokens, [s for s in stop if s], sampling))
            on_progress(len(chunk))
        return [texts[i] for i in range(len(prompts))]

    def _complete(self, rows, fill, max_new_tokens, stop, sampling) -> list[str]:
        found: list[list[int]] = [[] for _ in rows]
        is_done = [False] * len(rows)
        # A token has a byte at least. The decoder may read the first ones differently, so there are some more.
        reach = 8 + max((len(s.encode()) for s in stop), default=0)

        def on_token(tokens, _):
            for i, ids in enumerate(found):
                if not is_done[i] and tokens[i] in self.end_ids:
                    is_done[i] = True
                elif not is_done[i]:
                    ids.append(int(tokens[i]))
                    text = self.decode(ids[-reach:]) if stop else ""
                    is_done[i] = any(s in text for s in stop)
            return all(is_done)

        generate(
            self._model, self.params, rows + fill, max_new_tokens=max_new_tokens, on_token=on_token,
            stop_token=self.end_ids or None, **sampling,
        )  # fmt: skip
        texts = [self.decode(ids) for ids in found]
        return [text[: min((text.find(s) for s in stop if s in text), default=None)] for text in texts]

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Tokens, Tokens]:
        """The last `max_length` + 1 ids of both."""
        size = len(continuation)
        if not 1 <= size <= self.max_length or not len(context):
            raise ValueError(
                f"cannot score {size} tokens after {len(context)}: neither may be empty, and the model reads "
                f"max_length={self.max_length}"
            )
        whole = (*context, *continuation)[-(self.max_length + 1) :]
        return whole[:-size], whole[-size:]

    def _padded(self, length: int, least: int = _MIN_LENGTH, reserve: int = 0) -> int:
        """The next power of two, within the learned positions less `reserve`."""
        size = max(least, 1 << (length - 1).bit_length() if length else 1)
        return min(size, self.config.num_positions - reserve) if self.config.num_positions else size

    def _is_worth_sharing(self, context: Tokens, tails: Sequence[Tokens]) -> bool:
        prefix, tail = self._padded(len(context) - 1), self._padded(max(map(len, tails)))
        is_fitting = not self.config.num_positions or prefix + tail <= self.config.num_positions
        separate = sum(self._padded(len(context) - 1 + len(x)) for x in tails)
        return len(tails) > 1 and is_fitting and prefix + len(tails) * tail < separate

    def _score_alone(self, rows: list[_Row]):
        """Yields ((context, continuation), score), every row read from its beginning."""
        for chunk in _chunks(sorted(rows, key=lambda row: len(row.inputs), reverse=True), self.batch_size):
            tokens, lengths = self._inputs([row.inputs for row in chunk])
            yield from self._scores(chunk, tokens, lengths)

    def _score_shared(self, groups: list[list[_Row]]):
        """Yields ((context, continuation), score), where all rows of a group have one context."""
        order = lambda group: (self._padded(len(group[0].context)), len(group))
        for chunk in _chunks(sorted(groups, key=order, reverse=True), self.batch_size):
            tokens, lengths = self._inputs([group[0].context[:-1] for group in chunk])
            size = self._padded(max(len(row.inputs) for group in chunk for row in group))
            cache = init_cache(self.config, self.batch_size, tokens.shape[1] + size)
            cache = _read(self._model, self.params, tokens, lengths, cache)
            for rows in itertools.zip_longest(*chunk, fillvalue=_Row((), (), ())):
                tokens, lengths = self._inputs([row.inputs for row in rows], size)
                yield from self._scores(rows, tokens, lengths, cache)

    def _inputs(self, rows: Sequence[Tokens], size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [batch_size, size], padded behind, and how many there are."""
        size = self._padded(max(map(len, rows))) if size is None else size
        tokens, lengths = np.zeros((self.batch_size, size), np.int32), np.zeros(self.batch_size, np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)], lengths[index] = row, len(row)
        return tokens, lengths

    def _scores(self, rows: Sequence[_Row], tokens, lengths, cache: LMCache | None = None):
        num = self._padded(max(len(row.continuations) for row in rows), least=1)
        size = self._padded(max(len(x) for row in rows for x in row.continuations), least=1)
        targets = np.zeros((self.batch_size, num, size), np.int32)
        for row, array in zip(rows, targets):
            for continuation, target in zip(row.continuations, array):
                target[size - len(continuation) :] = continuation
        log_p, is_hit = map(np.asarray, _score(self._model, self.params, tokens, lengths, targets, cache))
        for row, values, hits in zip(rows, log_p, is_hit):
            for continuation, value, hit in zip(row.continuations, values, hits):
                part = slice(size - len(continuation), size)
                score = Score(float(value[part].sum(dtype=np.float64)), bool(hit[part].all()))
                yield (row.context, continuation), score


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _read(model: DecoderLM, params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], cache: LMCache) -> LMCache:
    return model.apply({"params": params}, tokens, cache=cache, lengths=lengths).cache


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: DecoderLM,
    params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    targets: Int[Array, "B C S"],
    cache: LMCache | None,
) -> tuple[Float[Array, "B C S"], Bool[Array, "B C S"]]:
    """Log p of C times S targets of each row's last S tokens, and whether they are the likeliest; S may exceed them."""
    if cache is None:
        is_inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
        hidden = model.apply({"params": params}, tokens, segment_ids=is_inside.astype(jnp.int32)).hidden
    else:
        hidden = model.apply({"params": params}, tokens, cache=cache, lengths=lengths).hidden
    batch, num, size = targets.shape
    places = jnp.maximum(lengths[:, None] - size + jnp.arange(size), 0)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)

    def at_one_place(x):
        logits = model.apply({"params": params}, x[0], method="unembed")
        return logits[x[1]] - jax.nn.logsumexp(logits), jnp.argmax(logits) == x[1]

    places = (hidden.reshape(batch * size, -1), jnp.swapaxes(targets, 1, 2).reshape(batch * size, num))
    answers = jax.lax.map(at_one_place, places, batch_size=min(_LOGIT_ROWS, batch * size))
    return tuple(jnp.swapaxes(x.reshape(batch, size, num), 1, 2) for x in answers)


def _stated_prefix(path: Path, raw: Mapping[str, Any], tokenizer: ByteTokenizer | LearnedTokenizer) -> int | None:
    """The token that opens texts, or else ends them, as Hugging Face's tokenizer would say; None if nothing does."""
    if not path.is_dir():
        with GgufFile(path) as file:
            return (file.vocabulary() or {}).get("bos_id")
    if isinstance(tokenizer, LearnedTokenizer) and (path / "tokenizer_config.json").is_file():
        settings = read_json(path / "tokenizer_config.json")
        for name in ("bos_token", "eos_token"):
            token = settings.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            ids = tokenizer.encode(token).tolist()[len(opening_of(tokenizer)) :] if isinstance(token, str) else []
            if len(ids) == 1:
                return ids[0]
    found = raw.get("bos_token_id")
    return found if isinstance(found, int) else None


def _chunks(items: Sequence, size: int):
    return (items[begin : begin + size] for begin in range(0, len(items), size))
