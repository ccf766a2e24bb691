"""What the ids of a run's data mean, and other text in the same ids."""

import os
from collections.abc import Sequence

from path_jax.data.config import DataConfig
from path_jax.data.fasta import ALPHABETS, Alphabet, fasta_documents
from path_jax.data.prepared_format import read_manifest
from path_jax.data.source_files import Encoding, stored_tokenizer
from path_jax.data.text import Document, file_documents, token_file_documents
from path_jax.data.tokenizer import ByteTokenizer


def encoding_of(config: DataConfig) -> Encoding | None:
    """How text becomes the ids of these data; None for a task, token files, or a prepared directory that is gone,
    or has a learned vocabulary where the package tokenizers is missing: training goes without.

    That of a mixture is the one of its first part that has one.
    """
    if config.source == "mixture":
        return next(filter(None, map(encoding_of, config.part_configs().values())), None)
    if config.source in ("task", "tokens"):
        return None
    if config.source == "prepared":
        try:
            manifest = read_manifest(config.path)
            kind = manifest.tokenizer["kind"]
            return Encoding(kind, stored_tokenizer(config.path, kind), manifest.bos_id, manifest.vocab_size)
        except (OSError, ValueError, ImportError):
            return None
    if config.source == "fasta":
        alphabet = ALPHABETS[config.alphabet]
        return Encoding(alphabet.name, alphabet, alphabet.bos_id, alphabet.vocab_size)
    return Encoding("bytes", ByteTokenizer(), config.bos_id, config.vocab_size)


def documents_at(config: DataConfig, path: str | os.PathLike[str]) -> Sequence[Document]:
    """Returns the documents of another file or directory, in the ids of these data.

    Args:
      config: Of the data; with `tokens` the path has token files too, with `fasta` FASTA files, else it has text.
      path: The file or directory.

    Raises:
      OSError: The path cannot be read.
      ValueError: It holds nothing or is malformed, or nothing says what the ids are.
    """
    if config.source == "tokens":
        return token_file_documents(path, config.bos_id)
    if (encoding := encoding_of(config)) is None:
        raise ValueError(f"nothing says how text becomes the ids of data.source={config.source!r} {config.path}")
    if isinstance(encoding.tokenizer, Alphabet):
        return fasta_documents(path, encoding.tokenizer)
    return file_documents(path, encoding.opened)
