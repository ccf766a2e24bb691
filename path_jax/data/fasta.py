"""Sequences in FASTA files: alphabets of nucleotides and amino acids, one token per letter.

A record is a line `>name description` and the lines of its sequence; lower case, which marks repeats, is read as upper
case, and lines that begin with `;` are comments. Files that end in `.gz` are decompressed as they are read. A record is
read in pieces, so that a chromosome on one line needs no more memory than a short one. Alignments (gaps), qualities
(FASTQ) and annotations are not read.
"""

import dataclasses
import gzip
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Int32

from path_jax.data.text import Document, visible_files

SUFFIXES = (".fa", ".fasta", ".fna", ".faa")
_CHUNK_BYTES = 2**20
_INVALID = 255


@dataclasses.dataclass(frozen=True)
class Alphabet:
    """Letters as ids 0, 1, ..., then the id that opens a sequence.

    Attributes:
      name: `dna` or `protein`.
      letters: In the order of their ids.
      synonyms: Pairs of a letter and the one that it is read as.
    """

    name: str
    letters: str
    synonyms: tuple[tuple[str, str], ...] = ()

    @property
    def bos_id(self) -> int:
        """The id that opens every sequence; never produced by `encode`."""
        return len(self.letters)

    @property
    def vocab_size(self) -> int:
        """The letters and the opener."""
        return len(self.letters) + 1

    @property
    def table(self) -> np.ndarray:
        """The id of every byte, uint8 [256]; 255 where it is no letter."""
        table = np.full(256, _INVALID, np.uint8)
        for number, letter in enumerate(self.letters):
            table[[ord(letter), ord(letter.lower())]] = number
        for letter, other in self.synonyms:
            table[[ord(letter), ord(letter.lower())]] = self.letters.index(other)
        return table

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "n"]:
        """Returns the ids of letters, int32 [n], without `bos_id`.

        Raises:
          ValueError: for anything but letters of the alphabet, naming it and its place.
        """
        data = text.encode() if isinstance(text, str) else text
        ids = self.table[np.frombuffer(data, np.uint8)]
        if (wrong := np.flatnonzero(ids == _INVALID)).size:
            place = int(wrong[0])
            raise ValueError(f"{chr(data[place])!r} at letter {place + 1} is not in the {self.name} alphabet")
        return ids.astype(np.int32)

    def decode(self, ids: Any) -> str:
        """Returns the letters of `ids`, dropping every id that is not one."""
        array = np.asarray(ids, np.int64).reshape(-1)
        return "".join(self.letters[i] for i in array[(array >= 0) & (array < len(self.letters))])


ALPHABETS = {
    # The codes for two or three possible bases say no more than N does to a model of so few letters; U is T in RNA.
    "dna": Alphabet("dna", "ACGTN", (*((letter, "N") for letter in "RYKMSWBDHV"), ("U", "T"))),
    # The 20 amino acids; X any, B D or N, Z E or Q, U selenocysteine, O pyrrolysine, * stop. J (I or L) is read as X.
    "protein": Alphabet("protein", "ACDEFGHIKLMNPQRSTVWYXBZUO*", (("J", "X"),)),
}


def is_fasta(path: str | os.PathLike[str]) -> bool:
    """Whether the name of a file says that it is FASTA."""
    name = pathlib.Path(path).name.lower()
    return name.removesuffix(".gz").endswith(SUFFIXES)


def read_fasta(
    path: str | os.PathLike[str], alphabet: Alphabet, begin: int = 0, end: int | None = None
) -> Iterator[tuple[str | None, Int32[np.ndarray, "n"]]]:
    """Yields a file's records in pieces.

    Args:
      path: A FASTA file, compressed if its name ends in `.gz`.
      alphabet: Of its letters.
      begin, end: Bytes to read of a file that is not compressed; both are where a record begins, or the end.

    Yields:
      `(name, [bos_id])` where a record begins, then `(None, ids)` for the pieces of its sequence. A name is the first
      word after `>`.

    Raises:
      OSError: The file cannot be read.
      ValueError: It is not FASTA, a letter is not in the alphabet, or a record has no sequence; names file and line.
    """
    table, opener = alphabet.table, np.array([alphabet.bos_id], np.int32)
    number, name, name_line, is_empty, is_line_start = 0, None, 0, False, True

    def fail(reason: str, line: int) -> NoReturn:
        raise ValueError(f"{path}, line {lines_before(path, begin) + line}: {reason}")

    for line in stored_lines(path, begin, end, _CHUNK_BYTES):
        number += is_line_start
        is_opener, is_comment = (is_line_start and line[:1] == mark for mark in (b">", b";"))
        is_line_start = line.endswith(b"\n")
        if (is_opener or is_comment) and not is_line_start and len(line) == _CHUNK_BYTES:
            fail(f"a name or comment has more than {_CHUNK_BYTES} bytes", number)
        if is_opener:
            if is_empty:
                fail(f"the record {name} has no sequence", name_line)
            if not line[1:].strip() or line[1:2].isspace():
                fail("a record has no name after >", number)
            name, name_line, is_empty = line[1:].split(maxsplit=1)[0].decode(errors="replace"), number, True
            yield name, opener
        elif not is_comment and (letters := line.rstrip()):
            if name is None:
                fail("a sequence comes before the first line that begins with >", number)
            ids = table[np.frombuffer(letters, np.uint8)]
            if (wrong := np.flatnonzero(ids == _INVALID)).size:
                fail(f"{chr(letters[wrong[0]])!r} is not in the {alphabet.name} alphabet {alphabet.letters}", number)
            is_empty = False
            yield None, ids.astype(np.int32)
    if is_empty:
        fail(f"the record {name} has no sequence", name_line)


def fasta_documents(path: str | os.PathLike[str], alphabet: Alphabet) -> tuple[Document, ...]:
    """Returns the records of a FASTA file, or of every such file of a directory, as documents.

    Args:
      path: A file of any name, or a directory, of which files with the usual suffixes are read.
      alphabet: Of the letters.

    Returns:
      Documents named `file:record`, in the order of files and records; each begins with `bos_id`.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: There is no record, or a file is malformed.
    """
    is_file = pathlib.Path(path).is_file()
    names: list[str] = []
    pieces: list[list[np.ndarray]] = []
    for file_name, item in visible_files(pathlib.Path(path)):
        for name, ids in read_fasta(item, alphabet) if is_file or is_fasta(item) else ():
            if name is not None:
                names.append(f"{file_name}:{name}")
                pieces.append([])
            pieces[-1].append(ids)
    documents = tuple(Document(name, np.concatenate(parts)) for name, parts in zip(names, pieces))
    if not documents:
        raise ValueError(f"{path} holds no FASTA record; give a file or a directory of {', '.join(SUFFIXES)} files")
    return documents


def stored_lines(
    path: str | os.PathLike[str], begin: int = 0, end: int | None = None, max_bytes: int = -1
) -> Iterator[bytes]:
    """Yields the lines of a file, with their ends, in pieces of at most `max_bytes`.

    Args:
      path: Decompressed if its name ends in `.gz`.
      begin, end: Where to begin and to stop; not for a compressed file.
      max_bytes: -1 for whole lines.

    Raises:
      OSError: The file cannot be read.
      ValueError: The compressed file is damaged.
    """
    is_compressed = pathlib.Path(path).suffix.lower() == ".gz"
    with (gzip.open if is_compressed else open)(path, "rb") as file:
        file.seek(begin)
        position = begin
        try:
            while end is None or position < end:
                line = file.readline(max_bytes)
                if not line:
                    return
                position += len(line)
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def lines_before(path: str | os.PathLike[str], begin: int) -> int:
    """Number of lines before a byte of a file."""
    if not begin:
        return 0
    count = 0
    with open(path, "rb") as file:
        while begin > 0 and (data := file.read(min(begin, _CHUNK_BYTES))):
            count, begin = count + data.count(b"\n"), begin - len(data)
    return count
