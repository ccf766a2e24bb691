"""Bytes as tokens.

The vocabulary is fixed: ids 0..255 are bytes and 256 opens a document. Learned
vocabularies are not handled here; tokenize with any tool and read the ids from `.npy`
files instead.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int32


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Maps text to its UTF-8 bytes and back.

    Because one token is one byte, the loss in nats divided by ln 2 is bits per byte.

    Attributes:
      vocab_size: 256 bytes and the document opener.
      bos_id: The id that opens every document; never produced by `encode`.
    """

    vocab_size: int = dataclasses.field(default=257, init=False)
    bos_id: int = dataclasses.field(default=256, init=False)

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "n"]:
        """Returns the bytes of `text` (UTF-8 for a string), without `bos_id`.

        Args:
          text: A string, or bytes that need not be valid UTF-8.

        Returns:
          Ids in [0, 256), int32 [n].
        """
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Any) -> str:
        """Returns the text of `ids`, dropping every id that is not a byte.

        Args:
          ids: Integer array or sequence [n]. A model may emit any id, so ids outside
            [0, 256) are skipped.

        Returns:
          The text. Byte runs that are not UTF-8 become U+FFFD.
        """
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        is_byte = (array >= 0) & (array < 256)
        return array[is_byte].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
