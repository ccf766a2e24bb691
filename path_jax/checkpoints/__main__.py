"""Converts checkpoints: `python -m path_jax.checkpoints convert SRC DST --format=fla|fox|hf|native`.

SRC is a run directory, a directory with config.json and safetensors files (flash-linear-attention PaTH or Forgetting
Transformer, official Forgetting Transformer, Hugging Face llama or gpt2), or a .gguf file of the llama architecture.
DST is a new directory.
"""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from rich.console import Console
from rich.progress import Progress

from path_jax.checkpoints.dialects import FORMATS, find_dialect
from path_jax.checkpoints.folders import member, new_directory, read_json
from path_jax.checkpoints.gguf import GgufFile
from path_jax.checkpoints.hf import load_pretrained, save_pretrained
from path_jax.data import vocabulary_tokenizer
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.config import DTYPES
from path_jax.models.stacking import stack_layers

TOLERANCE = 1e-4  # of logits; the same parameters should compute the same bits
_STEPS = ("reading", "writing", "reading back", "comparing logits")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "generation_config.json",
)  # fmt: skip
# Keys of config.json that a tokenizer or a generator needs, in every format.
_SHARED_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range")


def convert(
    source: Path,
    destination: Path,
    format: str,
    dtype: str | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> float:
    """Writes the checkpoint `source` into the new directory `destination`.

    The tokenizer goes with it. The copy is read back and compared on random tokens before it appears under its name, so
    a failure leaves nothing behind.

    Args:
      source: What `load_pretrained` loads.
      destination: A directory that does not exist or is empty.
      format: See `save_pretrained`.
      dtype: Of the parameters; float32 by default.
      on_step: Called with the name of each step before it starts.

    Returns:
      The largest difference of a logit between source and copy.

    Raises:
      FileExistsError: if the destination holds something.
      ValueError: if the source cannot be loaded, or the format cannot hold it, or the copy computes something else.
    """
    with new_directory(destination) as directory:
        on_step(_STEPS[0])
        config, params = load_pretrained(source, dtype)
        on_step(_STEPS[1])
        save_pretrained(directory, config, params, format, extra=_extra_keys(source, format))
        _copy_tokenizer(source, directory)
        on_step(_STEPS[2])
        copy_config, copy = load_pretrained(directory, dtype)
        on_step(_STEPS[3])
        difference = max_logit_difference(config, params, copy_config, copy)
        if not difference <= TOLERANCE:
            raise ValueError(f"the copy computes other logits: they differ by {difference:.3g}, more than {TOLERANCE}")
    return difference


def max_logit_difference(
    config: ModelConfig, params: Mapping[str, Any], other_config: ModelConfig, other: Mapping[str, Any]
) -> float:
    """Returns the largest absolute difference of the logits of two models on two rows of random tokens."""
    length = min(64, config.num_positions or 64)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length), dtype=np.int32)

    @jax.jit
    def difference(params, other):
        # Scanned, because compiling every layer takes long.
        logits = [
            DecoderLM(dataclasses.replace(c, scan_layers=True)).apply({"params": stack_layers(p)}, tokens).logits
            for c, p in ((config, params), (other_config, other))
        ]
        return jnp.max(jnp.abs(logits[0] - logits[1]))

    return float(difference(params, other))


def _extra_keys(source: Path, format: str) -> dict[str, Any]:
    """What goes into the new config.json unchanged: everything within a format, a few keys otherwise."""
    if format == "native" or not source.is_dir():
        return {}
    raw = read_json(member(source, "config.json"))
    if "model_type" in raw and find_dialect(raw).format == format:
        return raw
    return {key: raw[key] for key in _SHARED_KEYS if key in raw}


def _copy_tokenizer(source: Path, directory: Path) -> None:
    if source.is_dir():
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(member(source, name), directory / name)
        return
    with GgufFile(source) as file:
        vocabulary = file.vocabulary()
    if vocabulary:
        vocabulary_tokenizer(**vocabulary).save(directory / "tokenizer.json")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m path_jax.checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "convert",
        help="write a checkpoint in another format and compare the logits of both",
        description="Writes SRC in another format into DST, reads it back, compares logits on random tokens and prints "
        "the largest difference. Nothing is left in DST if anything fails.",
        epilog="example: python -m path_jax.checkpoints convert SmolLM2-135M.gguf smollm2 --format=hf",
    )
    command.add_argument("source", metavar="SRC", type=Path, help="directory with config.json, or .gguf file")
    command.add_argument("destination", metavar="DST", type=Path, help="directory that does not exist or is empty")
    command.add_argument(
        "--format",
        required=True,
        choices=(*FORMATS, "native"),
        help="fla: flash-linear-attention; fox: official Forgetting Transformer; hf: Hugging Face llama or gpt2, as "
        "the model is; native: a run directory",
    )
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the parameters written (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Prints the largest difference of a logit; exits with one line and status 1 for input that cannot work."""
    options = _parse(arguments)
    logging.set_verbosity(logging.ERROR)  # Orbax warns about metadata that parameters alone do not have
    try:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("starting", total=len(_STEPS))
            on_step = lambda name: progress.update(task, description=name, completed=_STEPS.index(name))
            difference = convert(options.source, options.destination, options.format, options.dtype, on_step)
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        sys.exit(f"path_jax.checkpoints: {str(error).splitlines()[0]}")
    print(f"{options.destination}: max |logit difference| {difference:.3g}")


if __name__ == "__main__":
    main(sys.argv[1:])
