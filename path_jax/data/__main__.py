"""Large corpora as shards of tokens: `python -m path_jax.data prepare SOURCE... --output=DIR`, `... verify DIR`.

prepare turns text files and directories, JSONL, FASTA files or `stdlib` (this Python's standard library) into tokens
that `data.source=prepared` reads. Killed or interrupted, it goes on where it was when the same command is given again.
verify reads every shard and names those that are damaged or missing; prepare writes such a shard anew once it and the
JSON file of its name are deleted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from path_jax.data.fasta import ALPHABETS
from path_jax.data.prepare import DEFAULT_SHARD_BYTES, prepare
from path_jax.data.prepared_format import damaged_shards, read_manifest
from path_jax.data.source_files import KINDS, Encoding, list_files
from path_jax.data.tokenizer import ByteTokenizer, load_tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m path_jax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("prepare", help="turn files into shards of tokens")
    add.add_argument("sources", nargs="+", metavar="SOURCE", help="file, directory or stdlib; read in this order")
    add.add_argument("--output", type=Path, required=True, help="new directory, or one to go on with")
    add.add_argument(
        "--tokenizer", default="bytes",
        help=f"bytes, {', '.join(ALPHABETS)}, tokenizer.json, .gguf file or published directory (default: bytes)",
    )  # fmt: skip
    add.add_argument("--bos-id", type=int, help="id that opens a document (default: the id that ends a text)")
    add.add_argument("--format", choices=KINDS, help="of every file (default: by suffix; others are text)")
    add.add_argument("--text-key", default="text", help="key of the text in JSONL (default: text)")
    add.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    add.add_argument(
        "--shard-bytes", type=int, default=DEFAULT_SHARD_BYTES, help="bytes of the files for a shard (default: 64 MiB)"
    )
    verify = commands.add_parser("verify", help="compare all checksums")
    verify.add_argument("directory", type=Path, metavar="DIR")
    return parser


def _encoding(spec: str, bos_id: int | None, text_key: str) -> Encoding:
    """The tokenizer that is named.

    Raises:
      OSError, ValueError, ImportError: It cannot be read, or nothing says what opens a document.
    """
    if spec == "bytes" or spec in ALPHABETS:
        tokenizer = ALPHABETS.get(spec, ByteTokenizer())
        if bos_id not in (None, tokenizer.bos_id):
            raise ValueError(f"--bos-id={bos_id} is not the opener of {spec}, {tokenizer.bos_id}; leave it out")
        return Encoding(spec, tokenizer, tokenizer.bos_id, tokenizer.vocab_size, text_key)
    path = Path(spec)
    if not path.exists():
        choices = ", ".join(("bytes", *ALPHABETS))
        raise FileNotFoundError(f"--tokenizer={spec} is neither a file or directory nor one of {choices}")
    if path.suffix == ".gguf" or (path / "config.json").is_file():
        # Here, for every worker process imports this file, and these import much more.
        from path_jax.checkpoints import load_config
        from path_jax.evaluation.pretrained import vocabulary_of

        config = load_config(path)
        tokenizer, end_ids = vocabulary_of(path, config)
        if isinstance(tokenizer, ByteTokenizer):
            raise ValueError(f"{path} reads bytes: use --tokenizer=bytes")
        vocab_size = max(config.vocab_size, tokenizer.vocab_size)
    else:
        if path.is_file() and path.name != "tokenizer.json":
            raise ValueError(f"{path} is not named tokenizer.json, nor a .gguf file")
        if (tokenizer := load_tokenizer(path.parent if path.is_file() else path)) is None:
            raise ValueError(f"{path} has no tokenizer.json, nor vocab.json with merges.txt")
        end_ids, vocab_size = (), tokenizer.vocab_size
    opener = bos_id if bos_id is not None else next(iter(end_ids), None)
    if opener is None or not 0 <= opener < vocab_size:
        raise ValueError(f"--bos-id={opener} is not in [0, {vocab_size}), and something must open a document")
    return Encoding("learned", tokenizer, opener, vocab_size, text_key)


def _prepare(args: argparse.Namespace) -> str:
    for source in args.sources:
        if Path(source).is_dir() and args.output.resolve().is_relative_to(Path(source).resolve()):
            raise ValueError(f"--output={args.output} is in {source}, and would be read with it; put it elsewhere")
    files = list_files(args.sources, args.format)
    encoding = _encoding(args.tokenizer, args.bos_id, args.text_key)
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress("preparing", *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("preparing")
        result = prepare(
            files, encoding, args.output, workers=args.workers, shard_bytes=args.shard_bytes,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    kept = f", {result.kept} of them kept" if result.kept else ""
    speed = result.source_bytes / 1e6 / result.seconds
    return (
        f"{result.documents} documents, {result.tokens} tokens, {result.shards} shards{kept}; "
        f"{result.source_bytes / 1e6:.1f} MB in {result.seconds:.1f} s, {speed:.1f} MB/s\n"
        f"--config.data.source=prepared --config.data.path={args.output}, for a model with "
        f"vocab_size={encoding.vocab_size}"
    )


def _verify(args: argparse.Namespace) -> str:
    """Raises ValueError that names the damaged shards."""
    shards = read_manifest(args.directory).shards
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("verifying", total=len(shards))
        damaged = damaged_shards(args.directory, lambda: progress.advance(task))
    if damaged:
        found = "; ".join(f"{name} {reason}" for name, reason in damaged.items())
        raise ValueError(
            f"{len(damaged)} of {len(shards)} shards are damaged: {found}. Delete them and their .json files and give "
            f"the prepare command again"
        )
    return f"{len(shards)} shards, {sum(shard.tokens for shard in shards)} tokens: all as they were written"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line and exits with status 1 for input that cannot work, 130 for an interrupt."""
    args = _parser().parse_args(argv)
    try:
        print(_prepare(args) if args.command == "prepare" else _verify(args))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"data {args.command}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print(f"data {args.command}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
