"""Vision transformers of Hugging Face (`ViTForImageClassification`): config.json beside safetensors files.

Read only. Not supported: images that are not square, projections without biases, pickles, quantised tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from path_jax.checkpoints.folders import member, read_json
from path_jax.checkpoints.name_table import Row, check_layers, check_model, copied, dense, norm, number, read_params
from path_jax.checkpoints.names import Op
from path_jax.checkpoints.shards import TensorFiles
from path_jax.models.vit import ViTConfig, abstract_params

_PATCHES = Op(lambda x, _: x.transpose(2, 3, 1, 0), lambda x, _: x.transpose(3, 2, 0, 1))  # [D, C, h, w]
_POOLER = "vit.pooler."  # some writers store it; the classifier does not read it


def load_vit(path: str | Path, dtype: str | None = None) -> tuple[ViTConfig, dict[str, Any]]:
    """Loads an image classifier.

    Args:
      path: A directory with config.json and safetensors files.
      dtype: Of the parameters and of the computation: "float32" (the default), "bfloat16" or "float16".

    Returns:
      The configuration and the parameters of `path_jax.models.vit.ViT`.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: for a model that is not supported, or tensors that do not fit it; the message lists them all.
    """
    path = Path(path)
    raw = read_json(member(path, "config.json"))
    check_model(raw, "vit", dict(hidden_act="gelu", qkv_bias=True))
    labels = _labels(raw)
    config = ViTConfig(
        image_size=number(raw, "image_size", 224),
        patch_size=number(raw, "patch_size", 16),
        num_channels=number(raw, "num_channels", 3),
        num_classes=len(labels) if labels else number(raw, "num_labels", 2),
        num_layers=number(raw, "num_hidden_layers"),
        embed_dim=number(raw, "hidden_size"),
        num_heads=number(raw, "num_attention_heads"),
        mlp_dim=number(raw, "intermediate_size"),
        norm_eps=number(raw, "layer_norm_eps", 1e-12),
        dtype=dtype or "float32",
    )
    with TensorFiles(path) as files:
        stored = {name: entry for name, entry in files.stored.items() if not name.startswith(_POOLER)}
        check_layers(path, config.num_layers, stored)
        return config, read_params(path, abstract_params(config), _rows(config), stored, files.read, config.dtype)


def vit_labels(path: str | Path) -> tuple[str, ...]:
    """Names of the K classes, in the order of the logits; none if config.json has none.

    Raises:
      FileNotFoundError: if there is no config.json.
      ValueError: if it is malformed.
    """
    return _labels(read_json(member(Path(path), "config.json")))


def _labels(raw: Mapping[str, Any]) -> tuple[str, ...]:
    labels = raw.get("id2label") or {}
    keys = [str(i) for i in range(len(labels))] if isinstance(labels, dict) else None
    if keys is None or set(labels) != set(keys) or not all(isinstance(x, str) for x in labels.values()):
        raise ValueError("config.json: id2label must map the numbers from 0 on to names")
    return tuple(labels[key] for key in keys)


def _rows(config: ViTConfig) -> list[Row]:
    rows = [
        copied("cls_token", "vit.embeddings.cls_token"),
        copied("position_embed", "vit.embeddings.position_embeddings"),
        Row(("patch_conv/kernel",), "vit.embeddings.patch_embeddings.projection.weight", _PATCHES),
        copied("patch_conv/bias", "vit.embeddings.patch_embeddings.projection.bias"),
        *norm("final_norm", "vit.layernorm"),
        *dense("classifier", "classifier"),
    ]
    for i in range(config.num_layers):
        ours, theirs = f"layers_{i}", f"vit.encoder.layer.{i}"
        for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
            rows += dense(f"{ours}/mixer/{letter}_proj", f"{theirs}.attention.attention.{word}")
        rows += dense(f"{ours}/mixer/o_proj", f"{theirs}.attention.output.dense")
        rows += dense(f"{ours}/mlp/up_proj", f"{theirs}.intermediate.dense")
        rows += dense(f"{ours}/mlp/down_proj", f"{theirs}.output.dense")
        rows += norm(f"{ours}/mixer_norm", f"{theirs}.layernorm_before")
        rows += norm(f"{ours}/mlp_norm", f"{theirs}.layernorm_after")
    return rows
