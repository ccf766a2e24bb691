"""Analyses what models have learned: `python -m path_jax.interpretability COMMAND --checkpoint=RUN --output=DIR`.

recall: trains models on associative recall or takes finished ones, and finds by interventions which tokens and parts
carry the association. DIR/report.html has tables, heat maps and curves over training; behaviour.csv and attribution.csv
the numbers.

    python -m path_jax.interpretability recall --preset=small --output=runs/recall_small
    python -m path_jax.interpretability recall --config=configs/recall.py:task=ar,mixer=mamba --output=runs/ar_mamba
    python -m path_jax.interpretability recall --checkpoint='runs/ar/runs/*' --output=runs/ar/report

--config trains in DIR/run, or goes on there. --checkpoint takes directories of runs on the tasks ar, atr and records,
those of a sweep for example, separated by commas, with * and ?.

saturation: at which layer each of the best tokens is decided, in which order, and whether the residual stream shows
which one is being decided. DIR/report.html, saturation.csv.

    python -m path_jax.interpretability saturation --checkpoint=runs/quickstart --untrained --output=runs/saturation

early-exit: fits rules by which tokens leave early, chooses thresholds for a share of tokens that may differ, tests them
on other text and measures generation. DIR/report.html, early_exit.csv, and DIR/RULE.npz for path_jax.generate.

    python -m path_jax.interpretability early-exit --checkpoint=runs/quickstart --target=0.01 --output=runs/early_exit
"""

import argparse
import glob
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from rich.console import Console

from path_jax.checkpoints.native import read_config, restore_params
from path_jax.data import DataConfig, as_batch, make_corpus
from path_jax.data.query_document import QueryTask
from path_jax.interpretability import exit_command, saturation_command
from path_jax.interpretability.hooks import Site
from path_jax.interpretability.recall import analyse_recall, decode_state_bytes, mixer_parts
from path_jax.interpretability.recall_report import Analysed, recall_table, write_recall_report
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.decoder_lm import abstract_params
from path_jax.run import train_and_report
from path_jax.sweep import Run, resolve
from path_jax.training.objectives import language_modelling

# Mixers that --preset=small trains, with learning rates at which they recall after some minutes.
_SMALL = {"attention": "1e-3", "path": "3e-3", "mamba": "3e-3"}


def _analyse(run: Path, num_examples: int) -> Analysed:
    """Analyses the finished model of a run, and the second layer's input at the checkpoints before."""
    config = read_config(run)
    model = DecoderLM(ModelConfig(**config["model"]))
    task = getattr(make_corpus(data := DataConfig(**config["data"])).heldout, "task", None)
    if not isinstance(task, QueryTask):
        raise ValueError(f"{run} was not trained on documents with one question: data.task ar, atr or records")
    seed = 2 * data.seed + 1
    abstract = abstract_params(model.config)
    steps = sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())
    history = {}
    if len(steps) > 1 and model.config.num_layers > 1:
        for step in steps[:-1]:
            params = restore_params(run, abstract, step)
            history[step] = analyse_recall(
                model, params, task,
                seed=seed, num_examples=num_examples, patched=[Site(1, "resid_pre")], corrupted=["key"],
            )  # fmt: skip
    params = restore_params(run, abstract)
    analysis = analyse_recall(
        model, params, task, seed=seed, num_examples=num_examples, parts=mixer_parts(model.config)
    )
    history |= {steps[-1]: analysis} if history else {}
    costs = {"parameters": sum(x.size for x in jax.tree.leaves(params))}
    if (run / "summary.json").exists():
        costs["tokens_per_second"] = json.loads((run / "summary.json").read_text())["tokens_per_second"]
    costs["step_bytes"] = _step_bytes(model, params, task, data.batch_size)
    costs["decode_state_bytes"] = decode_state_bytes(model.config, task.length)
    return Analysed(config, analysis, costs, history)


def _step_bytes(model: DecoderLM, params, task: QueryTask, batch_size: int) -> int:
    """Bytes that the forward and backward pass of a training step keep for themselves on this machine, at most."""
    batch = as_batch(task.examples(0, np.arange(batch_size)))
    gradient = jax.jit(jax.grad(language_modelling(model), has_aux=True))
    return gradient.lower(params, batch, None).compile().memory_analysis().temp_size_in_bytes


def _train(config: Mapping[str, Any], workdir: Path) -> None:
    if train_and_report(config, workdir) is None:
        raise InterruptedError(f"stopped; the same command goes on in {workdir}")


def _runs(args) -> dict[str, Path]:
    """Directories of finished runs by label, trained first where asked for."""
    if args.checkpoint:
        # Folders of sweeps have commas in their names.
        parts = [args.checkpoint] if glob.glob(args.checkpoint) else args.checkpoint.split(",")
        found = [Path(x) for part in parts for x in sorted(glob.glob(part)) or [part]]
        return {path.name if len({p.name for p in found}) == len(found) else str(path): path for path in found}
    if args.config:
        wanted = {"run": args.config}
    else:
        wanted = {mixer: f"configs/recall.py:task=ar,size=small,mixer={mixer},lr={lr}" for mixer, lr in _SMALL.items()}
    runs = {label: args.output / label for label in wanted}
    for label, config in wanted.items():
        print(f"training {label}", file=sys.stderr, flush=True)
        _train(resolve(config, Run("runs", (), 1.0)), runs[label])
    return runs


def _recall(args) -> None:
    analysed = {}
    for label, run in _runs(args).items():
        print(f"analysing {label}", file=sys.stderr, flush=True)
        analysed[label] = _analyse(run, args.num_examples)
    Console().print(recall_table(analysed))
    try:
        print(f"report: {write_recall_report(args.output, analysed)}", file=sys.stderr)
    except ImportError as error:
        print(f"no report.html: {error}", file=sys.stderr)


def main(arguments=None) -> None:
    """Command line; input that cannot work ends in one line."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns about metadata that parameters alone do not have
    parser = argparse.ArgumentParser(
        prog="python -m path_jax.interpretability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    recall = commands.add_parser("recall", help="which tokens and parts carry an association")
    source = recall.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", choices=["small"], help=f"trains {', '.join(_SMALL)} for some minutes")
    source.add_argument("--config", help="configuration file of a run to train, with its arguments behind a colon")
    source.add_argument("--checkpoint", help="directories of finished runs")
    recall.add_argument("--output", type=Path, required=True, help="directory of the report, and of runs it trains")
    recall.add_argument("--num-examples", type=int, default=320, help="documents to analyse (default %(default)s)")
    recall.set_defaults(command=_recall)
    saturation_command.add_parser(commands)
    exit_command.add_parser(commands)
    args = parser.parse_args(arguments)
    try:
        args.command(args)
    except (ValueError, OSError, NotImplementedError, ImportError, FloatingPointError) as error:
        sys.exit(f"path_jax.interpretability: {error}")


if __name__ == "__main__":
    main()
