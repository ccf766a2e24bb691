"""Continuing token sequences where a token may leave the model after a layer that is deep enough for it.

The layers are cut into segments at the exits. After each segment an exit rule sees the residual stream; a token that
leaves gets its logits from there, `unembed(final_norm(x))`, and layers behind see it later or not at all:

* missing="recompute": the streams of tokens that left wait at their exit. The next token that goes deeper takes them
  along in one chunk, so every cache holds what full depth would have put there, and a step that goes deep reads the
  parameters once for all of them. Only the tokens' own logits are those of an exit.
* missing="propagate": layers behind the exit put the stream of the exit into their caches at once, without attention
  or MLP (Elbayad et al., "Depth-adaptive Transformer", 2020, arXiv 1910.10073). Later tokens see approximations.

Rows of a batch leave one by one: a segment runs for those that go on, in batches of powers of two. The host decides
between segments, which costs one transfer of a few bytes each.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from path_jax.mixers.state import put_rows, take_rows
from path_jax.models.cache import init_cache, unrolled
from path_jax.models.config import ModelConfig
from path_jax.models.decoder_lm import Block, DecoderLM
from path_jax.models.generate import append_rows, check_prompt, prefill
from path_jax.models.sampling import check_sampling, largest

# rule(exit, x, before, lens) -> is_done [R]: whether tokens may leave at exit number `exit` (an int32 scalar) with the
# residual stream x [R, D], which the last layer made of `before` [R, D]; lens(x) gives logits [R, V]. A pytree with
# __call__, so that its numbers are arguments of compiled programs.
ExitRule = Callable[[Array, Array, Array, Callable[[Array], Array]], Array]

MISSING = ("recompute", "propagate")


class Monitor(Protocol):
    """Compares some tokens that leave with what full depth says."""

    @property
    def is_tripped(self) -> bool:
        """Whether no token may leave any more."""

    def choose(self, num: int) -> Bool[np.ndarray, "num"]:
        """Which of the next `num` tokens that leave go on to full depth for a comparison."""

    def observe(self, agreed: Bool[np.ndarray, "n"]) -> None:
        """Whether the likeliest tokens of exit and full depth were the same."""


class EarlyExitOutput(NamedTuple):
    """What `generate_with_exits` returns."""

    tokens: Int[np.ndarray, "B S"]  # as of `generate`
    depths: Int[np.ndarray, "B M"]  # layers below each new token's logits; 0 behind the end of a row
    num_steps: int  # passes after the prompt
    num_layer_runs: int  # layers run in those passes, each once for all rows and chunks; L * num_steps at full depth


def generate_with_exits(
    model: DecoderLM,
    params: Mapping[str, Any],
    prompt: Int[Array, "T"] | Int[Array, "B T"] | Sequence[Sequence[int]],
    *,
    rule: ExitRule,
    exit_layers: Sequence[int],
    max_new_tokens: int,
    missing: str = "recompute",
    max_waiting: int = 7,
    min_margin: float = 0.0,
    monitor: Monitor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: jax.Array | None = None,
    stop_token: int | Sequence[int] | None = None,
    on_token: Callable[[Int[np.ndarray, "B"], Bool[np.ndarray, "B"]], Any] | None = None,
    cache_dtype=None,
) -> EarlyExitOutput:
    """Continues every row of `prompt` by `max_new_tokens` tokens, most of them from fewer than all layers.

    The prompt and the first new token take all layers. A rule that never fires gives the tokens of `generate`.

    Args:
      model, params, prompt, max_new_tokens, temperature, top_k, top_p, rng, stop_token, on_token, cache_dtype: see
        `generate`.
      rule: see `ExitRule`; those of `path_jax.interpretability.exit_rules` for example.
      exit_layers: layers after which a token may leave, ascending, of 0 ... L - 2. Segments of equal length share
        their compiled programs.
      missing: what layers behind an exit learn of a token, see the module's text.
      max_waiting: with "recompute", tokens of a row that may wait before one has to go through all layers.
      min_margin: a token whose two likeliest ones are closer in probability than this at its exit goes on to full
        depth.
      monitor: see `Monitor`; a chosen token goes on to full depth too.

    Raises:
      ValueError: for an argument out of range.
    """
    tokens, lengths = check_prompt(prompt, model.config.vocab_size, max_new_tokens)
    sampling = check_sampling(model.config.vocab_size, temperature, top_k, top_p, rng, stop_token)
    if missing not in MISSING:
        raise ValueError(f"{missing=} is unknown; choose from {', '.join(MISSING)}")
    if max_waiting < 1:
        raise ValueError(f"{max_waiting=} must be at least 1")
    if not 0 <= min_margin <= 1:
        raise ValueError(f"{min_margin=} must be in [0, 1]")
    config, params = unrolled(model.config, params)
    exit_layers = [int(layer) for layer in exit_layers]
    if exit_layers != sorted(set(exit_layers)) or not all(0 <= layer < config.num_layers - 1 for layer in exit_layers):
        raise ValueError(f"{exit_layers=} must ascend within 0 ... {config.num_layers - 2}, all layers but the last")
    rng = jax.random.key(0) if rng is None else rng

    model, batch = DecoderLM(config), len(tokens)
    cache = init_cache(config, batch, tokens.shape[1] + max_new_tokens, dtype=cache_dtype or config.dtype)
    lens = {name: params[name] for name in ("final_norm", "lm_head", "embed") if name in params}
    first = prefill(model, sampling, max_new_tokens, params, tokens, lengths, cache, rng)
    max_waiting = max_waiting if missing == "recompute" else None
    stack = _Stack(model, params, lens, rule, exit_layers, first.cache, max_waiting)
    take = functools.partial(_take, model, sampling, lens, rng=rng)

    new = np.full((batch, max_new_tokens), sampling.fill, np.int32)
    depths = np.zeros((batch, max_new_tokens), np.int32)
    is_running = np.ones(batch, bool)
    token, is_stop = np.asarray(first.new[:, 0]), np.asarray(first.is_stopped)
    depth = np.full(batch, config.num_layers)
    num_steps = 0
    for step in range(max_new_tokens):
        if step:
            num_steps += 1
            stack.push(token, is_running)
            is_tripped = monitor is not None and monitor.is_tripped
            stack.advance(is_running, stack.is_full | is_tripped)
            token, is_stop, best, margin = (np.asarray(x) for x in take(stack.newest, step=step))
            is_early = is_running & (stack.depth < config.num_layers)
            is_checked = np.zeros(batch, bool)
            if monitor is not None:
                is_checked[is_early] = monitor.choose(int(is_early.sum()))
            going_on = is_early & (is_checked | (margin < min_margin))
            if going_on.any():
                stack.advance(going_on, going_on)
                token, is_stop, full_best, _ = (np.asarray(x) for x in take(stack.newest, step=step))
                if is_checked.any():
                    monitor.observe((best == full_best)[is_checked])
            depth = stack.depth
            if missing == "propagate":
                stack.store(is_running)
        new[is_running, step] = token[is_running]
        depths[is_running, step] = depth[is_running]
        is_running = is_running & ~is_stop
        if on_token is not None and on_token(new[:, step].copy(), is_running) or not is_running.any():
            break
    tokens = append_rows(tokens, lengths, new, max_new_tokens, sampling.fill)
    return EarlyExitOutput(tokens, depths, num_steps, stack.num_layer_runs)


class _Stack:
    """The segments of a model, and the tokens of each row on their way through them.

    `waiting[j]` [B, W, D] has the streams of tokens that segment j has not seen, `counts[j]` [B] how many; the newest
    token of a row is behind segment `at[row] - 1`, its stream in `newest` [B, D].
    """

    def __init__(self, model, params, lens, rule, exit_layers, cache, max_waiting):
        config = model.config
        self._model, self._lens, self._rule, self._max_waiting = model, lens, rule, max_waiting
        self._embed = {name: params[name] for name in ("embed", "position_embed") if name in params}
        self._bounds = np.array([0, *(layer + 1 for layer in exit_layers), config.num_layers])
        layers = [range(first, end) for first, end in zip(self._bounds, self._bounds[1:])]
        # A layer's number matters for its mixer alone; without it equal segments are one program.
        self._mixers = [tuple(layer % len(config.mixers) for layer in segment) for segment in layers]
        self._params = [[params[f"layers_{layer}"] for layer in segment] for segment in layers]
        self._states = [tuple(cache[layer] for layer in segment) for segment in layers]
        batch, dtype = len(cache[0].length), jnp.dtype(config.dtype)
        width = 1 if max_waiting is None else max_waiting + 1
        self._waiting = [jnp.zeros((batch, width, config.embed_dim), dtype) for _ in layers]
        self._counts = np.zeros((len(layers), batch), np.int32)
        self._at = np.zeros(batch, np.int32)
        self.newest = jnp.zeros((batch, config.embed_dim), dtype)
        self.num_layer_runs = 0

    @property
    def is_full(self) -> Bool[np.ndarray, "B"]:
        """Whether the newest token of a row would be one too many to wait."""
        limit = np.inf if self._max_waiting is None else self._max_waiting
        return self._counts.sum(axis=0) > limit

    @property
    def depth(self) -> Int[np.ndarray, "B"]:
        """Layers below the newest stream of each row."""
        return self._bounds[self._at]

    def push(self, token: Int[np.ndarray, "B"], is_running: Bool[np.ndarray, "B"]) -> None:
        """A token more for each running row, before the first segment."""
        self._waiting[0] = _embed(self._model, self._embed, token, self._states[0][0].length, self._waiting[0])
        self._counts[0] = is_running
        self._at = np.zeros_like(self._at)

    def advance(self, rows: Bool[np.ndarray, "B"], is_forced: Bool[np.ndarray, "B"]) -> None:
        """Takes the newest tokens of rows deeper: through all segments where forced, else to where the rule stops."""
        rows = rows.copy()
        for j in range(len(self._states)):
            going = rows & (self._at == j)
            if going.any():
                rows[going] = self._cross(j, going) | is_forced[going]

    def store(self, rows: Bool[np.ndarray, "B"]) -> None:
        """Gives the newest streams of rows to the caches of the segments that have not seen the tokens."""
        for j in range(len(self._states)):
            behind = rows & (self._at <= j)
            if behind.any():
                index, _ = self._indices(behind)
                self._states[j] = _store(
                    self._model.config, self._mixers[j], self._params[j], self._states[j], self.newest,
                    behind.astype(np.int32), index,
                )  # fmt: skip
        self._counts[:] = 0

    def _cross(self, j: int, rows: Bool[np.ndarray, "B"]) -> Bool[np.ndarray, "R"]:
        """Takes all tokens of rows that wait at segment j through it; which newest ones must go on."""
        index, at = self._indices(rows)
        has_next = j + 1 < len(self._states)
        counts = np.where(rows, self._counts[j], 0)
        waits = self._counts[j + 1].copy() if has_next else None
        width = min(_power_of_two(counts.max()), self._waiting[j].shape[1])
        self.num_layer_runs += len(self._mixers[j])
        self._states[j], waiting, self.newest, is_done = _run(
            self._model, self._mixers[j], width, self._params[j], self._lens, self._rule,
            np.int32(j), self._states[j], self._waiting[j], self._waiting[j + 1] if has_next else None,
            self.newest, counts, waits, index,
        )  # fmt: skip
        self._at[rows] = j + 1
        if has_next:
            self._waiting[j + 1] = waiting
            self._counts[j + 1, rows] += self._counts[j, rows]
        self._counts[j, rows] = 0
        return ~np.asarray(is_done)[at] if has_next else np.zeros(rows.sum(), bool)

    def _indices(self, rows: Bool[np.ndarray, "B"]):
        """Rows to run, filled up with B to a power of two (None for all), and where among them each row is."""
        (found,) = np.nonzero(rows)
        size = _power_of_two(len(found))
        if size >= len(rows):
            return None, found
        return np.pad(found, (0, size - len(found)), constant_values=len(rows)).astype(np.int32), np.arange(len(found))


def _power_of_two(number: int) -> int:
    """The least one that is not smaller."""
    return 1 << (int(number) - 1).bit_length()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _take(model, sampling, lens, x, *, rng, step):
    """Of streams [B, D]: a token, whether it ends its row, the likeliest token and how far it is ahead."""
    logits = model.apply({"params": lens}, x, method="lens")
    token = sampling.take(logits, jax.random.fold_in(rng, step))
    top, best = largest(logits, 2)
    probability = jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    return token, sampling.is_stop(token), best[:, 0], probability[:, 0] - probability[:, 1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _embed(model, params, token, length, waiting):
    x = model.apply({"params": params}, token[:, None], length[:, None], method="embed_tokens")
    return waiting.at[:, 0].set(x[:, 0].astype(waiting.dtype))


def _taker(rows):
    """A function from [B, ...] to these rows of it, 0 for row B; None is all of them."""
    return (lambda x: x) if rows is None else (lambda x: jnp.take(x, rows, axis=0, mode="fill", fill_value=0))


def _through(config: ModelConfig, mixers, params, states, x, lengths, rows, **options):
    """The first `lengths` tokens of x [R, W, D] through some layers.

    Returns:
      x behind the last layer, x before it, and the states of all B rows.
    """
    part = states if rows is None else tuple(take_rows(state, rows) for state in states)
    positions = part[0].length[:, None] + jnp.arange(x.shape[1])
    new = []
    for layer, layer_params, state in zip(mixers, params, part):
        before = x
        x, state = Block(config, layer).apply({"params": layer_params}, x, positions, None, state, lengths, **options)
        new.append(state)
    return x, before, tuple(new) if rows is None else tuple(put_rows(*item, rows) for item in zip(states, new))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(7, 9, 10))
def _run(model, mixers, width, params, lens, rule, j, states, waiting, waiting_next, newest, counts, waits, rows):
    """One segment for some rows, their tokens of `waiting` in one chunk of `width`."""
    take = _taker(rows)
    lengths = take(counts)
    x, before, states = _through(model.config, mixers, params, states, take(waiting[:, :width]), lengths, rows)
    last, before = (
        jnp.take_along_axis(y, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0] for y in (x, before)
    )
    at = jnp.arange(len(newest)) if rows is None else rows
    newest = newest.at[jnp.where(lengths > 0, at, len(newest))].set(last.astype(newest.dtype), mode="drop")
    if waiting_next is None:
        return states, None, newest, None
    place = take(waits)[:, None] + jnp.arange(width)
    place = jnp.where(jnp.arange(width) < lengths[:, None], place, waiting_next.shape[1])
    waiting_next = waiting_next.at[at[:, None], place].set(x.astype(waiting_next.dtype), mode="drop")
    is_done = rule(j, last, before, lambda x: model.apply({"params": lens}, x, method="lens"))
    return states, waiting_next, newest, is_done


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _store(config: ModelConfig, mixers, params, states, newest, lengths, rows):
    """The states of a segment with one token more for some rows, whose stream is as it left."""
    take = _taker(rows)
    stream = take(newest)[:, None]
    return _through(config, mixers, params, states, stream, take(lengths), rows, only_cache=True)[2]
