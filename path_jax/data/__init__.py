"""Text corpora as packed batches: read, split, pack, shuffle, shard, resume."""

from path_jax.data.batch import Batch
from path_jax.data.loader import DataConfig, make_corpus, make_iterator
from path_jax.data.packing import PackedRows, first_fit_rows
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

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "Document",
    "LearnedTokenizer",
    "PackedRows",
    "file_documents",
    "first_fit_rows",
    "load_tokenizer",
    "make_corpus",
    "make_iterator",
    "opened_bytes",
    "split_documents",
    "standard_library_documents",
    "tfds_documents",
    "token_file_documents",
    "vocabulary_tokenizer",
]
