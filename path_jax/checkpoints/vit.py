"""Vision transformers of Hugging Face (`ViTForImageClassification`): config.json beside safetensors files.

Read only. Not supported: images that are not square, projections without biases, pickles, quantised tensors. What reads
names and numbers here also serves Whisper (whisper.py).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from path_jax.checkpoints.folders import member, read_json
from path_jax.checkpoints.names import OPS, Op, Tensor, check_stored
from path_jax.checkpoints.shards import TensorFiles
from path_jax.models.vit import ViTConfig, abstract_params
from path_jax.parallel.sharding import path_name

_MAX_NUMBER = 2**31 - 1
_PATCHES = Op(lambda x, _: x.transpose(2, 3, 1, 0), lambda x, _: x.transpose(3, 2, 0, 1))  # [D, C, h, w]
_POOLER = "vit.pooler."  # some writers store it; the classifier does not read it


class Row(NamedTuple):
    """One foreign tensor. Several of ours are joined along their last axis; None is a part of zeros that we lack."""

    ours: tuple[str | None, ...]
    theirs: str
    op: Op


def dense(ours: str, theirs: str) -> list[Row]:
    """The rows of a layer y = x W + b that is stored as a torch.nn.Linear."""
    return [Row((f"{ours}/kernel",), f"{theirs}.weight", OPS["transpose"]), copied(f"{ours}/bias", f"{theirs}.bias")]


def norm(ours: str, theirs: str, names: tuple[str, str] = (".weight", ".bias")) -> list[Row]:
    """The rows of a layer norm."""
    return [copied(f"{ours}/{leaf}", theirs + name) for leaf, name in zip(("scale", "bias"), names)]


def copied(ours: str, theirs: str) -> Row:
    """The row of an array that is stored as it is."""
    return Row((ours,), theirs, OPS["copy"])


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


def check_model(raw: Mapping[str, Any], model_type: str, fixed: Mapping[str, Any]) -> None:
    """Checks that config.json describes a model that we have.

    Args:
      raw: config.json.
      model_type: Its kind.
      fixed: {key: value under which the model is ours}, also where the key is missing.

    Raises:
      ValueError: naming the key.
    """
    for key, value in {"model_type": model_type, "quantization_config": None, **fixed}.items():
        given = raw.get(key, None if key == "model_type" else value)
        if given != value:
            raise ValueError(f"config.json: {key}={repr(given)[:100]} is not supported; it must be {value!r}")


def number(raw: Mapping[str, Any], key: str, default: int | float | None = None) -> Any:
    """raw[key], a positive number: a float where the default is one, else an integer.

    Raises:
      ValueError: if it is something else, or missing without a default.
    """
    value, kind = raw.get(key, default), float if isinstance(default, float) else int
    if type(value) not in (int, float) or not 0 < value <= _MAX_NUMBER or kind(value) != value:
        raise ValueError(f"config.json: {key} is {repr(value)[:100]}; it must be a positive {kind.__name__}")
    return kind(value)


def check_layers(where: Any, num_layers: int, stored: Mapping[str, Any]) -> None:
    """Refuses a configuration with absurdly many layers before they are listed.

    Raises:
      ValueError: if there are more layers than tensors.
    """
    if num_layers > len(stored):
        raise ValueError(f"{where}: the configuration has {num_layers} layers, the files {len(stored)} tensors")


def read_params(
    where: Any,
    abstract: Mapping[str, Any],
    rows: Iterable[Row],
    stored: Mapping[str, tuple[tuple[int, ...], str | None]],
    read: Callable[[str], np.ndarray],
    dtype: str,
) -> dict[str, Any]:
    """Builds a parameter tree, one foreign tensor in host memory at a time.

    Args:
      where: Named in errors.
      abstract: Shapes of the tree.
      rows: Where each of its parameters is stored.
      stored: {foreign name: (shape, None or why its type cannot be read)}.
      read: Returns a foreign tensor by name.
      dtype: Of the parameters.

    Raises:
      ValueError: listing every tensor that is missing, superfluous, or of another shape or type; for a part that should
        be zero and is not.
    """
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(abstract)}
    tensors = []
    for ours, theirs, op in rows:
        *axes, width = shapes[next(filter(None, ours))]  # all parts are of one shape
        joined = jax.ShapeDtypeStruct((*axes, len(ours) * width), jnp.float32)
        shape = jax.eval_shape(lambda x: op.to_theirs(x, None), joined).shape
        tensors.append(Tensor(theirs, shape, ours, op))
    check_stored(where, tensors, stored)
    params: dict[str, Any] = {}
    for tensor in tensors:
        value = tensor.op.to_ours(read(tensor.theirs), None)
        for name, part in zip(tensor.ours, np.split(value, len(tensor.ours), axis=-1), strict=True):
            if name is None:
                if np.any(part):
                    raise ValueError(f"{where}: {tensor.theirs} has a bias of keys, which the model does not have")
                continue
            *folders, leaf = name.split("/")
            node = params
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = jax.device_put(np.array(part, jnp.dtype(dtype)))
    return params
