"""Does the activation with which a model's best token is decided decide it elsewhere too? Moves it to see.

Two tokens end with the same best token, which saturates at layer e of the one, early, and at layer l of the other,
late. After layer m = e + d, late's residual stream is replaced by early's after the same layer. If what early carries
after its saturation layer is the decision, then late decides when it gets it: for d >= 0, its best token now saturates
at m, and is the same in the end.

Layers are from 0; a stream "after layer m" is `m.resid_post`, which the logit lens reads as layer m.

Source: Lioubashevski et al., "Looking beyond the top-1: Transformers determine top tokens in order", 2024 (arXiv
2410.20210), and its code beyond_top1.

Not supported: dependence between pairs that share a token, which the intervals take to be independent.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from path_jax.interpretability.hooks import Site, run
from path_jax.interpretability.logit_lens import top_tokens
from path_jax.interpretability.saturation import saturation_layers
from path_jax.models import DecoderLM

CONTROLS = ("same", "late", "random")


class Pairs(NamedTuple):
    """Tokens with the same best token in the end, which saturates earlier in one of them."""

    early_row: Int[np.ndarray, "p"]
    early_position: Int[np.ndarray, "p"]
    early_layer: Int[np.ndarray, "p"]  # e
    late_row: Int[np.ndarray, "p"]
    late_position: Int[np.ndarray, "p"]
    late_layer: Int[np.ndarray, "p"]  # l
    final_id: Int[np.ndarray, "p"]


class Trials(NamedTuple):
    """Implants that were made, one of each pair after each layer."""

    pair: Int[np.ndarray, "n"]
    layer: Int[np.ndarray, "n"]  # m
    source_row: Int[np.ndarray, "n"]
    source_position: Int[np.ndarray, "n"]
    new_layer: Int[np.ndarray, "n"]  # at which late's best token saturates now
    new_id: Int[np.ndarray, "n"]  # which it is in the end


class ImplantReport(NamedTuple):
    """What implants did at each distance d of their layer from the source's saturation; NaN without trials.

    Attributes:
      distances: d = m - e.
      num_trials, num_successes: a success saturates at the implant's layer, with the final best token unchanged.
      rates: num_successes / num_trials; lows, highs: its 95 % interval (Wilson), of independent trials.
      mean_moved: number of layers by which late's best token saturates earlier than without the implant.
      unchanged_shares: of trials with the final best token unchanged.
      trials: all of them, one by one.
    """

    distances: Int[np.ndarray, "d"]
    num_trials: Int[np.ndarray, "d"]
    num_successes: Int[np.ndarray, "d"]
    rates: Float[np.ndarray, "d"]
    lows: Float[np.ndarray, "d"]
    highs: Float[np.ndarray, "d"]
    mean_moved: Float[np.ndarray, "d"]
    unchanged_shares: Float[np.ndarray, "d"]
    trials: Trials


def find_pairs(
    layers: Int[Array, "B T"],
    final_ids: Int[Array, "B T"],
    num_layers: int,
    *,
    min_gap: int | None = None,
    max_pairs: int = 100,
    seed: int = 0,
    max_distance: int | None = None,
    min_position: int = 0,
    min_layer: int = 0,
    same_row: bool = False,
    is_token: Bool[Array, "B T"] | None = None,
) -> Pairs:
    """Random pairs of tokens for `implant`, all pairs being equally likely; early may stand before late or behind it.

    Published limits for GPT2-XL, of 48 layers: min_gap=10, min_layer=10, max_distance=30 and same_row=True. The
    published code takes the first pairs rather than random ones.

    Args:
      layers: at which the best token saturates, row 0 of `saturation_layers`; L counts as 0.
      final_ids: the model's best tokens.
      min_gap: l - e at least; by default max(1, L // 5).
      max_pairs: how many; all, if there are fewer. seed: of the choice.
      max_distance: between the two positions, whether in one row or in two.
      min_position, min_layer: of both tokens.
      same_row: both are in one row.
      is_token: which tokens may take part, all by default; to leave out padding.

    Raises:
      ValueError: if shapes, layers or numbers do not fit.
    """
    layers, final_ids = np.asarray(layers), np.asarray(final_ids)
    is_token = np.ones(layers.shape, bool) if is_token is None else np.asarray(is_token)
    if layers.ndim != 2 or not layers.shape == final_ids.shape == is_token.shape:
        raise ValueError(f"layers {layers.shape}, ids {final_ids.shape} and tokens {is_token.shape} are not [B, T]")
    if layers.size and not 0 <= layers.min() <= layers.max() <= num_layers:
        raise ValueError(f"layers are {layers.min()} ... {layers.max()}, but the model has {num_layers}")
    min_gap = max(1, num_layers // 5) if min_gap is None else min_gap
    if min(min_gap, max_pairs) < 1:
        raise ValueError(f"{min_gap=} and {max_pairs=} must be at least 1")
    layers = layers.astype(int) % num_layers
    takes_part = is_token & (layers >= min_layer) & (np.arange(layers.shape[1]) >= min_position)
    rows, positions = np.nonzero(takes_part)
    layers, ids = layers[takes_part], final_ids[takes_part]
    # Tokens sorted by what the two have in common: those of one group stand together.
    order = np.lexsort((rows, ids) if same_row else (ids,))
    rows, positions, layers, ids = rows[order], positions[order], layers[order], ids[order]
    is_first = np.ones(len(ids), bool)
    is_first[1:] = (ids[1:] != ids[:-1]) | (same_row & (rows[1:] != rows[:-1]))
    starts = np.flatnonzero(is_first)
    group, ends = np.cumsum(is_first) - 1, np.append(starts[1:], len(ids))

    def lates(early):
        here = slice(starts[group[early]], ends[group[early]])
        fits = layers[here] - layers[early] >= min_gap
        if max_distance is not None:
            fits &= np.abs(positions[here] - positions[early]) <= max_distance
        return here.start + np.flatnonzero(fits)

    # Pairs are numbered, not listed: a frequent token has very many.
    counts = np.cumsum([len(lates(early)) for early in range(len(ids))], dtype=np.int64)
    total = counts[-1] if len(counts) else 0
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(max_pairs, total), replace=False))
    early = np.searchsorted(counts, chosen, side="right")
    late = np.array([lates(i)[number - counts[i]] for i, number in zip(early, chosen)], int)  # counted from the end
    return Pairs(rows[early], positions[early], layers[early], rows[late], positions[late], layers[late], ids[early])


def implant(
    model: DecoderLM,
    params,
    tokens: Int[Array, "B T"],
    pairs: Pairs,
    *,
    reach: int = 5,
    batch_size: int = 16,
    control: str | None = None,
    seed: int = 0,
    as_published: bool = False,
    **inputs,
) -> ImplantReport:
    """Implants early's residual stream into late, after each layer e - reach ... e + reach that there is before l.

    One program makes all implants, as rows of a batch. On the host takes D numbers for each layer and source token.

    Args:
      model: scanned or unrolled, with any mixers; params: of either shape.
      tokens: as for the model.
      pairs: of `find_pairs`, on the same tokens.
      reach: published 5 for GPT2-XL, 3 for smaller models.
      batch_size: rows that run together.
      control: implants another stream instead, after the same layers: "same", late's own, which changes nothing;
        "late", of a random token with the same final best token that saturates only after layer m + 1, so that its
        decision is still to come; "random", of a random token with another final best token. Random tokens are of the
        whole batch, but padding and positions before all early ones; without any, there is no trial.
      seed: of the control's tokens.
      as_published: skip layer m + 1 at all tokens, as the published hook does; a success then saturates at m + 1, the
        first layer where the implant shows. The control "same" is then what skipping does.
      **inputs: further arguments of the model: positions, segment_ids.

    Raises:
      ValueError: if there are no pairs, they do not fit the tokens, or for an unknown control or a number out of range.
    """
    tokens = np.asarray(tokens)
    inputs = {name: np.asarray(x) for name, x in inputs.items()}
    if control not in (None, *CONTROLS):
        raise ValueError(f"{control=} is unknown; choose from {', '.join(CONTROLS)}")
    if reach < 0 or batch_size < 1:
        raise ValueError(f"{reach=} must be at least 0 and {batch_size=} at least 1")
    pairs = Pairs(*map(np.asarray, pairs))
    if not len(pairs.early_row):
        raise ValueError("there are no pairs")
    places = np.array([[pairs.early_row, pairs.late_row], [pairs.early_position, pairs.late_position]])
    largest = places.max(axis=(1, 2))
    if tokens.ndim != 2 or places.min() < 0 or (largest >= tokens.shape).any():
        raise ValueError(f"pairs are of rows to {largest[0]} and positions to {largest[1]}, tokens are {tokens.shape}")

    distances = np.arange(-reach, reach + 1)
    layer = pairs.early_layer[:, None] + distances
    pair, at = np.nonzero((layer >= 0) & (layer < pairs.late_layer[:, None]))
    layer, late = layer[pair, at], places[:, 1, pair]
    if control is None or control == "same":
        source, is_made = late if control else places[:, 0, pair], np.ones(len(pair), bool)
    else:
        top = _top1(model, params, tokens, inputs, batch_size)
        is_token = inputs.get("segment_ids", np.ones_like(tokens)) != 0
        is_token &= np.arange(tokens.shape[1]) >= pairs.early_position.min()
        source, is_made = _control_sources(control, *top, is_token, pairs.final_id[pair], layer, late, seed)
    pair, at, layer, late, source = pair[is_made], at[is_made], layer[is_made], late[:, is_made], source[:, is_made]

    vectors = _vectors(model, params, tokens, inputs, source, layer, batch_size)
    ids = np.empty((model.config.num_layers, len(pair)), np.int32)
    for some in _batches(len(pair), batch_size):
        rows, positions = late[:, some]
        of_rows = {name: x[rows] for name, x in inputs.items()}
        arrays = tokens[rows], of_rows, positions, layer[some], vectors[some]
        ids[:, some] = _implanted(model, params, *arrays, as_published)
    trials = Trials(pair, layer, *source, saturation_layers(ids[..., None])[0].astype(int), ids[-1])
    is_unchanged = trials.new_id == pairs.final_id[pair]
    is_success = is_unchanged & (trials.new_layer == layer + as_published)
    count = lambda weights=None: np.bincount(at, weights, minlength=len(distances))
    num_trials, num_successes = count(), count(is_success).astype(int)
    with np.errstate(invalid="ignore"):
        mean_moved = count(pairs.late_layer[pair] - trials.new_layer) / num_trials
        rates, unchanged_shares = num_successes / num_trials, count(is_unchanged) / num_trials
    lows, highs = np.array([_wilson(*x) for x in zip(num_successes.tolist(), num_trials.tolist())]).T
    return ImplantReport(distances, num_trials, num_successes, rates, lows, highs, mean_moved, unchanged_shares, trials)


@functools.partial(jax.jit, static_argnames=("model", "as_published"))
def _implanted(model, params, tokens, inputs, positions, layers, vectors, as_published) -> Int[Array, "L B"]:
    """Best tokens of every layer at one position of each row, where the stream after one layer is the row's vector."""
    num_layers, num_rows = model.config.num_layers, len(tokens)
    is_here = (jnp.arange(tokens.shape[1]) == positions[:, None])[..., None]
    is_after = lambda layer: (layers == layer)[:, None, None]  # [B, 1, 1]
    put = lambda layer: lambda x: jnp.where(is_here & is_after(layer), vectors[:, None].astype(x.dtype), x)
    if not as_published:
        edits = {Site(layer, "resid_post"): put(layer) for layer in range(num_layers)}
    else:
        edits, read = {}, {}
        for i in range(1, num_layers):  # what such a layer reads is also what it returns, at all positions
            edits[Site(i, "resid_pre")] = lambda x, i=i: read.setdefault(i, put(i - 1)(x))
            edits[Site(i, "resid_post")] = lambda x, i=i: jnp.where(is_after(i - 1), read[i], x)
    streams = [Site(layer, "resid_post") for layer in range(num_layers)]
    _, values = run(model, params, tokens, capture=streams, edits=edits, **inputs)
    x = jnp.stack([values[site][jnp.arange(num_rows), positions] for site in streams])
    return jax.lax.map(lambda x: model.apply({"params": params}, x, method="lens").argmax(axis=-1), x)


@functools.partial(jax.jit, static_argnames="model")
def _streams_at(model, params, tokens, inputs, rows, positions) -> Float[Array, "L n D"]:
    streams = [Site(layer, "resid_post") for layer in range(model.config.num_layers)]
    _, values = run(model, params, tokens, capture=streams, **inputs)
    return jnp.stack([values[site][rows, positions] for site in streams])


def _vectors(model, params, tokens, inputs, source, layers, batch_size) -> Float[np.ndarray, "n D"]:
    """The residual stream of each source [2, n] after its layer; every row that has sources runs once."""
    source, of_source = np.unique(source, axis=1, return_inverse=True)
    rows, of_row = np.unique(source[0], return_inverse=True)
    if not len(rows):
        return np.empty((0, model.config.embed_dim), np.float32)
    batches = list(_batches(len(rows), batch_size))
    size = np.bincount(of_row // len(batches[0])).max()  # most sources of a batch: all have one shape
    streams = None
    for i, some in enumerate(batches):
        here = np.flatnonzero(of_row // len(some) == i)
        at = np.resize(here, size)
        of_rows = {name: x[rows[some]] for name, x in inputs.items()}
        x = _streams_at(model, params, tokens[rows[some]], of_rows, of_row[at] % len(some), source[1, at])
        streams = np.empty((len(x), source.shape[1], x.shape[-1]), x.dtype) if streams is None else streams
        streams[:, here] = np.asarray(x)[:, : len(here)]
    return streams[layers, of_source.reshape(-1)]


def _top1(model, params, tokens, inputs, batch_size) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """The layer at which the best token of every position saturates, and which it is in the end."""
    ids = np.empty((model.config.num_layers, *tokens.shape), np.int32)
    for some in _batches(len(tokens), batch_size):
        of_rows = {name: x[some] for name, x in inputs.items()}
        ids[:, some] = top_tokens(model, params, tokens[some], 1, **of_rows).ids[..., 0]
    return saturation_layers(ids.reshape(len(ids), -1, 1))[0].reshape(tokens.shape), ids[-1]


def _control_sources(control, layers, ids, is_token, final_id, after, late, seed):
    """A random source [2, n] for each trial, and whether there is one."""
    rng, source, has_source = np.random.default_rng(seed), late.copy(), np.zeros(len(after), bool)
    for i in range(len(after)):
        is_same = ids == final_id[i]
        fits = is_token & (is_same & (layers > after[i] + 1) if control == "late" else ~is_same)
        fits[tuple(late[:, i])] = False
        if len(candidates := np.flatnonzero(fits)):
            source[:, i], has_source[i] = np.unravel_index(rng.choice(candidates), ids.shape), True
    return source, has_source


def _batches(num_rows, batch_size):
    """Indices of rows, in batches of one size: the last one has some twice."""
    for start in range(0, num_rows, batch_size):
        yield np.resize(np.arange(start, min(start + batch_size, num_rows)), min(batch_size, num_rows))


def _wilson(successes, trials) -> tuple[float, float]:
    from scipy import stats  # slow to import

    return tuple(stats.binomtest(successes, trials).proportion_ci(method="wilson")) if trials else (np.nan, np.nan)
