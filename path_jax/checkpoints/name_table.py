"""Foreign checkpoints described by a table: a row for each tensor, and a config.json of numbers.

For models that are only read, and whose layers are all alike: a ViT (vit.py), Whisper (whisper.py). Language models,
which are written too and come in dialects, have names.py.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from path_jax.checkpoints.names import OPS, Op, Tensor, check_stored
from path_jax.parallel.sharding import path_name

_MAX_NUMBER = 2**31 - 1


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
