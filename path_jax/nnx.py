"""Linen modules as NNX modules and back, for code bases written in flax.nnx.

The package itself never imports this file. Parameters are plain arrays on both sides, under the same names.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


def to_nnx(module: nn.Module, params: dict, *sample_args, **sample_kwargs) -> nnx.bridge.ToNNX:
    """NNX module that computes `module.apply({"params": params}, ...)`; calls and methods take the same arguments.

        model = to_nnx(DecoderLM(config), params, tokens)
        logits = model(tokens).logits

    Its state is the parameters and nothing else, so it can be an attribute of another nnx.Module, and `nnx.grad`,
    `nnx.jit` and `nnx.Optimizer` treat it like any other.

    Args:
      module: the Linen module, unbound.
      params: its parameters, arrays in nested dicts.
      *sample_args, **sample_kwargs: arguments of a call; only their shapes and dtypes matter.

    Raises:
      ValueError: if `params` differ from the module's parameters in names or shapes.
    """
    # Traced for the shapes alone. The key is an argument of the call, hence no part of the state.
    build = lambda: nnx.bridge.ToNNX(module).lazy_init(*sample_args, rngs=jax.random.key(0), **sample_kwargs)
    model = nnx.eval_shape(build)
    expected, given = _shapes(to_params(model)), _shapes(params)
    if expected != given:
        differing = sorted(name for name in expected | given if expected.get(name) != given.get(name))
        listed = "; ".join(f"{name}: expected {expected.get(name)}, got {given.get(name)}" for name in differing)
        raise ValueError(f"params do not fit {type(module).__name__}: {listed}")
    nnx.update(model, jax.tree.map(jnp.asarray, params))
    return model


def to_params(model: nnx.bridge.ToNNX) -> dict[str, Any]:
    """The current parameters of a module made by `to_nnx`, as the nested dict that Linen's `apply` takes."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _shapes(params) -> dict[str, tuple[int, ...]]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in paths}
