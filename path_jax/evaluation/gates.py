"""Mean forget gate and reflection strength of every layer and head on held-out text.

They say whether a trained model uses its gates: a forget gate of 1 keeps everything, one of 0 sees the current token
only; a beta of 0 leaves keys where they are, 1 projects and 2 reflects.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from path_jax.data import Document
from path_jax.evaluation.length_extrapolation import long_rows
from path_jax.models import DecoderLM
from path_jax.nn.taps import is_tap

# Metric name, and how it follows from the value of the tap.
_GATES = {"log_forget": ("forget_gate", jnp.exp), "beta": ("beta", lambda beta: beta)}


class GateStatistics:
    """Means over positions of exp(log_forget) and beta.

    Calling the object with parameters returns `forget_gate/layer0/head0`, `beta/layer0/head0` and so on; a mixer
    without gates gives an empty dictionary. A mixture of mixers by layer is not covered.

    Args:
      model: The language model, scanned or unrolled.
      documents: Held-out texts; shorter ones are joined, as in `long_rows`.
      length: Tokens of each text.
      batch_size: Texts, read in one forward pass; fewer where the corpus is short.

    Raises:
      ValueError: for a number out of range, or a corpus shorter than `length`.
    """

    def __init__(self, model: DecoderLM, documents: Sequence[Document], *, length: int, batch_size: int = 4):
        for name, value in (("length", length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self._tokens = long_rows(documents, length, batch_size)
        self._means = jax.jit(lambda params, tokens: _gate_means(model, params, tokens))

    def __call__(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Returns the mean of every gate, by layer and head."""
        means = jax.device_get(self._means(params, self._tokens))
        return {
            f"{name}/layer{layer}/head{head}": float(value)
            for name, by_layer in means.items()
            for layer, by_head in enumerate(by_layer)
            for head, value in enumerate(np.atleast_1d(by_head))
        }


def _gate_means(
    model: DecoderLM, params: Mapping[str, Any], tokens: Int[Array, "B T"]
) -> dict[str, Float[Array, "L N"]]:
    """Returns [layers, heads] means for each gate that the model has."""

    def is_gate(module: nn.Module, method_name: str) -> bool:
        # Other taps would be kept for all layers, only to be thrown away.
        return is_tap(module, method_name) and module.name in _GATES

    _, variables = model.apply({"params": params}, tokens, capture_intermediates=is_gate, mutable=["intermediates"])
    captured = variables.get("intermediates", {})
    if model.config.scan_layers:
        layers = [captured.get("layers", {})]
    else:
        layers = [captured.get(f"layers_{i}", {}) for i in range(model.config.num_layers)]
    means = {}
    for tap, (name, gate) in _GATES.items():
        values = [layer["mixer"][tap]["__call__"][0] for layer in layers if tap in layer.get("mixer", {})]
        if values:
            # A scanned stack has one value with a leading layer axis, an unrolled one a value for each layer.
            stacked = values[0] if model.config.scan_layers else jnp.stack(values)
            means[name] = gate(stacked).mean(axis=(1, 2))
    return means
