"""Loading and saving models in the formats of others: config.json beside safetensors files, GGUF, and our own.

Read: flash-linear-attention (`path_attn`, `forgetting_transformer`), the official Forgetting Transformer, Hugging Face
`llama` and `gpt2`, GGUF files of the llama architecture, run directories. Written: all of these but GGUF. Not read:
pickles, quantised safetensors, scaled rotary embeddings, AttnRes.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from path_jax.checkpoints.dialects import find_dialect, read_dialect, write_dialect
from path_jax.checkpoints.folders import member, new_directory, read_json
from path_jax.checkpoints.gguf import GgufFile
from path_jax.checkpoints.names import (
    BUFFERS,
    PREFIXES,
    Tensor,
    check_stored,
    export_params,
    import_params,
    tensors_of,
)
from path_jax.checkpoints.native import restore_params, save_params, write_config
from path_jax.checkpoints.shards import TensorFiles, write_tensors
from path_jax.models import ModelConfig
from path_jax.models.decoder_lm import abstract_params
from path_jax.models.stacking import unstack_layers
from path_jax.parallel.sharding import parameter_spec, tree_shardings

_MAX_LISTED_LAYERS = 1000  # the tensors of so many are listed for an error message
_MAX_SHARD_BYTES = 5 * 10**9
Placement = jax.sharding.Mesh | jax.sharding.Sharding | None


def load_pretrained(
    path: str | Path, dtype: str | None = None, sharding: Placement = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a model that was trained here or elsewhere.

    Args:
      path: A directory with config.json and safetensors files, a run directory, or a `.gguf` file.
      dtype: Of the parameters and of the computation: "float32" (the default), "bfloat16" or "float16".
      sharding: A mesh splits the parameters as in training, a sharding is used for every parameter, None takes the
        default device. Each tensor goes from its file to its devices by itself.

    Returns:
      The configuration, with scan_layers=False, and the unrolled parameters (`layers_0` ...). Packed documents, long
      sequences and gradients work as in any other model.

    Raises:
      FileNotFoundError: if the path or a file that it needs does not exist.
      ValueError: for a model or a file that is not supported, or whose tensors do not fit its configuration; the
        message lists them all.
    """
    path = Path(path)
    if path.suffix == ".gguf" and not path.is_dir():
        with GgufFile(path) as file:
            config = _with_dtype(read_dialect(file.config()), dtype)
            tensors = _tensors(path, config, "gguf", len(file.stored))
            check_stored(path, tensors, file.stored)
            return config, import_params(config, tensors, file.read, _placing(config, sharding))
    raw = _read_raw(path)
    config = _with_dtype(_directory_config(path, raw), dtype)
    return _load_run(path, config, sharding) if _is_run(raw) else _load_safetensors(path, raw, config, sharding)


def load_config(path: str | Path, dtype: str | None = None) -> ModelConfig:
    """The configuration that `load_pretrained` returns; takes the same path and dtype, raises the same errors."""
    path = Path(path)
    if path.suffix == ".gguf" and not path.is_dir():
        with GgufFile(path) as file:
            return _with_dtype(read_dialect(file.config()), dtype)
    return _with_dtype(_directory_config(path, _read_raw(path)), dtype)


def save_pretrained(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    format: str = "hf",
    *,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Saves a model so that `load_pretrained`, or the code of others, can load it.

    Args:
      path: A directory that does not exist or is empty. It appears once it is complete.
      config: The model.
      params: Its parameters, scanned or unrolled as config.scan_layers says, written in their own dtypes.
      format: "fla" (flash-linear-attention), "fox" (official Forgetting Transformer), "hf" (Hugging Face llama or gpt2)
        or "native" (a run directory).
      extra: Further keys of config.json, such as bos_token_id; those that describe the model win over them.
      max_shard_bytes: Larger checkpoints become several files with an index.

    Raises:
      FileExistsError: if the directory holds something.
      ValueError: if the format cannot hold the model, or the parameters are not those of the configuration.
    """
    with new_directory(Path(path)) as directory:
        if format == "native":
            model = {**dataclasses.asdict(config), "mixer_options": config.mixer_options.unfreeze()}
            write_config(directory, {**(extra or {}), "model": model})
            save_params(directory, params)
            return
        params = unstack_layers(params) if config.scan_layers else params
        raw = write_dialect(config, format, extra)
        # transformers of all versions reads `torch_dtype`; its newer name would be ignored by older ones.
        raw["torch_dtype"] = str(jax.tree.leaves(params)[0].dtype)
        raw.pop("dtype", None)
        tensors = tensors_of(config, find_dialect(raw).table(config))
        write_tensors(directory, export_params(config, tensors, params), max_shard_bytes)
        (directory / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _read_raw(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return read_json(member(path, "config.json"))
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    raise ValueError(f"{path} is neither a directory with config.json nor a .gguf file")


def _is_run(raw: Mapping[str, Any]) -> bool:
    return "model_type" not in raw and isinstance(raw.get("model"), Mapping)


def _directory_config(path: Path, raw: Mapping[str, Any]) -> ModelConfig:
    if not _is_run(raw):
        return read_dialect(raw)
    try:
        config = ModelConfig(**raw["model"])
        for layer in range(len(config.mixers)):
            config.make_mixer(layer)
    except (TypeError, AttributeError) as error:  # unknown or malformed fields and options
        raise ValueError(f"{path}: the model section of config.json is malformed: {error}") from error
    return config


def _with_dtype(config: ModelConfig, dtype: str | None) -> ModelConfig:
    return dataclasses.replace(config, dtype=dtype or "float32")


def _load_run(path: Path, config: ModelConfig, sharding: Placement):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.dtype), abstract_params(config))
    if isinstance(sharding, jax.sharding.Mesh):
        shardings = tree_shardings(shapes, sharding)
    else:
        shardings = jax.tree.map(lambda _: sharding, shapes)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    params = restore_params(path, jax.tree.map(place, shapes, shardings))
    params = unstack_layers(params) if config.scan_layers else params
    return dataclasses.replace(config, scan_layers=False), params


def _load_safetensors(path: Path, raw: Mapping[str, Any], config: ModelConfig, sharding: Placement):
    table = find_dialect(raw).table(config)
    with TensorFiles(path) as files:
        # Our name for a tensor -> its name in the files.
        prefix = PREFIXES.get(table, "")
        has_prefix = any(name.startswith(prefix) for name in files.stored)
        names = {name if has_prefix or name == "lm_head.weight" else prefix + name: name for name in files.stored}
        names = {ours: name for ours, name in names.items() if not re.fullmatch(BUFFERS.get(table, ""), ours)}
        tensors = _tensors(path, config, table, len(names))
        read = lambda name: files.read(names[name])
        # Some writers store the output projection although it is the embedding.
        head = names.pop("lm_head.weight", None) if config.tie_embeddings else None
        check_stored(path, tensors, {ours: files.stored[name] for ours, name in names.items()})
        if head and not np.array_equal(files.read(head), read(tensors[0].theirs)):
            raise ValueError(f"{path}: config.json ties the embeddings, but lm_head.weight differs from the embedding")
        return config, import_params(config, tensors, read, _placing(config, sharding))


def _tensors(path: Path, config: ModelConfig, table: str, num_stored: int) -> list[Tensor]:
    """The foreign tensors of a model; a configuration with absurdly many layers is refused before they are listed."""
    if config.num_layers > max(num_stored, _MAX_LISTED_LAYERS):
        raise ValueError(f"{path}: the configuration has {config.num_layers} layers, the files {num_stored} tensors")
    return tensors_of(config, table)


def _placing(config: ModelConfig, sharding: Placement) -> Callable[[str, np.ndarray], jax.Array]:
    def place(name, value):
        where = sharding
        if isinstance(sharding, jax.sharding.Mesh):
            where = jax.sharding.NamedSharding(sharding, parameter_spec(name, value.shape, sharding))
        # A copy: the value may be a view of a file that goes away.
        return jax.device_put(np.array(value, jnp.dtype(config.dtype)), where)

    return place
