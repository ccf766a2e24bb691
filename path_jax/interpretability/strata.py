"""Texts of different kinds to analyse a model on, and how they become batches."""

import pydoc_data.topics
import string
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from path_jax.data import Batch

NOISE = (0.05, 0.1, 0.2)  # shares of characters


def standard_texts() -> dict[str, Iterator[str]]:
    """Texts that come with Python: {"prose": its reference manual, "code": modules of its library}."""
    library = Path(sysconfig.get_path("stdlib"))
    prose = (text for _, text in sorted(pydoc_data.topics.topics.items()))
    code = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(library.glob("*.py")))
    return {"prose": prose, "code": code}


def file_texts(path: str | Path) -> Iterator[str]:
    """Texts of a file, or of all files below a directory, by name.

    Raises:
      FileNotFoundError: if there is no such path, or no file below it.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise FileNotFoundError(f"there is no text at {path}")
    return (file.read_text(encoding="utf-8", errors="replace") for file in files)


def add_noise(text: str, share: float, seed: int = 0) -> str:
    """Replaces a share of the characters, each with this probability, by random small letters; line breaks stay."""
    rng = np.random.default_rng(seed)
    letters = rng.choice(list(string.ascii_lowercase), len(text))
    is_noise = rng.random(len(text)) < share
    return "".join(
        letter if noisy and old != "\n" else old for old, letter, noisy in zip(text, letters.tolist(), is_noise)
    )


def noisy_texts(texts: Iterable[str], share: float, seed: int) -> Iterator[str]:
    """`add_noise` to each text, one seed after the other."""
    for i, text in enumerate(texts):
        yield add_noise(text, share, seed + i)


def text_batches(
    texts: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    *,
    num_tokens: int,
    length: int,
    batch_size: int,
    opening: Sequence[int] = (),
) -> list[Batch]:
    """The first `num_tokens` tokens of texts, each cut into windows that read alone, as rows of batches.

    A window starts with `opening`, ids that the model expects before a text. Windows of a text overlap by the one token
    that the next one predicts from. Texts are read until there are enough.

    Raises:
      ValueError: if there are no tokens, or for numbers out of range.
    """
    if length < 2 + len(opening) or min(num_tokens, batch_size) < 1:
        raise ValueError(f"{length=}, {num_tokens=} and {batch_size=} leave no tokens to read")
    rows, left, size = [], num_tokens, length - len(opening)
    for text in texts:
        ids = np.asarray(encode(text), np.int32)
        for start in range(0, len(ids) - 1, size):
            piece = np.concatenate([np.asarray(opening, np.int32), ids[start : start + size + 1]])
            rows.append(_row(piece[: min(length, left) + 1], length))
            left -= int((rows[-1].segment_ids > 0).sum())
            if left <= 0:
                break
        if left <= 0:
            break
    if not rows:
        raise ValueError("the text has no tokens")
    empty = _row(np.zeros(1, np.int32), length)
    rows += [empty] * (-len(rows) % batch_size)
    return [Batch(*map(np.stack, zip(*rows[i : i + batch_size]))) for i in range(0, len(rows), batch_size)]


def _row(ids: Int[np.ndarray, "n+1"], length: int) -> Batch:
    """One row of ids and the ones behind them."""
    count = len(ids) - 1
    pad = lambda x, dtype: np.pad(np.asarray(x, dtype), (0, length - count))
    ones = np.ones(count)
    return Batch(
        pad(ids[:-1], np.int32), pad(ids[1:], np.int32), pad(ones, np.float32), pad(ones, np.int32),
        pad(np.arange(count), np.int32),
    )  # fmt: skip
