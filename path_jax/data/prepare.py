"""Turns files into a prepared directory: a plan, shards, a manifest.

The plan lists the files and cuts them into shards before anything is read, so the shards depend on neither the number
of processes nor their speed, and every file that is written appears whole or not at all. A preparation that was killed
at any moment therefore goes on where it was, and ends with the same bytes as one that was not; those bytes are also a
matter of the versions of array_record and of the tokenizer's package.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from path_jax.data.fasta import ALPHABETS
from path_jax.data.prepared_format import FORMAT, MANIFEST, PLAN, read_json, shard_name, token_dtype
from path_jax.data.shard_writer import RECORD_TOKENS, Job, finished_shard, write_file, write_json, write_shards
from path_jax.data.source_files import Encoding, Part, SourceFile, check_kinds, cut_parts

DEFAULT_SHARD_BYTES = 2**26
_LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a call of `prepare` did.

    Attributes:
      documents, tokens, shards: Of the whole directory.
      kept: Shards that an earlier call had written.
      source_bytes: Of the files read for the other shards; seconds: that took.
    """

    documents: int
    tokens: int
    shards: int
    kept: int
    source_bytes: int
    seconds: float


def prepare(
    files: Sequence[SourceFile],
    encoding: Encoding,
    output: str | os.PathLike[str],
    *,
    workers: int = 1,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Writes a prepared directory, or goes on with one.

    Args:
      files: What to read, in this order.
      encoding: What makes tokens of documents.
      output: A directory that does not exist, is empty, or holds an earlier call with the same arguments.
      workers: Processes, at least 1; 1 works in this process.
      shard_bytes: Bytes of the files that fill a shard, at least 1. A document is never cut, so one shard may be as
        long as the longest document.
      on_progress: Called with the bytes of the files that are done and of all files.

    Raises:
      OSError: A file cannot be read or written, another process writes there, or a worker died.
      ValueError: An argument is out of range, a file is malformed, or `output` holds something else; nothing of it is
        changed then.
    """
    for name, value in (("workers", workers), ("shard_bytes", shard_bytes)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 0 <= encoding.bos_id < encoding.vocab_size:
        raise ValueError(f"bos_id={encoding.bos_id} must be in [0, {encoding.vocab_size}), and opens documents")
    if encoding.tokenizer.vocab_size > encoding.vocab_size:
        raise ValueError(f"the tokenizer has {encoding.tokenizer.vocab_size} ids, more than {encoding.vocab_size}")
    check_kinds(files, encoding)
    start, output = time.perf_counter(), pathlib.Path(output)
    tokenizer_files = encoding.tokenizer.files() if encoding.kind == "learned" else {}
    plan = _make_plan(files, encoding, _description(encoding, tokenizer_files), shard_bytes)
    _check_is_ours(output, tokenizer_files)
    with _locked(output):
        if (output / PLAN).exists():
            if difference := _difference(read_json(output / PLAN), plan):
                raise ValueError(f"{output} was begun with {difference}; choose another --output")
        else:
            for name, content in tokenizer_files.items():
                write_file(output / name, content)
            write_json(output / PLAN, plan)
        for path in output.glob("*.tmp"):
            path.unlink()
        return _finish(output, plan, encoding, workers, on_progress, start)


def _check_is_ours(output: pathlib.Path, tokenizer_files: Collection[str]) -> None:
    """Refuses a directory with files of others; before there is a plan, those of the tokenizer may be there."""
    if output.is_dir() and not (output / PLAN).exists():
        for name in sorted(os.listdir(output)):
            if name not in (_LOCK, *tokenizer_files) and not name.endswith(".tmp"):
                raise ValueError(f"{output} holds {name} and is no prepared directory; choose another --output")


def _description(encoding: Encoding, files: dict[str, bytes]) -> dict[str, str]:
    """The tokenizer by its kind and a checksum."""
    if encoding.kind in ALPHABETS:
        text = json.dumps(dataclasses.asdict(encoding.tokenizer), sort_keys=True).encode()
    else:
        text = b"".join(files[name] for name in sorted(files))
    return {"kind": encoding.kind, "sha256": hashlib.sha256(text).hexdigest()}


def _make_plan(
    files: Sequence[SourceFile], encoding: Encoding, tokenizer: dict[str, str], shard_bytes: int
) -> dict[str, Any]:
    """{settings, "files", "shards": [[[number of a file, begin, end], ...], ...]}."""
    shards: list[list[list[int]]] = []
    size = shard_bytes
    for number, file in enumerate(files):
        for part in cut_parts(file, shard_bytes):
            if size >= shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append([number, part.begin, part.end])
            size += part.end - part.begin
    return {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "vocab_size": encoding.vocab_size,
        "bos_id": encoding.bos_id,
        "dtype": token_dtype(encoding.vocab_size).name,
        "record_tokens": RECORD_TOKENS,
        "text_key": encoding.text_key,
        "shard_bytes": shard_bytes,
        "files": [dataclasses.asdict(file) for file in files],
        "shards": shards,
    }


def _difference(old: Any, new: dict[str, Any]) -> str:
    """What an earlier plan has otherwise, in words; empty where it is the same."""
    if not isinstance(old, dict):
        return "a plan that is not an object"
    for key, value in new.items():
        if old.get(key) == value:
            continue
        if key != "files" or not isinstance(old.get(key), list):
            return f"{key} {str(old.get(key))[:100]}, not {str(value)[:100]}"
        if len(old[key]) != len(value):
            return f"{len(old[key])} files, not {len(value)}"
        before, now = next(pair for pair in zip(old[key], value) if pair[0] != pair[1])
        if isinstance(before, dict) and before.get("path") == now["path"]:
            return f"{now['path']} of another size, time or kind"
        return f"{str(before)[:100]} in place of {now['path']}"
    return ""


def _finish(output, plan, encoding, workers, on_progress, start) -> Prepared:
    """Writes what is missing, then the manifest."""
    count, files = len(plan["shards"]), [SourceFile(**file) for file in plan["files"]]
    tokenizer = plan["tokenizer"]
    jobs = []
    for number, parts in enumerate(plan["shards"]):
        if finished_shard(output, number, count) is None:
            parts = tuple(Part(files[file], begin, end) for file, begin, end in parts)
            settings = (tokenizer["kind"], tokenizer["sha256"], encoding.bos_id, encoding.vocab_size, encoding.text_key)
            jobs.append(Job(str(output), number, count, parts, settings))
    total = sum(file.size for file in files)
    source_bytes = sum(job.source_bytes for job in jobs)
    done = total - source_bytes
    on_progress(done, total)
    for job in write_shards(jobs, workers):
        done += job.source_bytes
        on_progress(done, total)
    shards = []
    for number in range(count):
        shard = finished_shard(output, number, count)
        shards.append({"name": shard_name(number, count)} | {k: shard[k] for k in ("tokens", "documents", "sha256")})
    settings = {k: plan[k] for k in ("format", "tokenizer", "vocab_size", "bos_id", "dtype", "record_tokens")}
    write_json(output / MANIFEST, settings | {"shards": shards}, indent=1)
    return Prepared(
        sum(shard["documents"] for shard in shards), sum(shard["tokens"] for shard in shards), count,
        count - len(jobs), source_bytes, time.perf_counter() - start,
    )  # fmt: skip


@contextlib.contextmanager
def _locked(output: pathlib.Path) -> Iterator[None]:
    """Keeps others from the directory, which is made if need be; the system gives it back even after a kill."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / _LOCK, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"another process prepares {output}; wait for it or choose another --output") from error
        yield
