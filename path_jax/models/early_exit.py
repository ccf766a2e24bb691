"""Continuing token sequences where a token may leave the model after a layer that is deep enough for it.

The layers are cut into segments at the exits. After each segment an exit rule sees the residual stream; a token that
leaves gets its logits from there, `unembed(final_norm(x))`, and layers behind see it later or not at all:

* missing="recompute": the streams of tokens that left wait at their exit. The next token that goes deeper takes them
  along in one chunk, so every cache holds what full depth would have put there, and a step that goes deep reads the
  parameters once for all of them. Only the tokens' own logits are those of an exit.
* missing="propagate": layers behind the exit put the stream of the exit into their caches at once, without attention
  or MLP (Elbayad et al., "Depth-adaptive Transformer", 2020, arXiv 1910.10073). Later tokens see approximations.

A token's way through the segments is one program, whose conditionals leave out what nobody needs. Rows of a batch leave
one by one: when half of them have left, the program returns and the host goes on with a batch of half the size.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from path_jax.mixers.state import put_rows, take_rows
from path_jax.models.cache import init_cache, unrolled
from path_jax.models.config import ModelConfig
from path_jax.models.decoder_lm import Block, DecoderLM
from path_jax.models.generate import append_rows, check_prompt, prefill
from path_jax.models.sampling import Sampling, check_sampling, largest

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
      exit_layers: layers after which a token may leave, ascending, of 0 ... L - 2.
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
    first = prefill(model, sampling, max_new_tokens, params, tokens, lengths, cache, rng)
    max_waiting = max_waiting if missing == "recompute" else None
    stack = _Stack(model, sampling, params, rule, exit_layers, first.cache, max_waiting, rng)

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
            token, is_stop, best, margin = stack.advance(is_running, stack.is_full | is_tripped, step)
            is_early = is_running & (stack.depth < config.num_layers)
            is_checked = np.zeros(batch, bool)
            if monitor is not None:
                is_checked[is_early] = monitor.choose(int(is_early.sum()))
            going_on = is_early & (is_checked | (margin < min_margin))
            if going_on.any():
                token, is_stop, full_best, _ = stack.advance(going_on, going_on, step)
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

    def __init__(self, model, sampling, params, rule, exit_layers, cache, max_waiting, rng):
        config = model.config
        self._bounds = np.array([0, *(layer + 1 for layer in exit_layers), config.num_layers])
        layers = [range(first, end) for first, end in zip(self._bounds, self._bounds[1:])]
        self._segments = _Segments(model, sampling, tuple(map(tuple, layers)))
        self._rule, self._rng, self._max_waiting = rule, rng, max_waiting
        self._params = [[params[f"layers_{layer}"] for layer in segment] for segment in layers]
        self._ends = {name: x for name, x in params.items() if not name.startswith("layers_")}
        self._states = [tuple(cache[layer] for layer in segment) for segment in layers]
        batch, dtype = len(cache[0].length), jnp.dtype(config.dtype)
        width = 1 if max_waiting is None else max_waiting + 1
        self._waiting = [jnp.zeros((batch, width, config.embed_dim), dtype) for _ in layers]
        self._counts = np.zeros((len(layers), batch), np.int32)
        self._at = np.zeros(batch, np.int32)
        self._newest = jnp.zeros((batch, config.embed_dim), dtype)
        self._token = np.zeros(batch, np.int32)
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
        self._token = token
        self._counts[0] = is_running
        self._at = np.zeros_like(self._at)

    def advance(self, rows: Bool[np.ndarray, "B"], is_forced: Bool[np.ndarray, "B"], step: int):
        """Takes the newest tokens of rows deeper: through all segments where forced, else to where the rule stops.

        Returns:
          Of the newest streams of all rows: a token, whether it ends its row, the likeliest token, and how far it is
          ahead in probability.
        """
        rows, taken = rows.copy(), None
        while rows.any():
            first = self._at[rows].min()
            going = rows & (self._at == first)
            rows[going], taken = self._cross(first, going, is_forced, step)
        if taken is None:
            taken = _take(self._segments, self._ends, self._newest, self._rng, step)
        return tuple(np.asarray(x) for x in taken)

    def store(self, rows: Bool[np.ndarray, "B"]) -> None:
        """Gives the newest streams of rows to the caches of the segments that have not seen the tokens."""
        at = np.where(rows, self._at, len(self._states))
        if at.min() < len(self._states):
            self._states = _store(self._segments, self._params, self._states, self._newest, at)
        self._counts[:] = 0

    def _cross(self, first: int, rows: Bool[np.ndarray, "B"], is_forced, step: int):
        """Takes all tokens of rows, which wait at one segment, through it and those behind it.

        Returns:
          Which of the rows must go on, and what `advance` returns where that is known.
        """
        index, place = self._indices(rows)
        of = lambda x: x if index is None else np.append(x, False)[index]
        self._states, self._waiting, self._newest, at, going, taken = _run(
            self._segments, self._params, self._ends, self._rule, self._rng, step, self._token,
            self._states, self._waiting, self._newest, self._counts, np.int32(first), of(rows), of(is_forced), index,
        )  # fmt: skip
        at, going = np.asarray(at)[place], np.asarray(going)[place]
        (found,) = np.nonzero(rows)
        for row, end in zip(found, at):
            if end < len(self._counts):
                self._counts[end, row] += self._counts[first:end, row].sum()
            self._counts[first:end, row] = 0
        self._at[rows] = at
        self.num_layer_runs += int(self._bounds[at.max()] - self._bounds[first])
        return going, None if going.any() else taken

    def _indices(self, rows: Bool[np.ndarray, "B"]):
        """Rows to run, filled up with B to a power of two (None for all), and where among them each row is."""
        (found,) = np.nonzero(rows)
        size = 1 << (len(found) - 1).bit_length()
        if size >= len(rows):
            return None, found
        return np.pad(found, (0, size - len(found)), constant_values=len(rows)).astype(np.int32), np.arange(len(found))


class _Segments(NamedTuple):
    """What is static."""

    model: DecoderLM
    sampling: Sampling
    layers: tuple[tuple[int, ...], ...]  # of each segment


def _takes(segments, ends, x, rng, step):
    """Of streams [B, D]: a token, whether it ends its row, the likeliest token and how far it is ahead."""
    logits = segments.model.apply({"params": ends}, x, method="lens")
    token = segments.sampling.take(logits, jax.random.fold_in(rng, step))
    top, best = largest(logits, 2)
    probability = jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    return token, segments.sampling.is_stop(token), best[:, 0], probability[:, 0] - probability[:, 1]


_take = jax.jit(_takes, static_argnums=0)


def _through(config: ModelConfig, layers, params, states, x, lengths, rows, **options):
    """The first `lengths` tokens of x [R, W, D] through some layers.

    Returns:
      x behind the last layer, x before it, and the states of all B rows.
    """
    part = states if rows is None else tuple(take_rows(state, rows) for state in states)
    positions = part[0].length[:, None] + jnp.arange(x.shape[1])
    new = []
    for layer, layer_params, state in zip(layers, params, part):
        before = x
        x, state = Block(config, layer).apply({"params": layer_params}, x, positions, None, state, lengths, **options)
        new.append(state)
    return x, before, tuple(new) if rows is None else tuple(put_rows(*item, rows) for item in zip(states, new))


class _Way(NamedTuple):
    """Rows on their way through segments."""

    states: list  # of each segment
    waiting: list[Float[Array, "B W D"]]
    counts: Int[Array, "J B"]
    newest: Float[Array, "B D"]
    at: Int[Array, "R"]  # segments behind each row
    going: Bool[Array, "R"]  # rows that have not left


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(7, 8, 9))
def _run(
    segments, params, ends, rule, rng, step, token, states, waiting, newest, counts, first, going, is_forced, rows
):
    """Some rows, or all, from segment `first` on, with what waits there, until half of them have left.

    There is one program for each number of rows: segments before `first` are left out when it runs.
    """
    config, apply = segments.model.config, segments.model.apply
    batch, width = waiting[0].shape[:2]
    take = (lambda x: x) if rows is None else (lambda x: jnp.take(x, rows, axis=0, mode="fill", fill_value=0))
    index = jnp.arange(batch) if rows is None else rows
    # A token before the first segment is the only one there; behind it this is overwritten before it is read.
    x = apply({"params": ends}, token[:, None], states[0][0].length[:, None], method="embed_tokens")
    waiting = [waiting[0].at[:, 0].set(x[:, 0].astype(waiting[0].dtype)), *waiting[1:]]

    def cross(i, way):
        lengths = jnp.where(way.going, take(way.counts[i]), 0)

        def run(width, states):
            x = take(way.waiting[i][:, :width])
            x, before, states = _through(config, segments.layers[i], params[i], states, x, lengths, rows)
            last, before = (
                jnp.take_along_axis(y, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0] for y in (x, before)
            )
            dtype = way.newest.dtype
            x = jnp.pad(x, [(0, 0), (0, way.waiting[i].shape[1] - width), (0, 0)])
            return x.astype(dtype), last.astype(dtype), before.astype(dtype), states

        if width == 1 or i == 0:  # nothing waits before the first segment but the newest token
            x, last, before, passed = run(1, way.states[i])
        else:
            x, last, before, passed = jax.lax.cond(
                lengths.max() <= 1, functools.partial(run, 1), functools.partial(run, width), way.states[i]
            )
        newest = way.newest.at[jnp.where(lengths > 0, index, batch)].set(last, mode="drop")
        at = jnp.where(way.going, i + 1, way.at)
        states = [*way.states[:i], passed, *way.states[i + 1 :]]
        if i + 1 == len(params):
            return _Way(states, way.waiting, way.counts, newest, at, jnp.zeros_like(way.going))
        place = take(way.counts[i + 1])[:, None] + jnp.arange(width)
        place = jnp.where(jnp.arange(width) < lengths[:, None], place, width)
        following = way.waiting[i + 1].at[index[:, None], place].set(x, mode="drop")
        waiting = [*way.waiting[: i + 1], following, *way.waiting[i + 2 :]]
        counts = way.counts.at[i + 1, index].add(lengths, mode="drop")
        is_done = rule(np.int32(i), last, before, lambda x: apply({"params": ends}, x, method="lens"))
        return _Way(states, waiting, counts, newest, at, way.going & (~is_done | is_forced))

    way = _Way(states, waiting, jnp.asarray(counts), newest, jnp.full(len(index), first), going)
    for i in range(len(params)):
        is_enough = (i == first) | ((i > first) & (2 * way.going.sum() > len(index)))
        way = jax.lax.cond(is_enough, functools.partial(cross, i), lambda way: way, way)
    taken = None
    if rows is None:  # else others may have to go on
        takes = lambda: _takes(segments, ends, way.newest, rng, step)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(takes))
        taken = jax.lax.cond(way.going.any(), lambda: nothing, takes)
    return way.states, way.waiting, way.newest, way.at, way.going, taken


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _store(segments, params, states, newest, at):
    """The states of all segments with one token more for rows behind fewer of them, whose stream is as it left."""
    config, stored = segments.model.config, []
    for i, (segment_params, state) in enumerate(zip(params, states)):
        lengths = (at <= i).astype(jnp.int32)

        def put(state, lengths=lengths, layers=segments.layers[i], params=segment_params):
            return _through(config, layers, params, state, newest[:, None], lengths, None, only_cache=True)[2]

        stored.append(jax.lax.cond(lengths.any(), put, lambda state: state, state))
    return stored
