"""Reads and edits the values of a model at its taps, while it runs.

All functions are pure: wrap them in `jax.jit`, `jax.grad` or `jax.vmap` (attention kernels then need the config's
implementation="xla", as those of accelerators have no rule for it). The interceptor is entered inside the traced
function, since one around an already compiled function is ignored. Layers are always unrolled, as a scan has no layer
index, and nothing is rematerialised; parameters may be of either shape.

A value that is replaced by itself changes no bit where operations run one by one. A compiler fuses them differently in
programs with other captures and edits, which may round the last bit otherwise.

Not supported: the embedding and the final norm, which have no taps (`0.resid_pre` is what the first layer reads).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Int

from path_jax.models import DecoderLM, LMOutput, ModelConfig
from path_jax.models.decoder_lm import abstract_params
from path_jax.models.stacking import unstack_layers
from path_jax.nn.taps import BLOCK_TAPS, MIXER_TAPS, is_tap

Edit = Callable[[Array], Array]  # what a site's value becomes

HEAD_TAPS = ("beta", "log_forget")  # whose last axis is heads; of other taps, those of four axes have heads


class Site(NamedTuple):
    """A tap of a layer, written "0.mixer_out", or "1.mixer.q" inside a mixer."""

    layer: int
    tap: str

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site that is written like this.

        Raises:
          ValueError: for anything else.
        """
        layer, _, rest = text.partition(".")
        tap = rest.removeprefix("mixer.")
        if layer.isdecimal() and tap in BLOCK_TAPS + MIXER_TAPS and str(site := cls(int(layer), tap)) == text:
            return site
        raise ValueError(
            f"{text!r} is not a site: write a layer and one of {', '.join(BLOCK_TAPS)}, as in '0.mixer_out', or one of "
            f"{', '.join(MIXER_TAPS)} inside its mixer, as in '1.mixer.q'"
        )

    def __str__(self):
        return f"{self.layer}.{'mixer.' if self.tap in MIXER_TAPS else ''}{self.tap}"


def as_site(site: Site | str) -> Site:
    """A site, or the one that a string names."""
    return Site.parse(site) if isinstance(site, str) else Site(*site)


def as_sites(sites: Site | str | Iterable[Site | str]) -> tuple[Site, ...]:
    """One site or several."""
    return (as_site(sites),) if isinstance(sites, Site | str) else tuple(as_site(site) for site in sites)


def unrolled_model(model: DecoderLM, params) -> tuple[DecoderLM, dict]:
    """The model layer by layer, without rematerialisation, and its parameters, which may come scanned."""
    config = dataclasses.replace(model.config, scan_layers=False, remat="none")
    return DecoderLM(config), unstack_layers(params) if "layers" in params else params


def with_weights(model: DecoderLM) -> DecoderLM:
    """The same function of the same parameters, with attention weights at the tap `attn_probs`; O(T^2) memory.

    Raises:
      ValueError: for a mixer that has no attention weights.
    """
    config = model.config
    mixers = dict(zip(config.mixers, map(config.make_mixer, range(len(config.mixers)))))
    exposing = [name for name, mixer in mixers.items() if hasattr(mixer, "expose_weights")]
    if not exposing:
        raise ValueError(f"the mixer {config.mixer} has no attention weights to expose")
    options = config.mixer_options.unfreeze()
    for arguments in [options] if len(config.mixers) == 1 else [options.setdefault(name, {}) for name in exposing]:
        arguments["expose_weights"] = True
    return DecoderLM(dataclasses.replace(config, mixer_options=options))


def run(
    model: DecoderLM,
    params,
    tokens: Int[Array, "B T"],
    *,
    capture: Site | str | Iterable[Site | str] = (),
    edits: Mapping[Site | str, Edit] = FrozenDict(),
    **inputs,
) -> tuple[LMOutput, dict[Site, Array]]:
    """Runs a model, changing values on their way and keeping some.

    Args:
      model: scanned or unrolled; params: of either shape.
      tokens: as for the model.
      capture: sites whose values are returned, as the rest of the model sees them: after the site's own edit.
      edits: {site: function of its value}. A value keeps its shape, and its dtype, to which the result is cast.
      **inputs: further arguments of the model: positions, segment_ids, cache, lengths.

    Returns:
      The model's output and {site: value}.

    Raises:
      ValueError: if a site never fired, naming those that did, or if an edit changes a shape.
    """
    capture = set(as_sites(capture))
    edits = {as_site(site): edit for site, edit in edits.items()}
    captured, fired = {}, []

    def visit(site, value):
        fired.append(site)
        if site in edits:
            value = _edited(site, edits[site], value)
        if site in capture:
            captured[site] = value
        return value

    out = _visited(model, params, tokens, visit, inputs)
    if missing := (capture | edits.keys()) - set(fired):
        raise ValueError(
            f"no value at {', '.join(map(str, sorted(missing)))}: this model (mixer {model.config.mixer}) has "
            f"{', '.join(map(str, fired))}"
        )
    return out, captured


def site_shapes(config: ModelConfig, batch: int, length: int) -> dict[Site, jax.ShapeDtypeStruct]:
    """Shape and dtype at every site of a model, in the order in which it computes them; computes nothing."""
    order = []

    def trace(params, tokens):
        values = {}

        def visit(site, value):
            order.append(site)
            values[site] = value
            return value

        _visited(DecoderLM(config), params, tokens, visit, {})
        return values

    shapes = jax.eval_shape(trace, abstract_params(config), jax.ShapeDtypeStruct((batch, length), jnp.int32))
    return {site: shapes[site] for site in order}


def sites(config: ModelConfig) -> tuple[Site, ...]:
    """All sites of a model, in the order in which it computes them."""
    return tuple(site_shapes(config, 1, 1))


def selection(
    site: Site | str,
    value: Array,
    positions: int | Int[Array, "B"] | Int[Array, "P B"] | Bool[Array, "B T *N"] | None = None,
    heads: Sequence[int] | None = None,
) -> Bool[Array, "..."]:
    """Which entries of a site's value are meant, as a mask that broadcasts to it.

    Args:
      value: what the site has, [B, T, ...]; or [B, N, T, S] at `attn_probs`, where positions are the queries'.
      positions: None for all; integers for one position per row [B], or the same in all rows, or P of them [P, B]; an
        index outside of 0 ... T - 1 means none. Or a mask [B, T], or [B, T, N].
      heads: indices, None for all. Query heads at q, log_forget, attn_probs and head_out; key heads at k, v, w, beta.

    Raises:
      ValueError: if a shape or a head does not fit, or the site has no heads.
    """
    site = as_site(site)
    has_weights = site.tap == "attn_probs"
    batch, length, num_heads = value.shape[0], *(value.shape[i] for i in ((2, 1) if has_weights else (1, 2)))
    mask = _token_mask(positions, batch, length)
    if heads is not None or mask.ndim == 3:
        if value.ndim < 4 and site.tap not in HEAD_TAPS:
            raise ValueError(f"{site} {value.shape} has no axis of heads")
        heads = range(num_heads) if heads is None else heads
        if not all(0 <= head < num_heads for head in heads):
            raise ValueError(f"heads {tuple(heads)} are not all among the {num_heads} of {site}")
        if mask.ndim == 3 and mask.shape[2] != num_heads:
            raise ValueError(f"a mask {mask.shape} does not fit the {num_heads} heads of {site}")
        is_chosen = jnp.array([head in heads for head in range(num_heads)])
        mask = (mask if mask.ndim == 3 else mask[..., None]) & is_chosen
    else:
        mask = mask[..., None]
    if has_weights:
        mask = jnp.moveaxis(mask, 2, 1)
    return mask.reshape(*mask.shape, *[1] * (value.ndim - 3))


def _visited(model, params, tokens, visit, inputs) -> LMOutput:
    """The model's output where every tap's value is `visit(site, value)`."""
    model, params = unrolled_model(model, params)

    def intercept(next_function, args, kwargs, context):
        value = next_function(*args, **kwargs)
        if not is_tap(context.module, context.method_name):
            return value
        layer, *_, tap = context.module.path
        return visit(Site(int(layer.removeprefix("layers_")), tap), value)

    with nn.intercept_methods(intercept):
        return model.apply({"params": params}, jnp.asarray(tokens), **jax.tree.map(jnp.asarray, inputs))


def _edited(site, edit, value):
    new = jnp.asarray(edit(value))
    if new.shape != value.shape:
        raise ValueError(f"the edit of {site} gives {new.shape}, its value is {value.shape}")
    return new.astype(value.dtype)


def _token_mask(positions, batch, length) -> Bool[Array, "B T *N"]:
    if positions is None:
        return jnp.ones((batch, length), bool)
    positions = jnp.asarray(positions)
    if positions.dtype == bool:
        if positions.ndim not in (2, 3) or positions.shape[:2] != (batch, length):
            raise ValueError(f"a mask of positions is {positions.shape}, not {(batch, length)} or that with heads")
        return positions
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions are integers or a mask, got {positions.dtype}")
    if positions.ndim > 2 or (positions.ndim and positions.shape[-1] != batch):
        raise ValueError(f"positions are {positions.shape}, not one or several for each of {batch} rows")
    positions = jnp.broadcast_to(positions, (batch,)) if positions.ndim == 0 else positions
    return (positions.reshape(-1, batch, 1) == jnp.arange(length)).any(axis=0)
