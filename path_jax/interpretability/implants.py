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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from path_jax.interpretability.hooks import Site, run
from path_jax.interpretability.implant_trials import ImplantReport, Pairs, batches, check_trials, make_trials
from path_jax.interpretability.logit_lens import top_tokens
from path_jax.interpretability.saturation import saturation_layers
from path_jax.models import DecoderLM


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
    pairs = check_trials(pairs, reach, batch_size, control)
    places = np.array([[pairs.early_row, pairs.late_row], [pairs.early_position, pairs.late_position]])
    largest = places.max(axis=(1, 2))
    if tokens.ndim != 2 or places.min() < 0 or (largest >= tokens.shape).any():
        raise ValueError(f"pairs are of rows to {largest[0]} and positions to {largest[1]}, tokens are {tokens.shape}")
    early, late = np.ravel_multi_index(tuple(places), tokens.shape)

    def best_tokens():
        layers, ids = _top1(model, params, tokens, inputs, batch_size)
        is_token = inputs.get("segment_ids", np.ones_like(tokens)) != 0
        is_token &= np.arange(tokens.shape[1]) >= pairs.early_position.min()
        return layers.reshape(-1), ids.reshape(-1), is_token.reshape(-1)

    def implanted(late, layer, source):
        rows, positions = np.unravel_index(late, tokens.shape)
        vectors = _vectors(model, params, tokens, inputs, np.unravel_index(source, tokens.shape), layer, batch_size)
        ids = np.empty((model.config.num_layers, len(late)), np.int32)
        for some, _ in batches(len(late), min(batch_size, len(late)) or 1):
            of_rows = {name: x[rows[some]] for name, x in inputs.items()}
            arrays = tokens[rows[some]], of_rows, positions[some], layer[some], vectors[some]
            ids[:, some] = _implanted(model, params, *arrays, as_published)
        return ids

    places = np.indices(tokens.shape).reshape(2, -1)
    return make_trials(
        pairs, early, late, places, best_tokens, implanted, reach=reach, control=control, seed=seed,
        as_published=as_published,
    )  # fmt: skip


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
    num_rows = min(batch_size, len(rows))
    size = np.bincount(of_row // num_rows).max()  # most sources of a batch: all have one shape
    streams = None
    for i, (some, _) in enumerate(batches(len(rows), num_rows)):
        here = np.flatnonzero(of_row // num_rows == i)
        at = np.resize(here, size)
        of_rows = {name: x[rows[some]] for name, x in inputs.items()}
        x = _streams_at(model, params, tokens[rows[some]], of_rows, of_row[at] % num_rows, source[1, at])
        streams = np.empty((len(x), source.shape[1], x.shape[-1]), x.dtype) if streams is None else streams
        streams[:, here] = np.asarray(x)[:, : len(here)]
    return streams[layers, of_source.reshape(-1)]


def _top1(model, params, tokens, inputs, batch_size) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """The layer at which the best token of every position saturates, and which it is in the end."""
    ids = np.empty((model.config.num_layers, *tokens.shape), np.int32)
    for some, _ in batches(len(tokens), min(batch_size, len(tokens))):
        of_rows = {name: x[some] for name, x in inputs.items()}
        ids[:, some] = top_tokens(model, params, tokens[some], 1, **of_rows).ids[..., 0]
    return saturation_layers(ids.reshape(len(ids), -1, 1))[0].reshape(tokens.shape), ids[-1]
