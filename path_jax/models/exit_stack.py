"""The segments of a model between its exits, and the tokens of each row on their way through them.

A token's way through the segments is one program, whose conditionals leave out what nobody needs; for a single row the
way of many tokens is one. Rows of a batch leave one by one: when half of them have left, the program returns and the
host goes on with a batch of half the size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from path_jax.mixers.state import put_rows, take_rows
from path_jax.models.config import ModelConfig
from path_jax.models.decoder_lm import Block, DecoderLM
from path_jax.models.sampling import Sampling, largest


class Newest(NamedTuple):
    """Of the newest token of each row."""

    token: Int[np.ndarray, "B"]  # that follows it
    is_stop: Bool[np.ndarray, "B"]  # whether that ends the row
    best: Int[np.ndarray, "B"]  # the likeliest one
    margin: Float[np.ndarray, "B"]  # how far it is ahead in probability


class ExitStack:
    """The state of generation between two programs.

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

    def advance(self, rows: Bool[np.ndarray, "B"], is_forced: Bool[np.ndarray, "B"], step: int) -> Newest:
        """Takes the newest tokens of rows deeper: through all segments where forced, else to where the rule stops."""
        rows, taken = rows.copy(), None
        while rows.any():
            first = self._at[rows].min()
            going = rows & (self._at == first)
            rows[going], taken = self._cross(first, going, is_forced, step)
        if taken is None:
            taken = _take(self._segments, self._ends, self._newest, self._rng, step)
        return Newest(*(np.asarray(x) for x in taken))

    def walk(self, token: Int[np.ndarray, "1"], step: int, num_steps: int, is_forced: bool, checks, min_margin: float):
        """Pushes and advances the tokens of a single row, up to `num_steps` of them.

        The last one is that which ends the row, or leaves and has to go on: because its turn in `checks` (bool [M], of
        the tokens that leave) has come, or its margin is below the least. For all others `store` has been called too.

        Returns:
          The tokens taken [n] and the layers below them [n], and `Newest` of the last one.
        """
        self._states, self._waiting, self._newest, walk = _walk(
            self._segments, self._params, self._ends, self._rule, self._rng, self._max_waiting, self._states,
            self._waiting, self._newest, self._counts, step, token, num_steps, is_forced, checks, min_margin,
        )  # fmt: skip
        walk = jax.tree.map(np.array, walk)
        self._counts, self._at = walk.counts, walk.at
        depths = self._bounds[walk.ats[: walk.num]]
        self.num_layer_runs += int(depths.sum())
        return walk.tokens[: walk.num], depths, walk.newest

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


def _takes(segments, ends, x, rng, step) -> Newest:
    """Of streams [B, D]."""
    logits = segments.model.apply({"params": ends}, x, method="lens")
    token = segments.sampling.take(logits, jax.random.fold_in(rng, step))
    top, best = largest(logits, 2)
    probability = jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    return Newest(token, segments.sampling.is_stop(token), best[:, 0], probability[:, 0] - probability[:, 1])


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


def _where(predicate, function, carry):
    """`function(carry)` or the carry as it is, by a loop of one round or none: conditionals copy what they pass on."""
    once = lambda state: (jnp.zeros((), bool), function(state[1]))
    return jax.lax.while_loop(lambda state: state[0], once, (jnp.asarray(predicate), carry))[1]


class _Way(NamedTuple):
    """Rows on their way through segments."""

    states: list  # of each segment
    waiting: list[Float[Array, "B W D"]]
    counts: Int[Array, "J B"]
    newest: Float[Array, "B D"]
    at: Int[Array, "R"]  # segments behind each row
    going: Bool[Array, "R"]  # rows that have not left


def _runs(
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
        way = _where(is_enough, functools.partial(cross, i), way)
    taken = None
    if rows is None:  # else others may have to go on
        takes = lambda: _takes(segments, ends, way.newest, rng, step)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(takes))
        taken = jax.lax.cond(way.going.any(), lambda: nothing, takes)
    return way.states, way.waiting, way.newest, way.at, way.going, taken


_run = jax.jit(_runs, static_argnums=0, donate_argnums=(7, 8, 9))


class _Walk(NamedTuple):
    """Of a single row on its way through many tokens."""

    counts: Int[Array, "J 1"]
    at: Int[Array, "1"]
    newest: Newest
    tokens: Int[Array, "M"]
    ats: Int[Array, "M"]
    num: Int[Array, ""]  # tokens so far
    num_early: Int[Array, ""]  # of them, those that left
    is_over: Bool[Array, ""]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(6, 7, 8))
def _walk(
    segments, params, ends, rule, rng, max_waiting, states, waiting, newest, counts, step, token, num_steps, is_forced,
    checks, min_margin,
):  # fmt: skip
    """See `ExitStack.walk`."""
    num_segments = len(params)

    def advance(carry):
        states, waiting, stream, walk = carry
        counts = walk.counts
        if max_waiting is None:
            states, counts = _stores(segments, params, states, stream, walk.at), jnp.zeros_like(counts)
        counts = counts.at[0].set(1)
        is_full = is_forced if max_waiting is None else is_forced | (counts.sum(0) > max_waiting)
        states, waiting, stream, at, _, found = _runs(
            segments, params, ends, rule, rng, step + walk.num, walk.newest.token, states, waiting, stream, counts, 0,
            jnp.ones(1, bool), is_full, None,
        )  # fmt: skip
        is_behind = jnp.arange(num_segments)[:, None] < at
        moved = jnp.where(is_behind, counts, 0).sum(0)
        counts = jnp.where(is_behind, 0, counts).at[at, jnp.arange(1)].add(moved, mode="drop")
        is_early = at[0] < num_segments
        is_over = found.is_stop[0] | is_early & (checks[walk.num_early] | (found.margin[0] < min_margin))
        tokens, ats = walk.tokens.at[walk.num].set(found.token[0]), walk.ats.at[walk.num].set(at[0])
        walk = _Walk(counts, at, found, tokens, ats, walk.num + 1, walk.num_early + is_early, is_over)
        return states, waiting, stream, walk

    nothing = jnp.zeros(len(checks), jnp.int32)
    before = Newest(jnp.asarray(token), jnp.zeros(1, bool), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.float32))
    at, num = jnp.full(1, num_segments, jnp.int32), jnp.zeros((), jnp.int32)
    walk = _Walk(jnp.asarray(counts), at, before, nothing, nothing, num, num, jnp.zeros((), bool))
    is_going = lambda carry: (carry[-1].num < num_steps) & ~carry[-1].is_over
    return jax.lax.while_loop(is_going, advance, (states, waiting, newest, walk))


def _stores(segments, params, states, newest, at):
    """The states of all segments with one token more for rows behind fewer of them, whose stream is as it left."""
    config, stored = segments.model.config, []
    for i, (segment_params, state) in enumerate(zip(params, states)):
        lengths = (at <= i).astype(jnp.int32)

        def put(state, lengths=lengths, layers=segments.layers[i], params=segment_params):
            return _through(config, layers, params, state, newest[:, None], lengths, None, only_cache=True)[2]

        stored.append(jax.lax.cond(lengths.any(), put, lambda state: state, state))
    return stored


_store = jax.jit(_stores, static_argnums=0, donate_argnums=2)
