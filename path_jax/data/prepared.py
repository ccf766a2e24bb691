"""Prepared tokens, read from anywhere in their stream; `prepared_format.py` says how they are stored."""

import functools
import operator
import os
import pathlib
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int32

from path_jax.data.packing import Row, check_size, checked_index, concat_row, num_concat_rows
from path_jax.data.prepared_format import read_manifest, shard_path, token_dtype
from path_jax.data.text import Document

_READER_OPTIONS = "readahead_buffer_size:0"  # reads are random, and reading ahead takes threads
_MAX_OPEN_SHARDS = 64
_CACHED_RECORDS = 64  # so that one document after the other decodes a record once


class PreparedTokens:
    """The stream of a prepared directory.

    Attributes:
      manifest: What it holds.
      num_tokens: Length of the stream.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Reads the manifest; shards are opened when they are needed.

        Raises:
          FileNotFoundError, ValueError: See `read_manifest`.
        """
        self._directory = pathlib.Path(directory)
        self.manifest = read_manifest(directory)
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.manifest.shards)])
        self._first_documents = np.cumsum([0, *(shard.documents for shard in self.manifest.shards)])
        self.num_tokens = int(self._starts[-1])
        self._reader = functools.lru_cache(_MAX_OPEN_SHARDS)(self._opened)
        self._record = functools.lru_cache(_CACHED_RECORDS)(self._decoded)
        self._openers = functools.lru_cache(2)(self._found_openers)

    def read(self, start: int, stop: int) -> Int32[np.ndarray, "n"]:
        """Returns the stream's tokens [start, stop).

        Raises:
          OSError, ValueError: A shard is missing or damaged; names it.
        """
        size, parts = self.manifest.record_tokens, [np.zeros(0, np.int32)]
        number = self._shard_at(start)
        while start < stop:
            place, end = start - int(self._starts[number]), min(stop, int(self._starts[number + 1]))
            while start < end:
                record, offset = divmod(place, size)
                piece = self._record(number, record)[offset : offset + end - start]
                parts.append(piece)
                start, place = start + len(piece), place + len(piece)
            number += 1
        return np.concatenate(parts, dtype=np.int32)

    def documents_until(self, place: int) -> int:
        """Number of documents that begin in [0, place]."""
        number = self._shard_at(place)
        return int(self._first_documents[number] + np.searchsorted(self._openers(number), place, side="right"))

    def document_start(self, number: int) -> int:
        """Where a document begins; the length of the stream for the number of documents."""
        if number == self._first_documents[-1]:
            return self.num_tokens
        shard = int(np.searchsorted(self._first_documents, number, side="right")) - 1
        return int(self._openers(shard)[number - self._first_documents[shard]])

    def split(self, heldout_fraction: float) -> tuple["PreparedRange", "PreparedRange"]:
        """Cuts the stream in two: what comes first to learn from, the end for evaluation.

        The cut is at the border of documents next to the fraction. It is inside a document only where that border
        would change the held-out share by more than half. It depends on nothing else, so every run on these data holds
        out the same text; the order of the sources decides which.

        Raises:
          ValueError: There are fewer than 2 tokens.
        """
        if self.num_tokens < 2:
            raise ValueError(f"{self._directory} has {self.num_tokens} tokens; two sides need at least 2")
        goal = min(max(round((1 - heldout_fraction) * self.num_tokens), 1), self.num_tokens - 1)
        number = self.documents_until(goal)
        borders = [self.document_start(n) for n in (number - 1, number) if n > 0]
        near = [x for x in borders if 0 < x < self.num_tokens and 2 * abs(x - goal) <= self.num_tokens - goal]
        cut = min(near, key=lambda x: abs(x - goal), default=goal)
        return PreparedRange(self, 0, cut), PreparedRange(self, cut, self.num_tokens)

    def _shard_at(self, place: int) -> int:
        """The shard that holds a place of the stream."""
        return int(np.searchsorted(self._starts[1:-1], place, side="right"))

    def _found_openers(self, number: int) -> np.ndarray:
        """Where the documents of a shard begin in the stream; int64 [documents]."""
        shard, start = self.manifest.shards[number], int(self._starts[number])
        found = [np.zeros(0, np.int64)]
        for record in range(-(-shard.tokens // self.manifest.record_tokens)):
            # Not by the cached records, which those of the whole shard would drive out.
            is_opener = self._decoded(number, record) == self.manifest.bos_id
            found.append(np.flatnonzero(is_opener) + start + record * self.manifest.record_tokens)
        openers = np.concatenate(found)
        if len(openers) != shard.documents:
            raise self._damaged(number, f"has {len(openers)} documents, not {shard.documents}")
        return openers

    def _decoded(self, number: int, record: int) -> np.ndarray:
        reader, shard = self._reader(number), self.manifest.shards[number]
        dtype, size = token_dtype(self.manifest.vocab_size), self.manifest.record_tokens
        try:
            data = reader.read([record])[0]
        except (RuntimeError, IndexError) as error:
            raise self._damaged(number, f"cannot be read: {' '.join(str(error).split())[:120]}") from error
        if len(data) != dtype.itemsize * min(size, shard.tokens - record * size):
            raise self._damaged(number, f"has {len(data)} bytes in record {record}")
        tokens = np.frombuffer(data, dtype)
        if int(tokens.max()) >= self.manifest.vocab_size:
            raise self._damaged(number, f"has id {tokens.max()} with {self.manifest.vocab_size} ids")
        return tokens

    def _opened(self, number: int) -> ArrayRecordReader:
        shard = self.manifest.shards[number]
        path = shard_path(self._directory, shard)
        try:
            reader = ArrayRecordReader(str(path), _READER_OPTIONS)
            num_records = reader.num_records()  # 0 for a file that was cut off
        except (RuntimeError, ValueError) as error:
            raise self._damaged(number, f"cannot be read: {' '.join(str(error).split())[:120]}") from error
        expected = -(-shard.tokens // self.manifest.record_tokens)
        if num_records != expected:
            raise self._damaged(number, f"has {num_records} of {expected} records")
        return reader

    def _damaged(self, number: int, reason: str) -> ValueError:
        path = self._directory / self.manifest.shards[number].name
        return ValueError(f"{path} {reason}; run: python -m path_jax.data verify {self._directory}")


class PreparedRange(Sequence[Document]):
    """Documents in the stream's [start, stop), read when they are indexed. One that is cut there counts as one.

    Attributes:
      stream: The whole stream; start, stop: the range.
    """

    def __init__(self, stream: PreparedTokens, start: int, stop: int):
        self.stream, self.start, self.stop = stream, start, stop

    @functools.cached_property
    def _first(self) -> int:
        """Number of documents that begin at `start` or before."""
        return self.stream.documents_until(self.start)

    @functools.cached_property
    def _length(self) -> int:
        return 1 + self.stream.documents_until(self.stop - 1) - self._first

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> Document:
        """A document, named by its number in the stream."""
        number = self._first - 1 + checked_index(index, len(self))
        start = max(self.start, self.stream.document_start(number))
        stop = min(self.stop, self.stream.document_start(number + 1))
        return Document(f"document {number}", self.stream.read(start, stop))


class PreparedRows:
    """Rows of the concat packing: what `PackedRows` makes of the same documents, read from the stream."""

    def __init__(self, tokens: PreparedRange, sequence_length: int):
        """Reads nothing yet.

        Raises:
          ValueError: T < 1, or fewer than T + 1 tokens.
        """
        check_size(tokens.stop - tokens.start, sequence_length)
        self._tokens, self.sequence_length = tokens, sequence_length
        self._num_rows = num_concat_rows(tokens.stop - tokens.start, sequence_length)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: SupportsIndex) -> Row:
        """Returns row `index` in [0, len): the fields of `Batch`, each [T]."""
        side = self._tokens
        start = side.start + checked_index(operator.index(index), self._num_rows) * self.sequence_length
        tokens = side.stream.read(start, min(start + self.sequence_length + 1, side.stop))
        openers = np.flatnonzero(tokens[1:] == side.stream.manifest.bos_id) + 1
        return concat_row(np.split(tokens, openers), self.sequence_length)
