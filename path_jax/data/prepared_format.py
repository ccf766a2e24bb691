"""The files that `python -m path_jax.data prepare` writes, and whether they are whole.

A prepared directory holds

    dataset.json                         what is below, and {"format", "tokenizer", "vocab_size", "bos_id", "dtype",
                                         "record_tokens", "shards": [{"name", "tokens", "documents", "sha256"}, ...]}
    shard-00000-of-00012.array_record    records of `record_tokens` little-endian ids, the last one of a shard shorter
    tokenizer.json                       of a learned vocabulary

and the files of its making, which readers ignore: plan.json and a shard-00000-of-00012.json for each shard. The shards
follow each other as one stream of tokens. Every document of it begins with `bos_id`, and no document is in two shards.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

FORMAT = 1
MANIFEST, PLAN = "dataset.json", "plan.json"
_MAX_JSON_BYTES = 2**30


def shard_name(number: int, count: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}-of-{count:05d}.array_record"


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that ids are stored in: 2 bytes where they fit, else 4."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its name, tokens, documents (that is, openers) and the SHA-256 of its bytes, in hexadecimal."""

    name: str
    tokens: int
    documents: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `dataset.json` says.

    Attributes:
      tokenizer: {"kind": "bytes", "dna", "protein" or "learned", "sha256": of its description}.
      vocab_size: Every id is below it; bos_id: opens a document; record_tokens: ids in a full record.
      shards: In the order of the stream.
    """

    tokenizer: Mapping[str, str]
    vocab_size: int
    bos_id: int
    record_tokens: int
    shards: tuple[Shard, ...]


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file holds; ValueError if it is not JSON."""
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {_MAX_JSON_BYTES} are read")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {str(error)[:200]}") from error


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Reads and checks `dataset.json`.

    Raises:
      FileNotFoundError: There is none.
      ValueError: It is malformed, of another format, or names a file that is not a shard of this directory.
    """
    directory = pathlib.Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        reason = "its preparation did not end; run the same command again" if (directory / PLAN).is_file() else ""
        raise FileNotFoundError(f"{directory} has no {MANIFEST}: {reason or 'it is not a prepared data set'}")
    value = read_json(path)
    try:
        if value["format"] != FORMAT:
            raise ValueError(f"{path} has format {value['format']}; this version reads format {FORMAT}")
        count = lambda x, least: x if type(x) is int and x >= least else _refuse(x)
        shards = tuple(
            Shard(shard["name"], count(shard["tokens"], 0), count(shard["documents"], 0), str(shard["sha256"]))
            for shard in value["shards"]
        )
        manifest = Manifest(
            {key: str(value["tokenizer"][key]) for key in ("kind", "sha256")},
            count(value["vocab_size"], 1), count(value["bos_id"], 0), count(value["record_tokens"], 1), shards,
        )  # fmt: skip
        dtype = value["dtype"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is malformed: {type(error).__name__} {error}") from error
    if dtype != token_dtype(manifest.vocab_size).name or manifest.bos_id >= manifest.vocab_size:
        raise ValueError(f"{path}: dtype {dtype} and bos_id {manifest.bos_id} do not fit {manifest.vocab_size} ids")
    for number, shard in enumerate(shards):
        if shard.name != shard_name(number, len(shards)):
            expected = shard_name(number, len(shards))
            raise ValueError(f"{path} names {str(shard.name)[:200]!r} where {expected} belongs; nothing else is read")
    return manifest


def _refuse(value):
    raise TypeError(f"{value!r} is not a valid number")


def shard_path(directory: pathlib.Path, shard: Shard) -> pathlib.Path:
    """The file of a shard.

    Raises:
      FileNotFoundError: There is none.
      ValueError: It is a link that leads out of the directory.
    """
    path = directory / shard.name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run: python -m path_jax.data verify {directory}")
    if path.resolve().parent != directory.resolve():
        raise ValueError(f"{path} is a link to {path.resolve()}, outside the directory; copy the file there")
    return path


def file_sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged_shards(directory: str | os.PathLike[str], on_shard=lambda: None) -> dict[str, str]:
    """Reads every shard of a prepared directory and compares its checksum.

    Args:
      directory: The prepared directory.
      on_shard: Called after each shard.

    Returns:
      {name of a shard: what is wrong with it}; empty if all are whole.

    Raises:
      FileNotFoundError, ValueError: See `read_manifest`.
    """
    directory, damaged = pathlib.Path(directory), {}
    for shard in read_manifest(directory).shards:
        try:
            found = file_sha256(shard_path(directory, shard))
            if found != shard.sha256:
                damaged[shard.name] = f"SHA-256 is {found[:16]}..., not {shard.sha256[:16]}..."
        except FileNotFoundError:
            damaged[shard.name] = "is missing"
        except (OSError, ValueError) as error:
            damaged[shard.name] = str(error)
        on_shard()
    return damaged
