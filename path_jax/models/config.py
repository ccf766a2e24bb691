"""ModelConfig: everything that determines a decoder language model, and its FLOP count."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict

from path_jax.mixers import MIXERS

REMAT = ("none", "full", "dots")
DTYPES = ("float32", "bfloat16", "float16")
NORMS = ("rms", "layer")
MLPS = ("swiglu", "gelu", "none")
_COMPARING = ("path", "path_fox", "fox", "rope", "nope", "stick_breaking")  # mixers whose work grows with T squared


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Decoder language model.

    Args:
      vocab_size: V; num_layers: L; embed_dim: D; num_heads: N.
      num_kv_heads: K, N by default; head_dim: H, D // N by default.
      mlp_dim: width of the MLP; by default 8 D / 3 rounded up to a multiple of 256.
      mixer: a name in `path_jax.mixers.MIXERS`, or several that the layers take in turn: "mamba+mamba+rope".
      mixer_options: arguments of that mixer, which win over those of the model; where there are several mixers, {name:
        its arguments}.
      tie_embeddings: the output projection is the transposed embedding.
      norm_eps: of the norms before mixer and MLP and of the final norm.
      norm: "rms", or "layer" (mean removed, learned scale and bias).
      mlp: "swiglu", "none" (blocks of the mixer alone, as Mamba's), or "gelu" (two projections with biases, tanh
        approximation). With norm="layer", num_positions and the mixer "nope" with biases the last makes GPT-2.
      num_positions: learned embeddings of positions 0 ... num_positions - 1, the longest sequence then; None for none.
      scan_layers: one compiled layer scanned over stacked parameters (`layers`) rather than L copies (`layers_0` ...).
      remat: what the backward pass recomputes: "none", "dots" (all but products with parameters) or "full" (everything
        inside a layer).
      dtype: compute dtype; parameters and logits are float32 always.
      implementation: of the attention kernels; None picks the best.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    mixer: str = "path_fox"
    mixer_options: Mapping[str, Any] = dataclasses.field(default_factory=FrozenDict)
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    norm: str = "rms"
    mlp: str = "swiglu"
    num_positions: int | None = None
    scan_layers: bool = True
    remat: str = "none"
    dtype: str = "float32"
    implementation: str | None = None

    def __post_init__(self):
        fill = lambda name, value: object.__setattr__(self, name, value)  # frozen: the documented way to set defaults
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.num_positions is not None and self.num_positions < 1:
            raise ValueError(f"num_positions={self.num_positions} must be positive, or None for no learned positions")
        for name, value, choices in (
            *(("mixer", name, tuple(MIXERS)) for name in self.mixers),
            ("norm", self.norm, NORMS),
            ("mlp", self.mlp, MLPS),
            ("remat", self.remat, REMAT),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(choices)}")
        if self.head_dim is None:
            if self.embed_dim % self.num_heads:
                raise ValueError(f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}")
            fill("head_dim", self.embed_dim // self.num_heads)
        fill("num_kv_heads", self.num_kv_heads or self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        fill("mlp_dim", self.mlp_dim or -(-self.embed_dim * 8 // 3 // 256) * 256)
        if self.num_kv_heads != self.num_heads and not any("num_kv_heads" in _fields(mixer) for mixer in self.mixers):
            raise ValueError(f"the mixer {self.mixer} has no key heads to share: num_kv_heads={self.num_kv_heads}")
        fill("mixer_options", _hashable(self.mixer_options))
        if len(self.mixers) > 1:
            if self.scan_layers:
                raise ValueError(f"a scan has one mixer in all layers: mixer={self.mixer} needs scan_layers=False")
            for name, options in self.mixer_options.items():
                if name not in self.mixers or not isinstance(options, Mapping):
                    raise ValueError(
                        f"mixer_options of {self.mixer} has arguments by the name of a mixer, got {name}={options!r}"
                    )

    @property
    def mixers(self) -> tuple[str, ...]:
        """Names that the layers take in turn."""
        return tuple(self.mixer.split("+"))

    def _mixer_of(self, layer: int) -> str:
        return self.mixers[layer % len(self.mixers)]

    def make_mixer(self, layer: int = 0, name: str | None = None) -> nn.Module:
        """The mixer of a layer; its fields are the options with their defaults filled in."""
        mixer = self._mixer_of(layer)
        given = dict(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            implementation=self.implementation,
        )
        given = {name: value for name, value in given.items() if name in _fields(mixer)}
        options = self.mixer_options if len(self.mixers) == 1 else self.mixer_options.get(mixer, {})
        return MIXERS[mixer](name=name, dtype=jnp.dtype(self.dtype), **given | dict(options))

    def train_flops_per_token(self, num_parameters: int, length: int) -> float:
        """Model FLOPs of a training step per token, with causal accounting.

        Six per parameter that multiplies (an untied embedding and learned positions are look-ups), plus, for mixers
        that compare queries with keys, twelve N H per visible key and layer, of which there are (T + 1) / 2 on average.
        What an algorithm adds (PaTH's linear stage, a recurrence's updates, rematerialisation) does not count.
        """
        looked_up = (0 if self.tie_embeddings else self.vocab_size) + (self.num_positions or 0)
        multiplying = num_parameters - looked_up * self.embed_dim
        num_comparing = sum(self._mixer_of(layer) in _COMPARING for layer in range(self.num_layers))
        return 6 * multiplying + 12 * num_comparing * self.num_heads * self.head_dim * (length + 1) / 2


def _fields(mixer: str) -> set[str]:
    module = MIXERS[mixer]
    return {field.name for field in dataclasses.fields(getattr(module, "func", module))}


def _hashable(options: Mapping[str, Any]) -> FrozenDict:
    """The same whether written in Python or read back from JSON."""
    kinds = {list: tuple, dict: _hashable}
    return FrozenDict({key: kinds.get(type(x), lambda x: x)(x) for key, x in options.items()})
