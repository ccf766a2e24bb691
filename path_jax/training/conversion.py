"""Turning a pretrained model into one with another mixer: PaTH from a RoPE model, in three stages.

mse: every mixer imitates the one in its place in the teacher, on the teacher's own inputs; nothing else is trained.
kl:  the whole model imitates the teacher's distribution over next tokens.
lm:  next-token prediction, as in any training run.

Source: Yang et al., "PaTH Attention", section 4 (converting a RoPE model), which gives the order of the stages and
their token counts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from path_jax.checkpoints import load_pretrained
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.stacking import stack_layers
from path_jax.parallel.sharding import path_name, tree_shardings

STAGES = ("mse", "kl", "lm")


@dataclasses.dataclass(frozen=True)
class ConversionConfig:
    """The section `conversion` of a configuration.

    Args:
      teacher: checkpoint of the model to convert, anything that `load_pretrained` loads.
      stage: "mse", "kl" or "lm".
      start: checkpoint of the previous stage; "" starts from the teacher's parameters, those that only the new mixer
        has being drawn at random.
    """

    teacher: str
    stage: str
    start: str = ""

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"conversion.stage={self.stage!r} is unknown; choose from {', '.join(STAGES)}")
        if not self.teacher:
            raise ValueError("conversion.teacher must name a checkpoint")

    @property
    def trained(self) -> str | None:
        """Pattern of the parameters that are trained, None for all."""
        return r"/mixer/" if self.stage == "mse" else None


def load(path: str, like: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[DecoderLM, dict[str, Any]]:
    """A model to start from or to imitate, computing like `like` does, its parameters sharded as in training.

    Raises:
      ValueError: if it does not fit: another vocabulary, depth or width.
    """
    config, params = load_pretrained(path, sharding=mesh)
    for name in ("vocab_size", "num_layers", "embed_dim"):
        if getattr(config, name) != getattr(like, name):
            raise ValueError(f"{path} has {name}={getattr(config, name)}, the model {getattr(like, name)}")
    config = dataclasses.replace(config, scan_layers=like.scan_layers, dtype=like.dtype)
    if like.scan_layers:
        shapes = jax.eval_shape(stack_layers, params)
        params = jax.jit(stack_layers, out_shardings=tree_shardings(shapes, mesh))(params)
    return DecoderLM(config), params


def start_from(params: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with every parameter of `source` that has the same name and shape."""
    found = _by_name(source)

    def choose(path, ours):
        theirs = found.get(path_name(path))
        if theirs is None or theirs.shape != ours.shape:
            return ours
        # A copy: training donates its state, and a teacher lives on.
        return jax.device_put(jnp.array(theirs, ours.dtype, copy=True), ours.sharding)

    return jax.tree_util.tree_map_with_path(choose, params)


def lacking(params: Mapping[str, Any], source: Mapping[str, Any]) -> list[str]:
    """Names of the parameters (arrays or their shapes) that `source` does not have, or has in another shape."""
    found = _by_name(source)
    return [name for name, x in _by_name(params).items() if name not in found or found[name].shape != x.shape]


def _by_name(params):
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
