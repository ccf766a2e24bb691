"""GGUF files of the llama architecture: configuration, tensors in float32, vocabulary.

Types F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0. Not supported: other architectures and types, scaled rotary
embeddings, files in several parts, writing.
"""

import contextlib
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
)
_VOCABULARY = dict(
    model="tokenizer.ggml.model",
    pre="tokenizer.ggml.pre",
    tokens="tokenizer.ggml.tokens",
    types="tokenizer.ggml.token_type",
    merges="tokenizer.ggml.merges",
    add_bos="tokenizer.ggml.add_bos_token",
    bos_id="tokenizer.ggml.bos_token_id",
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
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file")
        try:
            self._reader = gguf.GGUFReader(path)
        # The reader indexes a memory map without checks, so damage surfaces as any of these.
        except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
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
