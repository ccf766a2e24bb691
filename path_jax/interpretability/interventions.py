"""Runs in which values at some sites are other than the model would have computed them.

`base` is the run that is changed, `source` the one that lends its values. Functions are pure and not compiled, but for
`interchange_grid`; wrap them in `jax.jit`. `inputs` are further arguments of the model (`segment_ids`, `positions`),
the same for base and source.

Not supported: moving a value from one position to another.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Int

from path_jax.interpretability.hooks import Edit, Site, as_site, as_sites, run, selection
from path_jax.interpretability.outcomes import Metric
from path_jax.models import DecoderLM, LMOutput

ABLATIONS = ("zero", "mean", "position_mean", "resample")
_CHUNK_NUMBERS = 2**24  # activations and logits of a layer of cells that run together, roughly; more is hardly faster


def replacements(values: Mapping[Site | str, Array], positions=None, heads: Sequence[int] | None = None):
    """Edits {site: value -> where(selected, values[site], value)}; see `hooks.selection` for positions and heads."""

    def make(site, new) -> Edit:
        return lambda value: jnp.where(
            selection(site, value, positions, heads), jnp.broadcast_to(new, value.shape).astype(value.dtype), value
        )

    return {as_site(site): make(site, new) for site, new in values.items()}


def patch(
    model: DecoderLM,
    params,
    tokens: Int[Array, "B T"],
    values: Mapping[Site | str, Array],
    positions=None,
    heads: Sequence[int] | None = None,
    *,
    inputs: Mapping = FrozenDict(),
) -> LMOutput:
    """Runs the model with given values, or what broadcasts to them, at some sites, positions and heads.

    Raises:
      ValueError: if a site never fires or a shape does not fit.
    """
    return run(model, params, tokens, edits=replacements(values, positions, heads), **inputs)[0]


def interchange(
    model: DecoderLM,
    params,
    base: Int[Array, "B T"],
    source: Int[Array, "B T"],
    sites: Site | str | Iterable[Site | str],
    positions=None,
    heads: Sequence[int] | None = None,
    *,
    inputs: Mapping = FrozenDict(),
) -> LMOutput:
    """Runs `base` with the values that the run of `source` has at the sites.

    Args:
      sites: one or several, patched together.
      positions, heads: see `hooks.selection`; all by default.

    Raises:
      ValueError: if a site never fires or a shape does not fit.

    Source: Geiger et al., "Causal Abstractions of Neural Networks", 2021; Vig et al., 2020.
    """
    _, values = run(model, params, source, capture=as_sites(sites), **inputs)
    return patch(model, params, base, values, positions, heads, inputs=inputs)


def ablate(
    model: DecoderLM,
    params,
    tokens: Int[Array, "B T"],
    sites: Site | str | Iterable[Site | str],
    how: str = "zero",
    positions=None,
    heads: Sequence[int] | None = None,
    *,
    reference: Int[Array, "R T"] | None = None,
    rng: Array | None = None,
    inputs: Mapping = FrozenDict(),
) -> LMOutput:
    """Runs the model without what its sites tell about these tokens.

    Args:
      how: "zero"; "mean" over rows and positions of a reference batch; "position_mean", over its rows at each position;
        "resample": every row has the values of a random row of the reference batch.
      positions, heads: see `hooks.selection`; all by default.
      reference: rows without padding, of the same length where positions matter.
      rng: key for "resample".
      inputs: of the run on `tokens`, not of the reference batch.

    Raises:
      ValueError: for an unknown or incomplete way to ablate.
    """
    sites = as_sites(sites)
    if how not in ABLATIONS:
        raise ValueError(f"{how=} is unknown; choose from {', '.join(ABLATIONS)}")
    if how == "zero":
        return patch(model, params, tokens, dict.fromkeys(sites, jnp.zeros(())), positions, heads, inputs=inputs)
    if reference is None or (how == "resample" and rng is None):
        raise ValueError(f"{how=} needs a reference batch" + (" and an rng" if how == "resample" else ""))
    if how == "mean" and any(site.tap == "attn_probs" for site in sites):
        raise ValueError("a mean of attention weights over queries sees later keys; use position_mean")
    _, values = run(model, params, reference, capture=sites)
    if how == "resample":
        rows = jax.random.randint(rng, (len(tokens),), 0, len(reference))
        values = {site: value[rows] for site, value in values.items()}
    else:
        axes = (0, 1) if how == "mean" else 0
        values = {site: value.mean(axes, keepdims=True) for site, value in values.items()}
    return patch(model, params, tokens, values, positions, heads, inputs=inputs)


def steer(
    model: DecoderLM,
    params,
    tokens: Int[Array, "B T"],
    site: Site | str,
    vector: Float[Array, "..."],
    scale: float = 1.0,
    positions=None,
    heads: Sequence[int] | None = None,
    *,
    inputs: Mapping = FrozenDict(),
) -> LMOutput:
    """Adds `scale * vector`, which broadcasts to the site's value, at the positions and heads.

    Raises:
      ValueError: if the site never fires or a shape does not fit.
    """
    edit = lambda value: value + jnp.where(selection(site, value, positions, heads), scale * vector, 0)
    return run(model, params, tokens, edits={site: edit}, **inputs)[0]


def interchange_grid(
    model: DecoderLM,
    params,
    base: Int[Array, "B T"],
    source: Int[Array, "B T"],
    sites: Iterable[Site | str],
    positions: Int[Array, "P B"] | Bool[Array, "cells sites B T *N"],
    metric: Metric,
    *,
    heads: Sequence[int] | None = None,
    chunk: int | None = None,
    inputs: Mapping = FrozenDict(),
) -> Float[Array, "... B"]:
    """The metric of many interchange interventions, in one compiled call.

    The source runs once. `chunk` cells run as one batch and the chunks follow one another, so memory does not grow with
    the grid. A call with the same model, sites, heads and shapes compiles nothing anew, given a metric of `outcomes` or
    the same function.

    Args:
      sites: of the grid.
      positions: integers [P, B]: every site alone at every of P positions, which each row has its own of (an index
        outside the row patches nothing). Or masks [cells, sites, B, T]: where each site is patched in each cell, so
        that a cell may patch several; with a last axis [N] also at which heads, all sites having as many.
      metric: LMOutput -> [B].
      heads: patched at every site, all by default.
      chunk: cells computed at once; by default so many that their logits and a layer's activations take some 64 MiB.

    Returns:
      [sites, P, B], or [cells, B] for masks.

    Raises:
      ValueError: if a site never fires or a shape does not fit.
    """
    sites, positions = as_sites(sites), jnp.asarray(positions)
    batch, num_sites = len(base), len(sites)
    if positions.dtype == bool:
        shape, cells = positions.shape[:1], positions
        if positions.ndim not in (4, 5) or positions.shape[1:4] != (num_sites, *base.shape):
            raise ValueError(
                f"masks {positions.shape} are not (cells, {num_sites} sites, *{base.shape}), or with heads"
            )
    else:
        if positions.ndim != 2 or positions.shape[1] != batch:
            raise ValueError(f"positions are {positions.shape}, not several for each of {batch} rows")
        shape = (num_sites, len(positions))
        cells = (jnp.repeat(jnp.arange(num_sites), len(positions)), jnp.tile(positions, (num_sites, 1)))
    if (num_cells := int(np.prod(shape))) == 0:
        return jnp.zeros((*shape, batch))
    if chunk is None:
        chunk = max(1, _CHUNK_NUMBERS // (base.size * (model.config.vocab_size + 16 * model.config.embed_dim)))
    num_chunks = -(-num_cells // chunk)
    chunk = -(-num_cells // num_chunks)
    # Whole chunks: the last cell stands in for those that are not there.
    index = jnp.minimum(jnp.arange(num_chunks * chunk), num_cells - 1).reshape(num_chunks, chunk)
    cells = jax.tree.map(lambda x: x[index], cells)
    heads = None if heads is None else tuple(heads)
    metric = metric if isinstance(metric, jax.tree_util.Partial) else jax.tree_util.Partial(metric)
    values = _grid(model, params, base, source, cells, metric, dict(inputs), sites, heads)
    return values.reshape(-1, batch)[:num_cells].reshape(*shape, batch)


@functools.partial(jax.jit, static_argnames=("model", "sites", "heads"))
def _grid(model, params, base, source, chunks, metric, inputs, sites, heads):
    """The metric [chunks, cells, B] of chunks of cells.

    The cells of a chunk are rows of one batch, not `vmap`ped: kernels of accelerators have no rule for that. A row's
    cells lie side by side, so a batch that is split over devices stays split the same way.
    """
    _, values = run(model, params, source, capture=sites, **inputs)
    batch = len(base)

    def intervene(cells):
        num_cells = len(jax.tree.leaves(cells)[0])
        repeat = lambda x: jnp.repeat(x, num_cells, axis=0)
        join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch * num_cells, *x.shape[2:])  # [cells, B, ...]
        edits = {}
        for i, site in enumerate(sites):
            if isinstance(cells, tuple):
                where = join(jnp.where(cells[0][:, None] == i, cells[1], -1))
            else:
                where = join(cells[:, i])
            edits |= replacements({site: repeat(values[site])}, where, heads)
        out, _ = run(model, params, repeat(base), edits=edits, **jax.tree.map(repeat, inputs))
        split = lambda x: x.reshape(batch, num_cells, *x.shape[1:])
        return jax.vmap(metric, in_axes=1)(jax.tree.map(split, out))

    return jax.lax.map(intervene, chunks)
