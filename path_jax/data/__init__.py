"""Text and sequences as packed batches: read, split, pack, mix, shard, resume. Synthetic tasks with exact answers."""

from path_jax.data.batch import Batch
from path_jax.data.config import DataConfig
from path_jax.data.examples import Examples, Task, as_text
from path_jax.data.fasta import ALPHABETS, Alphabet, fasta_documents
from path_jax.data.loader import make_corpus, make_iterator
from path_jax.data.mixture import Mixture
from path_jax.data.packing import PackedRows, first_fit_rows
from path_jax.data.prepared import PreparedRange, PreparedRows, PreparedTokens
from path_jax.data.task_stream import TASKS, TaskStream, as_batch, make_task
from path_jax.data.text import (
    Corpus,
    Document,
    file_documents,
    opened_bytes,
    split_documents,
    standard_library_documents,
    tfds_documents,
    token_file_documents,
)
from path_jax.data.tokenizer import ByteTokenizer, LearnedTokenizer, load_tokenizer, vocabulary_tokenizer
from path_jax.data.vocabulary import documents_at, encoding_of

__all__ = [
    "ALPHABETS",
    "Alphabet",
    "TASKS",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "Document",
    "Examples",
    "LearnedTokenizer",
    "Mixture",
    "PackedRows",
    "PreparedRange",
    "PreparedRows",
    "PreparedTokens",
    "Task",
    "TaskStream",
    "as_batch",
    "as_text",
    "documents_at",
    "encoding_of",
    "fasta_documents",
    "file_documents",
    "first_fit_rows",
    "load_tokenizer",
    "make_corpus",
    "make_iterator",
    "make_task",
    "opened_bytes",
    "split_documents",
    "standard_library_documents",
    "tfds_documents",
    "token_file_documents",
    "vocabulary_tokenizer",
]
