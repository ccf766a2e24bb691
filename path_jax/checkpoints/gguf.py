"""GGUF files of the llama architecture: configuration, tensors in float32, vocabulary.

Types F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0. Not supported: other architectures and types, scaled rotary
embeddings, files in several parts, writing.
"""

import contextlib
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

_ARCHITECTURE = "llama"
_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Key of a Hugging Face llama config.json -> metadata of the file.
_CONFIG = dict(
    num_hidden_layers="llama.block_count",
    hidden_size="llama.embedding_length",
    intermediate_size="llama.feed_forward_length",
    num_attention_heads="llama.attention.head_count",
    num_key_value_heads="llama.attention.head_count_kv",
    head_dim="llama.attention.key_length",
    rms_norm_eps="llama.attention.layer_norm_rms_epsilon",
    rope_theta="llama.rope.freq_base",
    eos_token_id="tokenizer.ggml.eos_token_id",
)
_VOCABULARY = dict(
    model="tokenizer.ggml.model",
    pre="tokenizer.ggml.pre",
    tokens="tokenizer.ggml.tokens",
    types="tokenizer.ggml.token_type",
    merges="tokenizer.ggml.merges",
    scores="tokenizer.ggml.scores",
    add_bos="tokenizer.ggml.add_bos_token",
    bos_id="tokenizer.ggml.bos_token_id",
    add_space_prefix="tokenizer.ggml.add_space_prefix",
)


class GgufFile(contextlib.AbstractContextManager):
    """An open GGUF file; its data stay on disk until they are read.

    Attributes:
      stored: {tensor name: (shape, None or the type if it cannot be read)}.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a GGUF file, truncated, or of another architecture.
    """

    def __init__(self, path: Path):
        import gguf

        self._path = path
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        _check_header(path)
        try:
            self._reader = gguf.GGUFReader(path)
        # The reader checks little, so what is left of damage surfaces as any of these.
        except (ValueError, IndexError, KeyError, ArithmeticError, TypeError) as error:
            raise ValueError(
                f"{path} is truncated or malformed ({type(error).__name__}: {str(error)[:200]})"
            ) from error
        architecture = self._get("general.architecture")
        if architecture != _ARCHITECTURE:
            raise ValueError(
                f"{path} holds the architecture {str(architecture)[:100]!r}; {_ARCHITECTURE!r} is supported"
            )
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.stored = {
            name: (
                tuple(int(n) for n in tensor.shape[::-1]),
                None if tensor.tensor_type.name in _TYPES else tensor.tensor_type.name,
            )
            for name, tensor in self._tensors.items()
        }

    def __exit__(self, *_) -> None:
        self._tensors, self._reader = {}, None  # closes the memory map

    def _get(self, key: str) -> Any:
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError, TypeError) as error:
            raise ValueError(f"{self._path}: {key} is malformed") from error

    def config(self) -> dict[str, Any]:
        """Returns the configuration under the keys of a Hugging Face llama config.json.

        Raises:
          ValueError: for a model that is not a plain llama.
        """
        if (scaling := self._get("llama.rope.scaling.type")) not in (None, "none"):
            raise ValueError(f"{self._path}: rotary embeddings scaled by {str(scaling)[:100]!r} are not supported")
        if (experts := self._get("llama.expert_count")) not in (None, 0):
            raise ValueError(f"{self._path}: a mixture of {experts} experts is not supported")
        raw = {key: value for key, name in _CONFIG.items() if (value := self._get(name)) is not None}
        if "token_embd.weight" not in self.stored:
            raise ValueError(f"{self._path} has no token_embd.weight")
        return raw | dict(
            model_type="llama",
            vocab_size=self.stored["token_embd.weight"][0][0],
            tie_word_embeddings="output.weight" not in self.stored,
        )

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, dequantised to float32."""
        import gguf

        tensor = self._tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.stored[name][0])

    def vocabulary(self) -> dict[str, Any] | None:
        """Returns the arguments of `path_jax.data.tokenizer.vocabulary_tokenizer`, or None if the file has none."""
        values = {key: self._get(name) for key, name in _VOCABULARY.items()}
        return None if values["tokens"] is None else values


# Bytes of a metadata value by its type: integers, floats and booleans. 8 is a string, 9 an array.
_VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


class _Cursor:
    """A position in a file's bytes that cannot leave them."""

    def __init__(self, data: mmap.mmap):
        self._data, self.position = data, 0

    def skip(self, size: int) -> int:
        """Moves on by `size` bytes and returns where it was.

        Raises:
          ValueError: if the file ends before.
        """
        start = self.position
        if size > len(self._data) - start:
            raise ValueError(f"{size} bytes at {start} are more than the file has")
        self.position = start + size
        return start

    def integers(self, layout: str) -> tuple[int, ...]:
        """Reads little-endian integers: I of 4 bytes, Q of 8."""
        return struct.unpack_from("<" + layout, self._data, self.skip(struct.calcsize("<" + layout)))

    def string(self) -> bytes:
        """Reads a string."""
        (size,) = self.integers("Q")
        start = self.skip(size)
        return self._data[start : start + size]


def _check_header(path: Path) -> None:
    """Walks metadata and tensor list, since the gguf package follows any length that a file states, even 2^60.

    Raises:
      ValueError: if a length, an offset or a number of dimensions does not fit the file, or a name is there twice.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file ({size} bytes)")
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _walk(_Cursor(data), size)
        except ValueError as error:
            raise ValueError(f"{path} is truncated or malformed: {error}") from None


def _walk(cursor: _Cursor, size: int) -> None:
    cursor.skip(4)
    version, num_tensors, num_values = cursor.integers("IQQ")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not 2 or 3")
    names: set[bytes] = set()

    def new_name() -> None:
        name = cursor.string()
        if name in names:
            raise ValueError(f"the name {name[:100]!r} appears twice")
        names.add(name)

    for _ in range(num_values):
        new_name()
        (kind,) = cursor.integers("I")
        count = 1
        if kind == _ARRAY:
            kind, count = cursor.integers("IQ")
        if kind == _STRING:
            for _ in range(count):
                cursor.string()
        elif kind in _VALUE_SIZES:
            cursor.skip(count * _VALUE_SIZES[kind])
        else:
            raise ValueError(f"metadata of type {kind}")
    names.clear()
    for _ in range(num_tensors):
        new_name()
        (num_dimensions,) = cursor.integers("I")
        if not 1 <= num_dimensions <= 4:
            raise ValueError(f"a tensor of {num_dimensions} dimensions")
        shape = cursor.integers("Q" * num_dimensions)
        _, offset = cursor.integers("IQ")
        if math.prod(shape) > 8 * size or offset > size:  # no type takes less than a bit per number
            raise ValueError(f"a tensor of shape {shape} at {offset}")
