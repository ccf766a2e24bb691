"""Files to prepare: which there are, where their documents can be cut apart, and the tokens of a part.

A text file is one document. A line of a JSONL file is one, under a key that is chosen; a record of a FASTA file is one.
The last two may be compressed (`.gz`); such a file is read by one process, others in several parts.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from path_jax.data.fasta import ALPHABETS, SUFFIXES, Alphabet, is_fasta, lines_before, read_fasta, stored_lines
from path_jax.data.text import standard_library_files, visible_files
from path_jax.data.tokenizer import ByteTokenizer, LearnedTokenizer, load_tokenizer

KINDS = ("text", "jsonl", "fasta")
_CHUNK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file as it was when its preparation began.

    Attributes:
      path: Absolute; kind: one of `KINDS`; size: bytes; modified: time of the last change, in nanoseconds.
    """

    path: str
    kind: str
    size: int
    modified: int

    @property
    def is_compressed(self) -> bool:
        """Whether it can be read from its beginning only."""
        return self.kind != "text" and self.path.lower().endswith(".gz")


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes [begin, end) of a file, which hold whole documents."""

    file: SourceFile
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a document becomes tokens: `bos_id`, then what the tokenizer makes of it.

    Attributes:
      kind: `bytes`, a name of `ALPHABETS` or `learned`.
      tokenizer: Of that kind.
      bos_id: Opens a document.
      vocab_size: Every id is below it.
      text_key: Of JSONL files.
    """

    kind: str
    tokenizer: ByteTokenizer | Alphabet | LearnedTokenizer
    bos_id: int
    vocab_size: int
    text_key: str = "text"

    def opened(self, text: str | bytes) -> np.ndarray:
        """Tokens of a document. A vocabulary that opens texts with the same token by itself does so once."""
        ids = self.tokenizer.encode(text)
        if len(ids) and ids[0] == self.bos_id:
            return ids
        return np.concatenate([np.array([self.bos_id], np.int32), ids])


def stored_tokenizer(directory: str | os.PathLike[str], kind: str) -> ByteTokenizer | Alphabet | LearnedTokenizer:
    """The tokenizer of a prepared directory.

    Raises:
      ValueError: The kind is unknown, or the directory has no learned vocabulary.
      ImportError: The package tokenizers is not installed.
    """
    if kind != "learned":
        if kind not in ("bytes", *ALPHABETS):
            raise ValueError(f"{directory} has a tokenizer of the unknown kind {kind[:100]!r}")
        return ALPHABETS.get(kind, ByteTokenizer())
    if (tokenizer := load_tokenizer(directory)) is None:
        raise ValueError(f"{directory} has no tokenizer.json")
    return tokenizer


def list_files(sources: Sequence[str], kind: str | None) -> list[SourceFile]:
    """Returns the files of all sources, in the order of the sources and then of names.

    Args:
      sources: Files, directories, or `stdlib` for this Python's standard library.
      kind: Of every file; by default as their suffixes say, and text for other suffixes.

    Raises:
      FileNotFoundError: A source does not exist.
      ValueError: A source has no visible non-empty file, or a link leads out of it.
    """
    files = []
    for source in sources:
        found = standard_library_files() if source == "stdlib" else visible_files(pathlib.Path(source))
        if not found:
            raise ValueError(f"{source} holds no visible non-empty file; give a path with text")
        for _, path in found:
            status = path.stat()
            files.append(SourceFile(os.path.abspath(path), kind or _kind(path), status.st_size, status.st_mtime_ns))
    return files


def _kind(path: pathlib.Path) -> str:
    name = path.name.lower()
    return "jsonl" if name.endswith((".jsonl", ".jsonl.gz")) else "fasta" if is_fasta(path) else "text"


def check_kinds(files: Sequence[SourceFile], encoding: Encoding) -> None:
    """Raises ValueError where an alphabet is to read text, or another vocabulary FASTA."""
    for file in files:
        if (file.kind == "fasta") != (encoding.kind in ALPHABETS):
            raise ValueError(
                f"{file.path} is {file.kind} and the tokenizer {encoding.kind}; FASTA files ({', '.join(SUFFIXES)}) "
                f"take --tokenizer={' or '.join(ALPHABETS)}, and others do not"
            )


def cut_parts(file: SourceFile, max_bytes: int) -> Iterator[Part]:
    """Yields a file in parts of about `max_bytes`, each whole documents; a text or a compressed file is one part."""
    if file.kind == "text" or file.is_compressed or file.size <= max_bytes:
        yield Part(file, 0, file.size)
        return
    begin = 0
    while begin < file.size:
        end = _next_document(file, begin + max_bytes) if begin + max_bytes < file.size else file.size
        yield Part(file, begin, end)
        begin = end


def _next_document(file: SourceFile, place: int) -> int:
    """Where the first document at or after a place begins, or the end of the file."""
    opener = b"\n>" if file.kind == "fasta" else b"\n"
    with open(file.path, "rb") as opened:
        opened.seek(place - 1)
        position, tail = place - 1, b""
        while data := opened.read(_CHUNK_BYTES):
            found = (tail + data).find(opener)
            if found >= 0:
                return position - len(tail) + found + 1
            position, tail = position + len(data), data[-1:]
    return file.size


def part_tokens(part: Part, encoding: Encoding) -> Iterator[np.ndarray]:
    """Yields the tokens of a part's documents in pieces; a document's first piece begins with its opener.

    Bytes and FASTA are read in pieces of at most 1 MiB; a text is read as a whole for a learned vocabulary.

    Raises:
      OSError: The file cannot be read.
      ValueError: It is malformed, or has changed since it was listed.
    """
    file, status = part.file, os.stat(part.file.path)
    if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
        raise ValueError(f"{file.path} has changed since its preparation began; prepare into a new --output")
    if file.kind == "text" and encoding.kind == "bytes":
        yield np.array([encoding.bos_id])
        with open(file.path, "rb") as opened:
            yield from map(encoding.tokenizer.encode, iter(functools.partial(opened.read, _CHUNK_BYTES), b""))
    elif file.kind == "text":
        yield encoding.opened(pathlib.Path(file.path).read_bytes())
    elif file.kind == "fasta":
        end = None if file.is_compressed else part.end
        yield from (ids for _, ids in read_fasta(file.path, encoding.tokenizer, part.begin, end))
    else:
        yield from _jsonl_tokens(part, encoding)


def _jsonl_tokens(part: Part, encoding: Encoding) -> Iterator[np.ndarray]:
    """Documents of lines {"text": ...}; lines without text are left out."""
    path, key = part.file.path, encoding.text_key
    end = None if part.file.is_compressed else part.end
    for number, line in enumerate(stored_lines(path, part.begin, end), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[key]
            if not isinstance(text, str):
                raise TypeError(f"{key!r} is {type(text).__name__}, not a string")
            if text:
                yield encoding.opened(text)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            reason = f"there is no {key!r}; set --text-key" if isinstance(error, LookupError) else str(error)[:200]
            raise ValueError(f"{path}, line {lines_before(path, part.begin) + number}: {reason}") from error
