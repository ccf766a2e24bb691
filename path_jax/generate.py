"""Writes text: `python -m path_jax.generate --checkpoint=DIR_OR_FILE --prompt="Once upon a time"`.

The checkpoint is a run directory of train.py, or a published one (README, "Checkpoints of others"). Tokens appear as
they are generated. A file of prompts, one per line, is continued as one batch and printed when it is done.

With --exit-rule, a file of `python -m path_jax.interpretability early-exit`, tokens may leave the model early. A
monitor compares a tenth of those with full depth, and ends exits once more than --exit-limit of them surely differ.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging

from path_jax.checkpoints import load_pretrained
from path_jax.data import ByteTokenizer
from path_jax.evaluation.pretrained import vocabulary_of
from path_jax.interpretability.exit_monitor import ExitMonitor
from path_jax.interpretability.exit_rules import load_rule
from path_jax.models import DecoderLM
from path_jax.models.config import DTYPES
from path_jax.models.early_exit import generate_with_exits
from path_jax.models.generate import generate


class Stream:
    """Prints a growing text: what new ids add to it, once they make whole characters."""

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], object]):
        """With a function from ids to their text, and one that prints."""
        self._decode, self._write = decode, write
        self._last: list[int] = []  # the ids printed last: a decoder may read the first of a text differently
        self._new: list[int] = []

    def add(self, token: int) -> None:
        """Takes the next id."""
        self._new.append(token)
        text = self._decode(self._last + self._new)
        if not text.endswith("\ufffd"):  # a character may be spread over several ids
            self._write(text[len(self._decode(self._last)) :])
            self._last, self._new = self._new, []

    def close(self) -> None:
        """Prints what is left."""
        self._write(self._decode(self._last + self._new)[len(self._decode(self._last)) :])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m path_jax.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run directory, published directory or .gguf file"
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", default="", help="text to continue; without one, a new text")
    text.add_argument("--prompts", type=Path, help="file with one prompt per line, continued together")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="per prompt (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="sample among the fewest tokens with this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="of parameters, computation and cache (default: float32)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end of the text")
    parser.add_argument("--exit-rule", type=Path, help="rule by which tokens leave early")
    parser.add_argument("--exit-limit", type=float, default=0.02, help="share that may differ (default: %(default)s)")
    return parser


def run(args: argparse.Namespace, write: Callable[[str], object]) -> None:
    """Generates as the parsed arguments say; `write` prints."""
    config, params = load_pretrained(args.checkpoint, args.dtype)
    tokenizer, stop_tokens = vocabulary_of(args.checkpoint, config)
    texts = [args.prompt] if args.prompts is None else args.prompts.read_text().splitlines()
    if not texts:
        raise ValueError(f"{args.prompts} has no prompts")
    is_opened = isinstance(tokenizer, ByteTokenizer) and config.vocab_size == tokenizer.vocab_size
    opener = stop_tokens[:1] if is_opened else ()
    prompts = [[*opener, *tokenizer.encode(text).tolist()] or list(stop_tokens[:1]) for text in texts]
    if not all(prompts):
        raise ValueError("the prompt is empty, and the checkpoint names no token to start a text with")
    stream = Stream(tokenizer.decode, write)
    times = [time.perf_counter()]  # before the first token and after every one

    def on_token(tokens, running):
        times.append(time.perf_counter())
        if args.prompts is None and tokens[0] not in stop_tokens:
            stream.add(int(tokens[0]))

    if args.prompts is None:
        write(args.prompt)
    options = dict(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        rng=jax.random.key(args.seed), on_token=on_token,
        stop_token=None if args.ignore_eos or not stop_tokens else stop_tokens,
    )  # fmt: skip
    if args.exit_rule is None:
        out = generate(DecoderLM(config), params, prompts, **options)
    else:
        out = _generate_early(config, params, prompts, args, options)
    if args.prompts is None:
        stream.close()
        write("\n")
    else:
        for text, prompt, row in zip(texts, prompts, np.asarray(out)):
            new = row[len(prompt) : len(prompt) + args.max_new_tokens]
            end = next((i for i, token in enumerate(new) if token in stop_tokens and not args.ignore_eos), len(new))
            write(f"{text}{tokenizer.decode(new[:end])}\n")
    # A step is compiled for the second token.
    rate = len(prompts) * (len(times) - 3) / (times[-1] - times[2]) if len(times) > 3 else None
    speed = f", {rate:.1f} tokens/s from the second on" if rate else ""
    print(f"first token after {times[1] - times[0]:.1f} s, compilation included{speed}", file=sys.stderr)


def _generate_early(config, params, prompts, args: argparse.Namespace, options):
    """The tokens; says on stderr how deep they were."""
    rule, exit_layers = load_rule(args.exit_rule)
    if not exit_layers:
        print(f"{args.exit_rule} has no exit that pays: all layers for all tokens", file=sys.stderr)
        return generate(DecoderLM(config), params, prompts, **options)
    monitor = ExitMonitor(args.exit_limit, seed=args.seed)
    out = generate_with_exits(
        DecoderLM(config), params, prompts, rule=rule, exit_layers=exit_layers, monitor=monitor, **options
    )
    depths = out.depths[:, 1:][out.depths[:, 1:] > 0]
    low, high = monitor.bounds
    print(
        f"{depths.mean() if depths.size else config.num_layers:.1f} of {config.num_layers} layers a token; "
        f"{monitor.num_different} of {monitor.num_checked} compared differ, 95 % bounds {low:.1%} ... {high:.1%}"
        + (": exits were ended" if monitor.is_tripped else ""),
        file=sys.stderr,
    )
    return out.tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line and exits with status 1 for input that cannot work."""
    args = _parser().parse_args(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax warns about metadata that parameters alone do not have

    def write(text):
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        run(args, write)
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        sys.exit(f"generate: {error}")


if __name__ == "__main__":
    main()
