"""Turns files into a prepared directory: a plan, shards written by several processes, a manifest.

The plan lists the files and cuts them into shards before anything is read, so the shards depend on neither the number
of processes nor their speed. Every file appears whole or not at all: it is written beside its name, flushed to the disk
and renamed. A preparation that was killed at any moment therefore goes on where it was, and ends with the same bytes as
one that was not; those bytes are also a matter of the versions of array_record and of the tokenizer's package.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from path_jax.data.fasta import ALPHABETS
from path_jax.data.prepared import FORMAT, MANIFEST, PLAN, file_sha256, read_json, shard_name, token_dtype
from path_jax.data.source_files import Encoding, Part, SourceFile, check_kinds, cut_parts, part_tokens, stored_tokenizer

RECORD_TOKENS = 2**14  # small enough that a row decodes little else, large enough to compress well
DEFAULT_SHARD_BYTES = 2**26
# One record per chunk, so that a read decodes one record; one thread, as the processes fill the cores.
_WRITER_OPTIONS = "group_size:1,zstd:1,max_parallelism:1"
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
    check_kinds(files, encoding)
    start, output = time.perf_counter(), pathlib.Path(output)
    tokenizer_files = encoding.tokenizer.files() if encoding.kind == "learned" else {}
    plan = _make_plan(files, encoding, _description(encoding, tokenizer_files), shard_bytes)
    with _locked(output):
        if (output / PLAN).exists():
            if difference := _difference(read_json(output / PLAN), plan):
                raise ValueError(f"{output} was begun with {difference}; choose another --output")
        else:
            if foreign := sorted(set(os.listdir(output)) - {_LOCK, *tokenizer_files}):
                foreign = [name for name in foreign if not name.endswith(".tmp")]
            if foreign:
                raise ValueError(f"{output} holds {foreign[0]} and is no prepared directory; choose another --output")
            for name, content in tokenizer_files.items():
                _write(output / name, content)
            _write_json(output / PLAN, plan)
        for path in output.glob("*.tmp"):
            path.unlink()
        return _write_shards(output, plan, encoding, workers, on_progress, start)


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


def _write_shards(output, plan, encoding, workers, on_progress, start) -> Prepared:
    """Writes what is missing, then the manifest."""
    count, files = len(plan["shards"]), [SourceFile(**file) for file in plan["files"]]
    tokenizer = plan["tokenizer"]
    jobs = []
    for number, parts in enumerate(plan["shards"]):
        if _finished(output, number, count) is None:
            parts = tuple(Part(files[file], begin, end) for file, begin, end in parts)
            settings = (tokenizer["kind"], tokenizer["sha256"], encoding.bos_id, encoding.vocab_size, encoding.text_key)
            jobs.append(_Job(str(output), number, count, parts, settings))
    total = sum(file.size for file in files)
    source_bytes = sum(job.source_bytes for job in jobs)
    done = total - source_bytes
    on_progress(done, total)
    for job in _run(jobs, workers):
        done += job.source_bytes
        on_progress(done, total)
    shards = []
    for number in range(count):
        shard = _finished(output, number, count)
        shards.append({"name": shard_name(number, count)} | {k: shard[k] for k in ("tokens", "documents", "sha256")})
    settings = {k: plan[k] for k in ("format", "tokenizer", "vocab_size", "bos_id", "dtype", "record_tokens")}
    _write_json(output / MANIFEST, settings | {"shards": shards})
    return Prepared(
        sum(shard["documents"] for shard in shards), sum(shard["tokens"] for shard in shards), count,
        count - len(jobs), source_bytes, time.perf_counter() - start,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Job:
    """One shard to write: settings are what `_encoding` takes after the directory."""

    output: str
    number: int
    count: int
    parts: tuple[Part, ...]
    settings: tuple[str, str, int, int, str]

    @property
    def source_bytes(self) -> int:
        return sum(part.end - part.begin for part in self.parts)


def _run(jobs: Sequence[_Job], workers: int) -> Iterator[_Job]:
    """Yields the jobs as they are done."""
    if workers == 1:
        for job in jobs:
            _write_shard(job)
            yield job
        return
    # Not forked: this process may run threads. Workers get one job after the other, so an error stops them soon.
    context, waiting, pending = multiprocessing.get_context("spawn"), list(reversed(jobs)), {}
    pool = concurrent.futures.ProcessPoolExecutor(
        max(1, min(workers, len(jobs))), mp_context=context, initializer=_begin_worker
    )
    with pool:
        while waiting or pending:
            while waiting and len(pending) < workers:
                job = waiting.pop()
                pending[pool.submit(_write_shard, job)] = job
            for future in concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED).done:
                try:
                    future.result()
                except concurrent.futures.process.BrokenProcessPool as error:
                    raise OSError(
                        "a worker process died, perhaps for want of memory; the same command goes on, with fewer "
                        "--workers if need be"
                    ) from error
                yield pending.pop(future)


def _begin_worker() -> None:
    """Leaves interrupts to the parent, and ends with it: a worker whose parent was killed would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _write_shard(job: _Job) -> None:
    """Writes a shard and what `_finished` reads."""
    output, encoding = pathlib.Path(job.output), _encoding(job.output, *job.settings)
    path = output / shard_name(job.number, job.count)
    # A worker that outlives its killed parent by a moment must not meet the next one's file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    num_tokens = num_documents = 0
    try:
        with contextlib.closing(ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)) as writer:
            for record in _records(job.parts, encoding):
                num_tokens += len(record)
                num_documents += int((record == encoding.bos_id).sum())
                writer.write(record.tobytes())
    except RuntimeError as error:  # of the writer, such as for a full disk
        raise OSError(f"{path} cannot be written: {' '.join(str(error).split())[:200]}") from error
    _flush(temporary)
    digest = file_sha256(temporary)
    os.replace(temporary, path)
    _flush(output)
    size = path.stat().st_size
    _write_json(_note(path), {"tokens": num_tokens, "documents": num_documents, "sha256": digest, "bytes": size})


def _records(parts: Sequence[Part], encoding: Encoding) -> Iterator[np.ndarray]:
    """Yields the tokens of all parts in arrays of RECORD_TOKENS, the last one shorter."""
    dtype = token_dtype(encoding.vocab_size)
    rest = np.zeros(0, dtype)
    for part in parts:
        for tokens in part_tokens(part, encoding):
            rest = np.concatenate([rest, tokens.astype(dtype)])
            whole = len(rest) - len(rest) % RECORD_TOKENS
            yield from np.split(rest[:whole], whole // RECORD_TOKENS) if whole else ()
            rest = rest[whole:]
    if len(rest):
        yield rest


@functools.lru_cache(1)
def _encoding(output: str, kind: str, sha256: str, bos_id: int, vocab_size: int, text_key: str) -> Encoding:
    """The encoding of a prepared directory; `sha256` tells one from the next."""
    del sha256
    return Encoding(kind, stored_tokenizer(output, kind), bos_id, vocab_size, text_key)


def _note(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")


def _finished(output: pathlib.Path, number: int, count: int) -> dict[str, Any] | None:
    """What was written about a shard, or None if it is not there as a whole."""
    path = output / shard_name(number, count)
    try:
        note = read_json(_note(path))
        is_whole = set(note) == {"tokens", "documents", "sha256", "bytes"} and path.stat().st_size == note["bytes"]
        return note if is_whole else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


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


def _write_json(path: pathlib.Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=1).encode() + b"\n")


def _write(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file in one step that also survives a loss of power."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def _flush(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
