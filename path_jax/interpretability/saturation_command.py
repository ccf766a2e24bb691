"""`python -m path_jax.interpretability saturation`: in which order a model decides on its best tokens or classes.

A checkpoint of a ViT or of Whisper is read by modality_command.py, any other by what reads texts.
"""

import argparse
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from path_jax.data import Batch
from path_jax.evaluation.text_model import TextModel
from path_jax.interpretability.implant_trials import ImplantReport
from path_jax.interpretability.implants import find_pairs, implant
from path_jax.interpretability.logit_lens import top_tokens
from path_jax.interpretability.modality_command import (
    PRESETS,
    Examined,
    add_modality_arguments,
    check_sources,
    examine,
    examine_digits,
    implants_of,
    model_kind,
    say,
    with_controls,
)
from path_jax.interpretability.saturation import is_early, saturation_layers, saturation_summary
from path_jax.interpretability.saturation_report import Saturated, saturation_table, write_saturation_report
from path_jax.interpretability.second_rank import second_rank
from path_jax.interpretability.strata import NOISE, file_texts, noisy_texts, standard_texts, text_batches
from path_jax.interpretability.stream_sample import StreamSample, collect_streams
from path_jax.interpretability.transitions import fit_transition_probe
from path_jax.models import DecoderLM

_PROBE_TOKENS = 2000  # whose streams a probe is fitted to
_IMPLANT_LENGTH, _IMPLANT_ROWS = 64, 16  # windows in which tokens for implants are looked for


def add_parser(commands) -> None:
    """Adds the command to those of the package."""
    parser = commands.add_parser("saturation", help="in which order the best tokens are decided, and at which layers")
    add_text_arguments(parser, PRESETS)
    add_modality_arguments(parser)
    parser.add_argument("--num-tokens", type=int, default=5000, help="of each text, or images (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=5, help="best tokens or classes to follow (default %(default)s)")
    parser.add_argument("--untrained", action="store_true", help="the same for the model with random parameters")
    parser.add_argument("--pairs", type=int, default=0, help="of tokens to implant activations between (default 0)")
    parser.add_argument("--reach", type=int, default=3, help="layers around the switch to implant at")
    parser.add_argument("--as-published", action="store_true", help="definitions of the published code, errors too")
    parser.set_defaults(command=_run)


def add_text_arguments(parser: argparse.ArgumentParser, presets: Sequence[str] = ()) -> None:
    """What commands that read texts have in common; a preset, where there are any, stands in for checkpoints."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", action="append", type=Path, help="run, published directory or .gguf; repeatable"
    )
    if presets:
        source.add_argument("--preset", choices=presets, help="trains a small ViT on digits instead")
    parser.add_argument(
        "--data", action="append", default=[], metavar="[NAME=]PATH",
        help="text file or directory; repeatable; Python's manual (prose) and library (code) without it",
    )  # fmt: skip
    parser.add_argument(
        "--noise", type=float, nargs="*", metavar="SHARE",
        help=f"also the first text with this share of random letters; without a number {' '.join(map(str, NOISE))}",
    )  # fmt: skip
    parser.add_argument("--long", type=int, metavar="LENGTH", help="also the first text in windows of so many tokens")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of samples and folds (default %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="directory of the report")


def strata(args) -> dict[str, tuple[Iterator[str], int]]:
    """{name: (texts, tokens of a window)} as the arguments say."""
    if args.data:
        named = [item.partition("=") if "=" in item else (Path(item).stem, "=", item) for item in args.data]
        readers = {name: functools.partial(file_texts, path) for name, _, path in named}
    else:
        readers = {name: lambda name=name: standard_texts()[name] for name in standard_texts()}
    found = {name: (read(), args.length) for name, read in readers.items()}
    name, read_first = next(iter(readers.items()))
    for share in NOISE if args.noise == [] else args.noise or ():
        if not 0 < share <= 1:
            raise ValueError(f"--noise={share} must be in (0, 1]")
        found[f"{name}, {share:.0%} noise"] = (noisy_texts(read_first(), share, args.seed), args.length)
    if args.long:
        found[f"{name}, {args.long} tokens"] = (read_first(), args.long)
    return found


def load(path: Path, length: int) -> TextModel:
    """A checkpoint with its vocabulary, for windows up to this length."""
    text_model = TextModel.load(path)
    limit = text_model.config.num_positions
    if limit is not None and length > limit:
        raise ValueError(f"windows of {length} tokens are more than the {limit} positions of {path}")
    return text_model


def batches_of(text_model: TextModel, texts: Iterator[str], args, *, num_tokens: int, length: int) -> list[Batch]:
    """Windows of texts in the model's vocabulary."""
    opening = text_model.encode("")
    encode = lambda text: text_model.encode(text, add_bos=False)
    # Long windows in smaller batches: the streams of a batch exist at once.
    batch_size = max(1, args.batch_size * args.length // max(length, args.length))
    return text_batches(texts, encode, num_tokens=num_tokens, length=length, batch_size=batch_size, opening=opening)


def _run(args) -> None:
    paths = args.checkpoint or []
    kinds = [model_kind(path) for path in paths]
    check_sources(args, kinds)
    analysed: dict[str, Saturated] = {}
    for name, found in examine_digits(args) if args.preset else ():
        analysed[name] = _analyse_examined(name, found, args)
    for path, kind in zip(paths, kinds):
        prefix = f"{path.name}: " if len(paths) > 1 else ""
        if kind != "text":
            for name, found in examine(path, kind, args):
                analysed[prefix + name] = _analyse_examined(prefix + name, found, args)
            continue
        text_model = load(path, max(args.length, args.long or 0))
        model, params = DecoderLM(text_model.config), text_model.params
        for name, (texts, length) in strata(args).items():
            say(f"analysing {prefix}{name}")
            batches = batches_of(text_model, texts, args, num_tokens=args.num_tokens, length=length)
            analysed[prefix + name] = _analyse(model, params, batches, args)
            if args.untrained and f"{prefix}untrained" not in analysed:
                say(f"analysing {prefix}untrained")
                random = jax.jit(model.init)(jax.random.key(args.seed), batches[0].tokens[:1, :1])["params"]
                analysed[f"{prefix}untrained"] = _analyse(model, random, batches, args)
    finish(args.output, analysed)


def finish(output: Path, analysed: Mapping[str, Saturated]) -> None:
    """Prints the table and writes the report."""
    Console().print(saturation_table(analysed))
    try:
        say(f"report: {write_saturation_report(output, analysed)}")
    except ImportError as error:
        say(f"no report.html: {error}")


def _analyse(model: DecoderLM, params, batches: list[Batch], args) -> Saturated:
    sample = collect_streams(
        model, params, batches, args.ranks, num_tokens=args.num_tokens, seed=args.seed, as_published=args.as_published
    )
    targets = np.concatenate([batch.targets for batch in batches])[sample.rows, sample.positions]
    num_layers = model.config.num_layers
    found = analyse_sample(sample, num_layers, seed=args.seed, as_published=args.as_published)
    implants = _implants(model, params, batches, args) if args.pairs else {}
    second = second_rank(sample.layers, sample.ids, targets, num_layers) if args.ranks > 1 else None
    return Saturated(num_layers, sample.layers, *found, implants, second)


def _analyse_examined(name: str, found: Examined, args) -> Saturated:
    say(f"analysing {name}")
    sample, num_layers, second = found.sample, len(found.sample.streams), None
    if found.targets is not None and len(sample.layers) > 1:
        second = second_rank(sample.layers, sample.ids, found.targets, num_layers)
    results = analyse_sample(sample, num_layers, seed=args.seed, as_published=args.as_published)
    return Saturated(num_layers, sample.layers, *results, implants_of(found, args) if args.pairs else {}, second)


def analyse_sample(sample: StreamSample, num_layers: int, *, seed: int, as_published: bool):
    """Summary, and report of a probe or None."""
    summary = saturation_summary(sample.layers, num_layers, seed=seed, as_published=as_published)
    (kept,) = np.nonzero(is_early(sample.layers, num_layers))
    kept = kept[:_PROBE_TOKENS]
    try:
        _, probe = fit_transition_probe(
            sample.streams[:, kept], sample.layers[:, kept], groups=sample.rows[kept], seed=seed,
            as_published=as_published,
        )  # fmt: skip
    except ValueError as error:
        say(f"no probe: {error}")
        probe = None
    return summary, probe


def _implants(model: DecoderLM, params, batches: list[Batch], args) -> dict[str, ImplantReport]:
    """Of the switch to deciding on the second token, and of the controls."""
    size = batches[0].tokens.shape[1] // _IMPLANT_LENGTH * _IMPLANT_LENGTH
    cut = lambda name: np.concatenate([getattr(x, name)[:, :size].reshape(-1, _IMPLANT_LENGTH) for x in batches])
    tokens, mask = cut("tokens"), cut("segment_ids")
    tokens = tokens[(mask > 0).all(axis=1)][:_IMPLANT_ROWS]
    if not len(tokens):
        say("no implants: the text has no whole window for them")
        return {}
    ids = np.asarray(top_tokens(model, params, tokens, 1).ids)
    layers = saturation_layers(ids.reshape(len(ids), -1, 1))[0].reshape(tokens.shape)
    pairs = find_pairs(layers, ids[-1, ..., 0], model.config.num_layers, max_pairs=args.pairs, seed=args.seed)
    if not len(pairs.early_row):
        say("no implants: no two tokens with one best token saturate far enough apart")
        return {}
    return with_controls(lambda control: implant(
        model, params, tokens, pairs, reach=args.reach, control=control, seed=args.seed,
        as_published=args.as_published,
    ))  # fmt: skip
