"""Documents from the standard library, files, token files and TFDS, and their split.

A byte document is read as `bos, byte, byte, ...`, so every byte is predicted and bits per
byte is well defined. All sources but TFDS are held in memory (int32, 4 bytes a token);
prepare a larger corpus with `python -m path_jax.data prepare`, or write it as a TFDS array_record dataset.
"""

import dataclasses
import hashlib
import operator
import os
import pathlib
import sysconfig
from collections.abc import Callable, Sequence
from typing import SupportsIndex

import numpy as np

from path_jax.data.task_stream import TaskStream
from path_jax.data.tokenizer import ByteTokenizer

_TOKENIZER = ByteTokenizer()
# Tests and installed packages differ between installations of one Python version, and
# test files hold invalid source on purpose.
_EXCLUDED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages") + ("lib2to3", "ensurepip", "__pycache__")
)


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """One text that attention must not look beyond.

    Attributes:
      name: Unique in its corpus; decides the side of the train/held-out split.
      tokens: Ids, int32 [n]. The first token is context only; the other n - 1 are
        predicted.
    """

    name: str
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The two sides of a corpus; no document name is on both.

    Attributes:
      train: Documents to learn from: a tuple, or a lazy sequence for TFDS, or a `TaskStream`.
      heldout: Documents for evaluation: the same.
      vocab_size: Every token is in [0, vocab_size).
    """

    train: Sequence[Document] | TaskStream
    heldout: Sequence[Document] | TaskStream
    vocab_size: int


class LazyDocuments(Sequence[Document]):
    """Documents that are read when they are indexed; `read` maps [0, length) to one."""

    def __init__(self, length: int, read: Callable[[int], Document]):
        self._length = length
        self._read = read

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> Document:
        index = operator.index(index)
        if not 0 <= index < self._length:
            raise IndexError(f"document {index} is outside [0, {self._length})")
        return self._read(index)


def opened_bytes(data: str | bytes) -> np.ndarray:
    """Returns the document opener and the bytes of `data`, int32 [n + 1]."""
    return np.concatenate([np.array([_TOKENIZER.bos_id], np.int32), _TOKENIZER.encode(data)])


def standard_library_documents(encode: Callable[[bytes], np.ndarray] = opened_bytes) -> tuple[Document, ...]:
    """Returns the non-empty `.py` files of this Python's standard library, about 11 MB.

    The text differs between Python versions, so numbers compare only within one version.

    Args:
      encode: Turns the bytes of a file into ids, int32 [n].

    Returns:
      Documents named by their path relative to the standard library, sorted by name.
    """
    return tuple(Document(name, encode(path.read_bytes())) for name, path in standard_library_files())


def standard_library_files() -> list[tuple[str, pathlib.Path]]:
    """Returns `(relative name, path)` of the non-empty `.py` files of this Python's standard library, sorted."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = visible_files(root, _EXCLUDED_FOLDERS, refuse_links=False)
    return [(name, path) for name, path in files if path.suffix == ".py"]


def file_documents(
    path: str | os.PathLike[str], encode: Callable[[bytes], np.ndarray] = opened_bytes
) -> tuple[Document, ...]:
    """Returns the text of a file, or of every visible non-empty file of a directory.

    Args:
      path: A file, or a directory that is searched recursively.
      encode: Turns the bytes of a file into ids, int32 [n].

    Returns:
      Documents named by their path relative to the directory, sorted by name.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: Nothing to read, or a link leads outside the directory.
    """
    files = visible_files(pathlib.Path(path))
    documents = tuple(Document(name, encode(item.read_bytes())) for name, item in files)
    if not documents:
        raise ValueError(f"{path} holds no visible non-empty file; give a path with text")
    return documents


def token_file_documents(path: str | os.PathLike[str], bos_id: int) -> tuple[Document, ...]:
    """Returns the documents of one `.npy` token file or of a directory of them.

    Args:
      path: A `.npy` file, or a directory searched recursively for them. Each holds a 1-D
        integer array.
      bos_id: The id that opens a document. A file is cut before each occurrence; tokens
        before the first one are a document of their own.

    Returns:
      Documents named `file.npy#0`, `file.npy#1`, ..., or `file.npy` for an uncut file.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: No token file, a pickled, non-integer or not 1-D array, or ids that are
        negative or do not fit int32.
    """
    documents = []
    for name, item in visible_files(pathlib.Path(path)):
        if item.suffix == ".npy":
            documents += _cut_at_bos(name, _load_tokens(item), bos_id)
    if not documents:
        raise ValueError(f"{path} holds no token in a .npy file; save ids with numpy.save")
    return tuple(documents)


def tfds_documents(directory: str | os.PathLike[str], split: str, text_key: str) -> Sequence[Document]:
    """Returns a lazy random-access sequence over a prepared TFDS dataset, as bytes.

    Args:
      directory: The version folder, such as `~/data/my_text/1.0.0`, written with
        `file_format="array_record"`. Nothing is downloaded.
      split: A split name or slice, such as `train` or `train[:90%]`.
      text_key: The feature that holds the text.

    Returns:
      A sequence that reads a record when it is indexed. Names are `split#index`.

    Raises:
      ImportError: tensorflow-datasets is not installed.
      FileNotFoundError: `directory` does not exist.
      ValueError: There is no such split or feature.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError("source 'tfds' needs tensorflow-datasets; run: pip install path-jax[tfds]") from error
    if not pathlib.Path(directory).is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; give the version folder")
    builder = tfds.builder_from_directory(os.fspath(directory))
    features = sorted(builder.info.features)
    if text_key not in features:
        raise ValueError(f"{directory} has no {text_key!r}; set text_key to one of {features}")
    splits = sorted(builder.info.splits)
    if split.split("[")[0] not in splits:
        raise ValueError(f"{directory} has no split {split!r}; set tfds_split to one of {splits}")
    source = builder.as_data_source(split)
    return LazyDocuments(len(source), lambda index: Document(f"{split}#{index}", opened_bytes(source[index][text_key])))


def split_documents(
    documents: Sequence[Document],
    heldout_fraction: float,
    seed: int,
    *,
    bos_id: int = _TOKENIZER.bos_id,
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Splits whole documents into a train and a held-out side.

    Documents are visited in the order of `sha256(seed, name)` and held out while that
    brings the held-out tokens closer to the fraction; the choice depends on names and
    lengths only, never on the order given. A single document is cut by position instead:
    its end is held out, and the names carry the range, such as `book.txt[0:9000]`.

    Args:
      documents: Documents with distinct names.
      heldout_fraction: Wanted share of the tokens, in (0, 1).
      seed: Any integer; another seed holds out other documents.
      bos_id: Repeated at the start of the second piece of a cut document that has it.

    Returns:
      `(train, heldout)`, each non-empty and in the order given.

    Raises:
      ValueError: A bad fraction, repeated names, or too little text to have two sides.
    """
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"heldout_fraction is {heldout_fraction}; it must be inside (0, 1)")
    if not documents:
        raise ValueError("no documents to split; give at least one")
    if len(documents) == 1:
        return _cut_by_position(documents[0], heldout_fraction, bos_id)
    names = [document.name for document in documents]
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"document names repeat: {repeated[:3]}; make every name distinct")
    by_hash = sorted(documents, key=lambda item: hashlib.sha256(f"{seed}/{item.name}".encode()).digest())
    goal = heldout_fraction * sum(len(document.tokens) for document in documents)
    heldout_names: set[str] = set()
    num_tokens = 0
    for document in by_hash:
        is_closer = num_tokens + len(document.tokens) / 2 <= goal
        if is_closer and len(heldout_names) < len(documents) - 1:
            heldout_names.add(document.name)
            num_tokens += len(document.tokens)
    if not heldout_names:
        heldout_names.add(min(by_hash, key=lambda item: len(item.tokens)).name)
    train = tuple(item for item in documents if item.name not in heldout_names)
    return train, tuple(item for item in documents if item.name in heldout_names)


def visible_files(
    root: pathlib.Path, excluded: frozenset[str] = frozenset(), *, refuse_links: bool = True
) -> list[tuple[str, pathlib.Path]]:
    """Returns `(relative name, path)` of the non-empty files at or below `root`, sorted.

    No link is followed: the target of one inside the directory is read under its own name,
    and a second copy could end on the other side of the split. Distributions do link
    standard library files elsewhere, so there `refuse_links` is off.

    Raises:
      FileNotFoundError: `root` does not exist.
      ValueError: A link leads outside `root`, with `refuse_links`.
    """
    if root.is_file():
        return [(root.name, root)] if root.stat().st_size else []
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist; give a file or a directory")
    found = []
    for folder, folder_names, file_names in os.walk(root):
        folder_names[:] = [n for n in folder_names if n not in excluded and n[0] != "."]
        for path in (pathlib.Path(folder, n) for n in folder_names + file_names if n[0] != "."):
            if path.is_symlink():
                if refuse_links and not path.resolve().is_relative_to(root.resolve()):
                    raise ValueError(
                        f"{path} is a link to {path.resolve()}, outside {root}; copy the file "
                        "into the directory or remove the link"
                    )
            elif path.is_file() and path.stat().st_size:
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


def _load_tokens(path: pathlib.Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            tokens = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is not a plain .npy array ({error}); use numpy.save") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        found = f"{tokens.dtype} {list(tokens.shape)}"
        raise ValueError(f"{path} holds {found}; token files hold a 1-D integer array")
    if tokens.size and not (tokens.min() >= 0 and tokens.max() <= np.iinfo(np.int32).max):
        raise ValueError(f"{path} has ids {tokens.min()}..{tokens.max()}; ids must fit 0..2**31-1")
    return tokens.astype(np.int32, copy=False)


def _cut_at_bos(name: str, tokens: np.ndarray, bos_id: int) -> list[Document]:
    starts = np.flatnonzero(tokens == bos_id)
    pieces = [piece for piece in np.split(tokens, starts) if len(piece)]
    if len(starts) == 0:
        return [Document(name, piece) for piece in pieces]
    return [Document(f"{name}#{i}", piece) for i, piece in enumerate(pieces)]


def _cut_by_position(
    document: Document, heldout_fraction: float, bos_id: int
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    has_bos = len(document.tokens) > 0 and document.tokens[0] == bos_id
    opener, body = np.split(document.tokens, [int(has_bos)])
    if len(body) < 2:
        raise ValueError(f"{document.name} has {len(body)} tokens; two sides need at least 2")
    cut = min(max(round(len(body) * (1 - heldout_fraction)), 1), len(body) - 1)
    train = Document(f"{document.name}[0:{cut}]", document.tokens[: cut + len(opener)])
    heldout = Document(f"{document.name}[{cut}:{len(body)}]", np.concatenate([opener, body[cut:]]))
    return (train,), (heldout,)
