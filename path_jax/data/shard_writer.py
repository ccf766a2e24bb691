"""Writes shards of tokens, in this process or in several, each whole or not at all.

A file is written beside its name, flushed to the disk and renamed, so a kill or a loss of power at any moment leaves
whole files and temporary ones.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from path_jax.data.prepared_format import file_sha256, read_json, shard_name, token_dtype
from path_jax.data.source_files import Encoding, Part, part_tokens, stored_tokenizer

RECORD_TOKENS = 2**14  # small enough that a row decodes little else, large enough to compress well
# One record per chunk, so that a read decodes one record; one thread, as the processes fill the cores.
_WRITER_OPTIONS = "group_size:1,zstd:1,max_parallelism:1"


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to write.

    Attributes:
      output: The prepared directory; number, count: of the shard and of all shards.
      parts: What to read, in order.
      settings: What `_encoding` takes after the directory. A process that is started anew reads a learned vocabulary
        from the prepared directory.
    """

    output: str
    number: int
    count: int
    parts: tuple[Part, ...]
    settings: tuple[str, str, int, int, str]

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return sum(part.end - part.begin for part in self.parts)


def write_shards(jobs: Sequence[Job], workers: int) -> Iterator[Job]:
    """Writes shards, and yields each job when it is done.

    Args:
      jobs: Shards to write.
      workers: Processes; 1 works in this one.

    Raises:
      OSError: A file cannot be read or written, or a worker died.
      ValueError: A file is malformed.
    """
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


def _write_shard(job: Job) -> None:
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
    write_json(_note(path), {"tokens": num_tokens, "documents": num_documents, "sha256": digest, "bytes": size})


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


def finished_shard(output: pathlib.Path, number: int, count: int) -> dict[str, Any] | None:
    """{"tokens", "documents", "sha256", "bytes"} of a shard that was written, or None if it is not there as a whole."""
    path = output / shard_name(number, count)
    try:
        note = read_json(_note(path))
        is_whole = set(note) == {"tokens", "documents", "sha256", "bytes"} and path.stat().st_size == note["bytes"]
        return note if is_whole else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_json(path: pathlib.Path, value: Any, indent: int | None = None) -> None:
    """Replaces a JSON file as `write_file` does."""
    write_file(path, json.dumps(value, indent=indent).encode() + b"\n")


def write_file(path: pathlib.Path, content: bytes) -> None:
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
