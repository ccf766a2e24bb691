"""Tensors of a checkpoint directory in the safetensors format: one file, or several with an index."""

import contextlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from path_jax.checkpoints.folders import member, parse_json, read_json

_MAX_HEADER_BYTES = 2**24  # about 10^5 tensors
_FLOATS = ("F32", "F16", "BF16", "F64")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class TensorFiles(contextlib.ExitStack):
    """The tensors of a directory, read one by one. Use it in a `with` block.

    Attributes:
      stored: {name: (shape, None or the type if it is not a floating-point one)}.

    Raises:
      FileNotFoundError: if there are no safetensors files.
      ValueError: if a file or the index is malformed, or the index names a file outside the directory.
    """

    def __init__(self, directory: Path):
        super().__init__()
        self.stored: dict[str, tuple[tuple[int, ...], str | None]] = {}
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        if (directory / _INDEX).exists() and not (directory / _SINGLE).exists():
            placed = _weight_map(read_json(member(directory, _INDEX)), directory / _INDEX)
            for name in sorted(set(placed.values())):
                self._add(member(directory, name), {key for key, file in placed.items() if file == name})
        else:
            self._add(member(directory, _only_file(directory)))

    def _add(self, path: Path, expected: set[str] | None = None) -> None:
        header = _read_header(path)
        if expected is not None and expected != set(header):
            difference = sorted(expected ^ set(header))
            raise ValueError(
                f"{path} and {_INDEX} disagree about {len(difference)} tensors, such as {difference[0][:200]}"
            )
        self.stored |= header
        self._files |= dict.fromkeys(header, path)

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, in host memory."""
        from safetensors import SafetensorError, safe_open

        path = self._files[name]
        try:
            if path not in self._open:
                self._open[path] = self.enter_context(safe_open(path, framework="numpy"))
            return self._open[path].get_tensor(name)
        except (SafetensorError, KeyError, TypeError) as error:  # the last two: a type that numpy does not have
            raise ValueError(f"{path} is damaged at {name}: {error}") from error


def _only_file(directory: Path) -> str:
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if _SINGLE in names:
        return _SINGLE
    if len(names) == 1:
        return names[0]
    if names:
        raise ValueError(f"{directory} holds {len(names)} safetensors files and no {_INDEX} that joins them")
    if pickles := sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern)):
        raise ValueError(
            f"{directory} holds {pickles[0]}, a pickle, which can run any code and is not read; "
            "convert it to safetensors where you trust it (save_pretrained of transformers does)"
        )
    raise FileNotFoundError(f"{directory} has no {_SINGLE}")


def _weight_map(index: dict[str, Any], where: Path) -> dict[str, str]:
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise ValueError(f"{where} has no weight_map from tensors to files")
    for file in placed.values():
        if not file.endswith(".safetensors"):
            raise ValueError(f"{where} names the file {file[:200]!r}; only .safetensors files are read")
    return placed


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """Checks what the safetensors package leaves unchecked: names given twice, and memory for a huge header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is truncated: {size} bytes hold no header of {length}")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path} has a header of {length} bytes; at most {_MAX_HEADER_BYTES} are read")
        header = parse_json(file.read(length), f"the header of {path}")
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
                all(type(n) is int and n >= 0 for n in shape) and 0 <= begin <= end <= size - 8 - length
            ):
                stored[name] = (tuple(shape), None if dtype in _FLOATS else dtype)
            case _:
                raise ValueError(f"{path} is truncated or malformed at the tensor {name[:200]}")
    return stored


def write_tensors(directory: Path, tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int) -> None:
    """Writes tensors into files of at most `max_bytes` (more where one tensor has more), with an index if several.

    Host memory holds one file at a time.
    """
    from safetensors.numpy import save_file

    placed: dict[str, str] = {}
    group: dict[str, np.ndarray] = {}
    sizes = []

    def flush():
        sizes.append(sum(x.nbytes for x in group.values()))
        name = f"part-{len(sizes)}"
        save_file(group, directory / name, metadata={"format": "pt"})  # transformers refuses files without it
        (directory / name).chmod(directory.stat().st_mode & 0o666)  # save_file lets only the owner read
        placed.update(dict.fromkeys(group, name))
        group.clear()

    for name, value in tensors:
        if group and sum(x.nbytes for x in group.values()) + value.nbytes > max_bytes:
            flush()
        group[name] = value
    flush()
    if len(sizes) == 1:
        (directory / "part-1").rename(directory / _SINGLE)
        return
    final = {f"part-{i}": f"model-{i:05d}-of-{len(sizes):05d}.safetensors" for i in range(1, len(sizes) + 1)}
    for part, name in final.items():
        (directory / part).rename(directory / name)
    weight_map = {name: final[part] for name, part in sorted(placed.items())}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
