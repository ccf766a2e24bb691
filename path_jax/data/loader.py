"""From a data configuration to a resumable, sharded iterator of batches.

In-memory and prepared sources, and mixtures of them, give the same global batches for every
process count. TFDS sources are packed as a stream, so there each process packs its own share
of the records and a saved position belongs to one process count. Workers are threads; no
process pool is offered.

A synthetic task has no text: its examples are made as they are needed and never repeat.
"""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

from path_jax.data import text
from path_jax.data.batch import Batch
from path_jax.data.config import DataConfig
from path_jax.data.fasta import ALPHABETS, fasta_documents
from path_jax.data.mixture import MixedRows, Mixture
from path_jax.data.packing import PackedRows, Row, first_fit_rows
from path_jax.data.prepared import PreparedRange, PreparedRows, PreparedTokens
from path_jax.data.task_stream import TaskStream, make_task
from path_jax.data.text import Corpus, Document, LazyDocuments

_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
_NUM_TASK_BATCHES = 2**40  # more than anyone trains on
# Rows that a stream fills at once: more wastes less padding but costs memory.
_NUM_STREAM_ROWS = 16


def make_corpus(config: DataConfig) -> Corpus:
    """Reads the configured source and splits it into train and held-out documents.

    Args:
      config: The data configuration.

    Returns:
      The corpus. For `tfds` both sides are lazy, in an order shuffled by the seed; for
      `prepared` they are ranges of one stream.

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
    if config.source == "mixture":
        return _mixture(config)
    if config.source == "prepared":
        stream = PreparedTokens(config.path)
        return Corpus(*stream.split(config.heldout_fraction), stream.manifest.vocab_size)
    bos_id, vocab_size = config.bos_id, config.vocab_size
    if config.source == "fasta":
        alphabet = ALPHABETS[config.alphabet]
        bos_id, vocab_size = alphabet.bos_id, alphabet.vocab_size
        documents = fasta_documents(config.path, alphabet)
    elif config.source == "stdlib":
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
    train, heldout = text.split_documents(documents, config.heldout_fraction, config.seed, bos_id=bos_id)
    return Corpus(train, heldout, vocab_size)


def _mixture(config: DataConfig) -> Corpus:
    """The parts' sides, which must have one vocabulary."""
    configs = config.part_configs()
    corpora = {name: make_corpus(part) for name, part in configs.items()}
    found, tokenizers = {}, set()
    for name, part in configs.items():
        manifest = corpora[name].train.stream.manifest if part.source == "prepared" else None
        tokenizers |= {tuple(manifest.tokenizer.items())} if manifest else set()
        bos_id = ALPHABETS[part.alphabet].bos_id if part.source == "fasta" else part.bos_id
        found[name] = (corpora[name].vocab_size, manifest.bos_id if manifest else bos_id)
    if len(set(found.values())) > 1 or len(tokenizers) > 1:
        described = ", ".join(f"{name} {size} ids opened by {bos_id}" for name, (size, bos_id) in found.items())
        raise ValueError(f"the parts of a mixture need one vocabulary, and these have others: {described}")
    weights = config.part_weights()
    train = Mixture({name: corpus.train for name, corpus in corpora.items()}, weights)
    heldout = Mixture({name: corpus.heldout for name, corpus in corpora.items()}, weights).in_proportion()
    return Corpus(train, heldout, next(iter(corpora.values())).vocab_size)


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
    if isinstance(documents, Mixture):
        rows = [_rows(config, part) for part in documents.parts.values()]
        rows = grain.MapDataset.source(MixedRows(rows, documents.weights, config.seed))
    else:
        rows = grain.MapDataset.source(_rows(config, documents)).seed(config.seed).shuffle().repeat()
    # Batches of the local size are cut before sharding: number n * process_count + p is
    # part p of global batch n. Dropping the remainder of the endless repeat keeps its
    # length an exact integer; rounding up overflows for one row per process.
    batches = rows.batch(local_size, drop_remainder=True)
    return iter(batches[shard].map(_as_batch).to_iter_dataset(_READ_OPTIONS))


def _rows(config: DataConfig, documents: Sequence[Document]) -> Sequence[Row]:
    """One side of a corpus, packed."""
    if isinstance(documents, PreparedRange):
        return PreparedRows(documents, config.sequence_length)
    make_rows = PackedRows if config.packing == "concat" else first_fit_rows
    return make_rows(documents, config.sequence_length)


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
