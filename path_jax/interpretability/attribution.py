"""Effects of many sites at once, to first order, beside the exact ones; and effects along paths between sites.

Functions are pure; wrap them in `jax.jit`. `base` is the run that is changed, `source` the one that lends its values.
"""

from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from path_jax.interpretability.hooks import HEAD_TAPS, Site, as_sites, run, selection
from path_jax.interpretability.hooks import sites as sites_of
from path_jax.interpretability.interventions import interchange_grid, patch
from path_jax.interpretability.outcomes import Metric
from path_jax.models import DecoderLM, LMOutput
from path_jax.nn.taps import MIXER_TAPS


def attribution_patching(
    model: DecoderLM,
    params,
    base: Int[Array, "B T"],
    source: Int[Array, "B T"],
    sites: Iterable[Site | str],
    metric: Metric,
    *,
    by_head: bool = False,
    inputs: Mapping = FrozenDict(),
) -> dict[Site, Float[Array, "B T *N"]]:
    """First-order estimate of what patching each site at each position does to the metric.

        effect = (source value - base value) . d metric / d value

    Two forward passes and one backward pass for all sites and positions. The estimate is exact for small differences;
    it misses saturation, as in a softmax or a gate, so check what matters with `exact_patching`.

    Args:
      metric: LMOutput -> [B], of which row b depends on row b of the batch alone.
      by_head: keeps the axis of heads of values that have one.

    Returns:
      {site: float32 [B, T], or [B, T, N]}; at `attn_probs` T are the queries.

    Raises:
      ValueError: if a site never fires.

    Source: Nanda, "Attribution patching", 2023; Syed et al., 2023 (arXiv 2310.10348).
    """
    sites = as_sites(sites)
    _, theirs = run(model, params, source, capture=sites, **inputs)

    def total(perturbations):
        edits = {site: lambda value, site=site: value + perturbations[site] for site in sites}
        out, values = run(model, params, base, capture=sites, edits=edits, **inputs)
        return metric(out).sum(), values

    gradients, ours = jax.grad(total, has_aux=True)(jax.tree.map(jnp.zeros_like, theirs))
    effects = {}
    for site in sites:
        difference, gradient = (x.astype(jnp.float32) for x in (theirs[site] - ours[site], gradients[site]))
        effect = difference * gradient
        if site.tap == "attn_probs":
            effect = jnp.moveaxis(effect, 1, 2)
        has_heads = effect.ndim == 4 or site.tap in HEAD_TAPS
        effects[site] = effect.sum(axis=tuple(range(3 if by_head and has_heads else 2, effect.ndim)))
    return effects


def exact_patching(
    model: DecoderLM,
    params,
    base: Int[Array, "B T"],
    source: Int[Array, "B T"],
    sites: Iterable[Site | str],
    metric: Metric,
    *,
    chunk: int | None = None,
    inputs: Mapping = FrozenDict(),
) -> dict[Site, Float[Array, "B T"]]:
    """What `attribution_patching` estimates: the change of the metric by patching each site at each position, alone.

    As many forward passes as there are sites times positions; see `interchange_grid`.
    """
    sites, (batch, length) = as_sites(sites), base.shape
    everywhere = jnp.broadcast_to(jnp.arange(length)[:, None], (length, batch))
    # The grid's last position is outside the row: nothing is patched, by the same program.
    positions = jnp.concatenate([everywhere, jnp.full((1, batch), -1)])
    grid = interchange_grid(model, params, base, source, sites, positions, metric, chunk=chunk, inputs=inputs)
    return {site: (cells[:-1] - cells[-1]).T for site, cells in zip(sites, grid)}


def path_patch(
    model: DecoderLM,
    params,
    base: Int[Array, "B T"],
    source: Int[Array, "B T"],
    senders: Site | str | Iterable[Site | str],
    receivers: Site | str | Iterable[Site | str],
    positions=None,
    heads: Sequence[int] | None = None,
    *,
    receiver_positions=None,
    receiver_heads: Sequence[int] | None = None,
    frozen: Sequence[str] = ("mixer_out", "mlp_out"),
    inputs: Mapping = FrozenDict(),
) -> LMOutput:
    """What reaches the receivers from the senders directly, past all other mixers and MLPs, and its consequences.

    Three runs of `base` after one of `source`:

    1. plain, which gives the values to freeze at;
    2. with the senders' values from the source, and all outputs of mixers and MLPs frozen at 1: a difference travels on
       the residual stream alone. What arrives at the receivers is kept;
    3. with these values at the receivers, all else free.

    A sender inside a mixer (a head of `v` or `head_out`, say), or at the input of a mixer or MLP, leaves by that
    module's output, which is therefore computed; the rest of what the module reads stays as in 1.

    Args:
      senders: sites whose source values are sent; positions, heads: where, see `hooks.selection`.
      receivers: inputs, as `mixer_in`, `mlp_in`, `resid_pre`, `q`, or `resid_post` of the last layer for the direct
        path to the logits; receiver_positions, receiver_heads: where they receive.
      frozen: taps held in run 2. ("mixer_out",) lets MLPs carry differences on, as Wang et al. do.

    Raises:
      ValueError: if a site never fires, or no path can lead from senders to a receiver.

    Source: Wang et al., "Interpretability in the Wild", 2022, section 3.1 and appendix B; Goldowsky-Dill et al.,
    "Localizing Model Behavior with Path Patching", 2023, whose paths are any; ours are direct ones.
    """
    senders, receivers, order = as_sites(senders), as_sites(receivers), sites_of(model.config)
    if missing := {*senders, *receivers} - set(order):
        raise ValueError(f"no value at {', '.join(map(str, sorted(missing)))}; sites are {', '.join(map(str, order))}")
    first = min(order.index(sender) for sender in senders)
    for receiver in receivers:
        if receiver.tap in frozen:
            raise ValueError(f"receivers are inputs, but {receiver} is an output that is frozen")
        if order.index(receiver) <= first:
            raise ValueError(f"{receiver} is computed before the first sender, {order[first]}")
    carriers, held = set(), {site for site in order if site.tap in frozen}
    for layer, tap in senders:
        if tap in MIXER_TAPS or tap == "mixer_in":
            carriers.add(Site(layer, "mixer_out"))
            held.add(Site(layer, "mixer_in"))
        elif tap == "mlp_in":
            carriers.add(Site(layer, "mlp_out"))
    if both := carriers & set(senders):
        raise ValueError(f"{', '.join(map(str, both))} would be both a sender and what a sender leaves by")
    held -= carriers | set(senders) | set(receivers)

    _, ours = run(model, params, base, capture=held | set(senders), **inputs)
    _, theirs = run(model, params, source, capture=senders, **inputs)

    def send(site):
        return lambda value: jnp.where(selection(site, value, positions, heads), theirs[site], ours[site])

    edits = {site: lambda value, site=site: ours[site] for site in held} | {site: send(site) for site in senders}
    _, received = run(model, params, base, capture=receivers, edits=edits, **inputs)
    return patch(model, params, base, received, receiver_positions, receiver_heads, inputs=inputs)
