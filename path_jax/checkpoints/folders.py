"""Folders of files that others wrote, and folders that appear complete or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MAX_JSON_BYTES = 2**24


def parse_json(text: bytes, where: Any) -> dict[str, Any]:
    """Returns the object that `text` holds.

    Raises:
      ValueError: if it is not UTF-8 JSON, not an object, too deep, or has a key twice.
    """

    def unique(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:100]!r} appears twice")
        return result

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # covers UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{where} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {type(value).__name__}, expected a JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of at most 16 MiB.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is too large or malformed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {_MAX_JSON_BYTES} are read")
    return parse_json(path.read_bytes(), path)


def member(directory: Path, name: str) -> Path:
    """Returns the file `name` of a checkpoint directory.

    Links must stay in the directory, or in the `blobs` folder that the Hugging Face cache keeps beside `snapshots`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the name is a path, or the file lies elsewhere.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{directory} names the file {name[:200]!r}; only files of that directory are read")
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no file {name}")
    home, target = directory.resolve(), path.resolve()
    in_cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if target.parent != home and not in_cache:
        raise ValueError(f"{path} is a link to {target}, outside the directory; copy the file there")
    return path


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `path` that becomes `path` if the block succeeds and vanishes if it fails.

    Raises:
      FileExistsError: if `path` exists and is not an empty directory.
    """
    path = Path(os.path.abspath(path))
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise FileExistsError(f"{path} exists and is not an empty directory; name a new one")
    created = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)  # replaces an empty directory, fails on one that was filled meanwhile
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else moved in
            for folder in created:
                folder.rmdir()
        raise
