"""Turns text into token files: `python -m path_jax.tokenize --checkpoint=DIR_OR_FILE --data=TEXTS --output=DIR`.

Every document becomes the id that opens it and the ids of its text, with the vocabulary of the checkpoint; all of them
go into one `.npy` file, which `data.source=tokens` reads. The last line printed has the settings.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from path_jax.checkpoints import load_config
from path_jax.checkpoints.folders import new_directory
from path_jax.data import ByteTokenizer, file_documents, standard_library_documents
from path_jax.evaluation.pretrained import vocabulary_of


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m path_jax.tokenize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run or published directory, or .gguf file")
    parser.add_argument("--data", type=Path, help="file or directory of text (default: Python's standard library)")
    parser.add_argument("--output", type=Path, required=True, help="directory that does not exist or is empty")
    parser.add_argument("--bos-id", type=int, help="id that opens a document (default: the id that ends a text)")
    return parser


def run(args: argparse.Namespace) -> str:
    """Writes the file; returns the settings of a configuration that reads it."""
    config = load_config(args.checkpoint)
    tokenizer, end_ids = vocabulary_of(args.checkpoint, config)
    if isinstance(tokenizer, ByteTokenizer):
        raise ValueError(f"{args.checkpoint} reads bytes, which need no token files: use data.source=files")
    opener = args.bos_id if args.bos_id is not None else next(iter(end_ids), None)
    if opener is None or not 0 <= opener < config.vocab_size:
        raise ValueError(f"--bos-id={opener} is not in [0, {config.vocab_size}), and something must open a document")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("tokenizing", total=None)

        def encode(text):
            progress.advance(task)
            return np.concatenate([[opener], tokenizer.encode(text)]).astype(np.int32)

        documents = standard_library_documents(encode) if args.data is None else file_documents(args.data, encode)
    tokens = np.concatenate([document.tokens for document in documents])
    with new_directory(args.output) as directory:
        np.save(directory / "tokens.npy", tokens)
    settings = dict(source="tokens", path=args.output, bos_id=opener, vocab_size=config.vocab_size)
    flags = " ".join(f"--config.data.{key}={value}" for key, value in settings.items())
    return f"{len(documents)} documents, {len(tokens)} tokens\n{flags}"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line and exits with status 1 for input that cannot work."""
    args = _parser().parse_args(argv)
    try:
        print(run(args))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"tokenize: {error}")


if __name__ == "__main__":
    main()
