"""Lists of a checkpoint's files with sizes and hashes, so that damage is found before anything is restored.

Array storage checks its index, not its data: a flipped bit in a chunk may decode to a wrong number. A manifest is
written before the step is committed, so every committed step has one; a bit that flipped before that is not seen.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

NAME = "manifest.json"
# Orbax writes the time of the commit into this file after the manifest.
_CHANGING = (NAME, "_CHECKPOINT_METADATA")


def write_manifest(directory: Path) -> None:
    """Writes manifest.json: {file relative to `directory`: [size in bytes, sha256 in hexadecimal digits]}."""
    files = {name: [(directory / name).stat().st_size, _sha256(directory / name)] for name in _files(directory)}
    (directory / NAME).write_text(json.dumps(files, indent=1) + "\n")


def damage(directory: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None if nothing is, or if it has no manifest.

    Args:
      directory: of one step.
      share: (i, n) checks every n-th file from the i-th on, so that n processes share the reading.
    """
    path = directory / NAME
    if not path.exists():
        return None
    try:
        files = json.loads(path.read_text())
        expected = [(str(name), int(size), str(digest)) for name, (size, digest) in sorted(files.items())]
    except (ValueError, TypeError, AttributeError, OSError) as error:
        return f"{NAME} cannot be read ({type(error).__name__})"
    return _first_difference(directory, expected[share[0] :: share[1]])


def _first_difference(directory: Path, expected: Sequence[tuple[str, int, str]]) -> str | None:
    for name, size, digest in expected:
        file = directory / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, not {size}"
            if _sha256(file) != digest:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _files(directory: Path) -> list[str]:
    files = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in files if name not in _CHANGING)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
