"""From a data configuration to a resumable, sharded iterator of batches.

In-memory sources give the same global batches for every process count. TFDS sources are
packed as a stream, so there each process packs its own share of the records and a saved
position belongs to one process count. Workers are threads; no process pool is offered.

A synthetic task has no text: its examples are made as they are needed and never repeat.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from path_jax.data import text
from path_jax.data.batch import Batch
from path_jax.data.packing import PackedRows, first_fit_rows
from path_jax.data.task_stream import TaskStream, make_task
from path_jax.data.text import Corpus, Document, LazyDocuments
from path_jax.data.tokenizer import ByteTokenizer

_SOURCES = ("stdlib", "files", "tokens", "tfds", "task")
_PACKINGS = ("concat", "first_fit")
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
_NUM_TASK_BATCHES = 2**40  # more than anyone trains on
# Rows that a stream fills at once: more wastes less padding but costs memory.
_NUM_STREAM_ROWS = 16


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text is and how it becomes batches.

    Attributes:
      source: `stdlib` (this Python's standard library), `files` (bytes of a file or
        directory), `tokens` (`.npy` ids), `tfds` (a prepared array_record dataset) or
        `task` (a synthetic task).
      path: The file or directory; empty for `stdlib` and `task`.
      sequence_length: T, at least 1.
      batch_size: Rows of a global batch, over all processes.
      packing: `concat` fills every row; `first_fit` keeps documents whole and pads.
      heldout_fraction: Share held out for evaluation, in (0, 1): of the tokens, or of the
        records for `tfds`.
      seed: Chooses the held-out side and the shuffles, in [0, 2**32).
      tfds_split: Split of a TFDS dataset.
      text_key: Text feature of a TFDS dataset.
      bos_id: The id that opens a document; 256 unless `source` is `tokens`.
      vocab_size: Number of ids; 257 unless `source` is `tokens`. A task has its own.
      task: A name in `path_jax.data.TASKS`; task_options: its settings but the length,
        which is `sequence_length`.
    """

    source: str = "stdlib"
    path: str = ""
    sequence_length: int = 256
    batch_size: int = 8
    packing: str = "concat"
    heldout_fraction: float = 0.05
    seed: int = 0
    tfds_split: str = "train"
    text_key: str = "text"
    bos_id: int = 256
    vocab_size: int = 257
    task: str = ""
    task_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Raises ValueError for the first field that cannot work."""
        if self.source not in _SOURCES:
            raise ValueError(f"data.source is {self.source!r}; choose one of {_SOURCES}")
        if self.packing not in _PACKINGS:
            raise ValueError(f"data.packing is {self.packing!r}; choose one of {_PACKINGS}")
        if bool(self.path) == (self.source in ("stdlib", "task")):
            fix = "leave it empty or set data.source" if self.path else "set data.path"
            raise ValueError(f"data.path is {self.path!r} with source {self.source!r}; {fix}")
        for name in ("sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"data.heldout_fraction is {self.heldout_fraction}; it must be inside (0, 1)")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data.seed is {self.seed}; it must be in [0, 2**32)")
        if not 0 <= self.bos_id < self.vocab_size:
            raise ValueError(f"data.bos_id is {self.bos_id}; it must be in [0, data.vocab_size={self.vocab_size})")
        if (self.source == "task") != bool(self.task) or (self.task_options and not self.task):
            raise ValueError(
                f"data.task is {self.task!r} with data.task_options {dict(self.task_options)} and source "
                f"{self.source!r}; a task and its options go with source 'task'"
            )
        if self.task:
            make_task(self.task, self.sequence_length, self.task_options)
            return
        byte_ids = (ByteTokenizer().bos_id, ByteTokenizer().vocab_size)
        if self.source != "tokens" and (self.bos_id, self.vocab_size) != byte_ids:
            raise ValueError(
                f"data.bos_id and data.vocab_size are {(self.bos_id, self.vocab_size)}; source "
                f"{self.source!r} reads bytes, which need {byte_ids}"
            )


def make_corpus(config: DataConfig) -> Corpus:
    """Reads the configured source and splits it into train and held-out documents.

    Args:
      config: The data configuration.

    Returns:
      The corpus. For `tfds` both sides are lazy, in an order shuffled by the seed.

    Raises:
      FileNotFoundError: The path does not exist.
      ValueError: The source is empty or malformed, or has ids outside the vocabulary.
    """
    if config.source == "task":
        task = make_task(config.task, config.sequence_length, config.task_options)
        return Corpus(TaskStream(task, config.seed), TaskStream(task, config.seed, is_heldout=True), task.vocab_size)
    if config.source == "tfds":
        records = text.tfds_documents(config.path, config.tfds_split, config.text_key)
        if len(records) < 2:
            raise ValueError(f"{config.path} has {len(records)} records; two sides need at least 2")
        order = grain.MapDataset.range(len(records)).seed(config.seed).shuffle()
        num_heldout = round(config.heldout_fraction * len(records))
        num_heldout = min(max(num_heldout, 1), len(records) - 1)
        train = LazyDocuments(len(records) - num_heldout, lambda index: records[order[num_heldout + index]])
        heldout = LazyDocuments(num_heldout, lambda index: records[order[index]])
        return Corpus(train, heldout, config.vocab_size)
    if config.source == "stdlib":
        documents = text.standard_library_documents()
    elif config.source == "files":
        documents = text.file_documents(config.path)
    else:
        documents = text.token_file_documents(config.path, config.bos_id)
        largest = max(int(document.tokens.max()) for document in documents)
        if largest >= config.vocab_size:
            raise ValueError(
                f"{config.path} has id {largest}, outside data.vocab_size={config.vocab_size}; raise data.vocab_size"
            )
    train, heldout = text.split_documents(documents, config.heldout_fraction, config.seed, bos_id=config.bos_id)
    return Corpus(train, heldout, config.vocab_size)


def make_iterator(
    config: DataConfig,
    documents: Sequence[Document] | TaskStream,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Returns an endless iterator of this process's part of each batch.

    Every epoch visits every row once in a new order; a task has no epochs. Process p holds
    rows [p b, (p + 1) b) of each global batch, with b = batch_size / process_count.

    Args:
      config: The data configuration.
      documents: One side of the corpus of `make_corpus(config)`.
      process_index: p, in [0, process_count).
      process_count: Number of processes that share a global batch.

    Returns:
      An iterator of `Batch` of NumPy arrays [b, T], with `get_state` and `set_state`.

    Raises:
      ValueError: The batch does not divide over the processes, or there is too little text.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}; it must be in [0, {process_count})")
    if config.batch_size % process_count:
        raise ValueError(
            f"data.batch_size={config.batch_size} does not divide over {process_count} processes; "
            f"use a multiple of {process_count}"
        )
    local_size = config.batch_size // process_count
    shard = slice(process_index, None, process_count)
    if config.source == "task":
        numbers = np.arange(process_index * local_size, (process_index + 1) * local_size)
        batches = grain.MapDataset.range(_NUM_TASK_BATCHES).map(
            lambda i: documents.batch(config.batch_size * i + numbers)
        )
        return iter(batches.to_iter_dataset(_READ_OPTIONS))
    if config.source == "tfds":
        records = grain.MapDataset.source(documents).seed(config.seed).shuffle().repeat()
        rows = _packed_stream(records[shard].to_iter_dataset(_READ_OPTIONS), config)
        return iter(rows.batch(local_size, drop_remainder=True).map(_as_batch))
    make_rows = PackedRows if config.packing == "concat" else first_fit_rows
    rows = grain.MapDataset.source(make_rows(documents, config.sequence_length))
    # Batches of the local size are cut before sharding: number n * process_count + p is
    # part p of global batch n. Dropping the remainder of the endless repeat keeps its
    # length an exact integer; rounding up overflows for one row per process.
    batches = rows.seed(config.seed).shuffle().repeat().batch(local_size, drop_remainder=True)
    return iter(batches[shard].map(_as_batch).to_iter_dataset(_READ_OPTIONS))


@dataclasses.dataclass(frozen=True)
class _PredictionPieces(grain.experimental.FlatMapTransform):
    """Cuts a document into input/target pieces of at most `size` predictions."""

    size: int | None
    max_fan_out: int = 2**31

    def flat_map(self, element: Document) -> list[dict[str, np.ndarray]]:
        # Pairing before packing keeps the target of the last input of a piece; a document
        # without a prediction gives no piece.
        inputs, targets = element.tokens[:-1], element.tokens[1:]
        size = self.size or max(len(inputs), 1)
        return [
            {"tokens": inputs[start : start + size], "targets": targets[start : start + size]}
            for start in range(0, len(inputs), size)
        ]


def _packed_stream(records: grain.IterDataset, config: DataConfig) -> grain.IterDataset:
    """Packs documents of unknown length into rows as they arrive."""
    lengths = {"tokens": config.sequence_length, "targets": config.sequence_length}
    if config.packing == "concat":
        pieces = grain.experimental.FlatMapIterDataset(records, _PredictionPieces(None))
        return grain.experimental.ConcatThenSplitIterDataset(pieces, length_struct=lengths)
    pieces = grain.experimental.FlatMapIterDataset(records, _PredictionPieces(config.sequence_length))
    return grain.experimental.FirstFitPackIterDataset(
        pieces, length_struct=lengths, num_packing_bins=_NUM_STREAM_ROWS, seed=config.seed
    )


def _as_batch(row: dict[str, np.ndarray]) -> Batch:
    """Names the fields; a stream holds predictions only, so all but its padding counts."""
    if "weights" in row:
        return Batch(**row)
    segment_ids = row["tokens_segment_ids"]
    return Batch(
        tokens=row["tokens"],
        targets=row["targets"],
        weights=(segment_ids > 0).astype(np.float32),
        segment_ids=segment_ids.astype(np.int32, copy=False),
        positions=row["tokens_positions"].astype(np.int32, copy=False),
    )
