"""The file model.bin in which CTranslate2 keeps a Whisper model.

Little-endian: version (uint32), name of the model class, its revision (uint32), number of
variables (uint32); of each variable name, rank (uint8), sizes (uint32), type (uint8), bytes (uint32) and the data, row
after row; number of aliases (uint32), of each its name and the variable that it stands for. A string is its length
(uint16) and its characters, the last of which is zero. int8 weights have a scale per row, int16 weights one, by which
they are divided. Projections of the same input are one matrix.

Not supported: other versions than 6, other models than Whisper, other quantisation, writing.
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

_HEADER = (6, "WhisperSpec", 3)  # version of the format, model class, its revision
_TYPES = tuple(np.dtype(x) for x in (np.float32, np.int8, np.int16, np.int32, np.float16, jnp.bfloat16))
_QUANTIZED = (np.int8, np.int16)
HEADS = ("encoder/num_heads", "decoder/num_heads")
# What other scalars of model.bin must be, 0 unless they are here: 3 is the exact gelu.
_SCALARS = {"decoder/activation": 3, "decoder/pre_norm": 1}
_FREE_SCALARS = ("decoder/alignment_heads", "decoder/alignment_layer")  # of time stamps for words
_MAX_RANK = 4


class _Variable(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    position: int


class CTranslate2File:
    """A model.bin of Whisper; its data stay on disk until they are read.

    Attributes:
      stored: {name: (shape, None or why its type cannot be read)}, without scalars and scales.

    Raises:
      ValueError: if the file is truncated or malformed, or holds another model.
    """

    def __init__(self, path: Path):
        self._path, self._position = path, 0
        self._data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        try:
            self._variables = self._walk()
        except ValueError as error:
            raise ValueError(f"{path} is truncated or malformed: {error}") from None
        self.stored = {
            name: (variable.shape, self._unreadable(name, variable))
            for name, variable in self._variables.items()
            if variable.shape and self._scaled(name) is None
        }
        for name, variable in self._variables.items():
            expected = _SCALARS.get(name, 0)
            if not variable.shape and self._scaled(name) is None and name not in (*HEADS, *_FREE_SCALARS):
                if self.scalar(name) != expected:
                    raise ValueError(f"{path}: {name}={self.scalar(name)} is not supported; it must be {expected}")

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Sizes of a variable.

        Raises:
          ValueError: if it is missing or of another rank.
        """
        shape = self.stored.get(name, (None,))[0]
        if shape is None or len(shape) != rank:
            raise ValueError(f"{self._path} has no {name} of {rank} axes")
        return shape

    def scalar(self, name: str) -> int:
        """An integer.

        Raises:
          ValueError: if it is missing or something else.
        """
        variable = self._variables.get(name)
        if variable is None or variable.shape or variable.dtype.kind != "i":
            raise ValueError(f"{self._path} has no integer {name}")
        return int(self._array(variable))

    def read(self, name: str) -> np.ndarray:
        """Returns one variable; quantised ones are float32.

        Raises:
          ValueError: if a scale is not a positive number.
        """
        variable = self._variables[name]
        value = self._array(variable)
        if variable.dtype not in _QUANTIZED:
            return value
        scale = self._array(self._variables[f"{name}_scale"]).astype(np.float32)
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError(f"{self._path}: {name} has a scale that is not a positive number")
        return value / scale.reshape(scale.shape + (1,) * (value.ndim - 1 if scale.ndim else 0))

    def _array(self, variable: _Variable) -> np.ndarray:
        count = math.prod(variable.shape)
        return np.frombuffer(self._data, variable.dtype, count, variable.position).reshape(variable.shape)

    def _scaled(self, name: str) -> str | None:
        """The quantised variable that `name` is the scale of."""
        weight = name.removesuffix("_scale")
        is_scale = weight != name and weight in self._variables and self._variables[weight].dtype in _QUANTIZED
        return weight if is_scale else None

    def _unreadable(self, name: str, variable: _Variable) -> str | None:
        if variable.dtype not in _QUANTIZED:
            return "int32" if variable.dtype == np.int32 else None
        scale = self._variables.get(f"{name}_scale")
        is_scale = scale is not None and scale.dtype.kind != "i" and scale.shape in ((), variable.shape[:1])
        return None if is_scale else f"{variable.dtype} without a scale"

    def _walk(self) -> dict[str, _Variable]:
        header = (*self._integers("I"), self._string(), *self._integers("I"))
        if header != _HEADER:
            raise ValueError(f"it opens with {header}; {_HEADER} is read")
        variables: dict[str, _Variable] = {}

        def new_name() -> str:
            name = self._string()
            if name in variables:
                raise ValueError(f"{name[:100]} appears twice")
            return name

        for _ in range(*self._integers("I")):
            name = new_name()
            (rank,) = self._integers("B")
            if rank > _MAX_RANK:
                raise ValueError(f"{name[:100]} has {rank} axes")
            shape = self._integers("I" * rank)
            kind, size = self._integers("BI")
            if kind >= len(_TYPES) or size != math.prod(shape) * _TYPES[kind].itemsize:
                raise ValueError(f"{name[:100]} of the type {kind} and shape {shape} takes {size} bytes")
            variables[name] = _Variable(shape, _TYPES[kind], self._skip(size))
        for _ in range(*self._integers("I")):
            alias, target = new_name(), self._string()
            if target not in variables:
                raise ValueError(f"{alias[:100]} stands for {target[:100]}, which is not there")
            variables[alias] = variables[target]
            if f"{target}_scale" in variables:
                variables[f"{alias}_scale"] = variables[f"{target}_scale"]
        if self._position != len(self._data):
            raise ValueError(f"{len(self._data) - self._position} bytes follow the last alias")
        return variables

    def _skip(self, size: int) -> int:
        start = self._position
        if size > len(self._data) - start:
            raise ValueError(f"{size} bytes at {start} are more than the file has")
        self._position = start + size
        return start

    def _integers(self, layout: str) -> tuple[int, ...]:
        size = struct.calcsize("<" + layout)
        return struct.unpack("<" + layout, self._data[self._skip(size) : self._position].tobytes())

    def _string(self) -> str:
        (size,) = self._integers("H")
        text = self._data[self._skip(size) : self._position].tobytes()
        if not text.endswith(b"\0") or not text[:-1].decode("ascii").isprintable():
            raise ValueError(f"the name {text[:100]!r} is not text that ends with zero")
        return text[:-1].decode("ascii")
