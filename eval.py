"""Evaluates models: `python eval.py --checkpoint=RUN_DIR --evals=perplexity,length --output=results.json`.

Evaluators and options are those of the run's configuration unless --evals and --options say otherwise, so that the
numbers reported at the end of training are reproduced. They also say how much of --data is scored. --evals=all takes
every evaluator that applies and prints why the others do not.

The checkpoint may also be a directory or .gguf file of another code base (README, "Checkpoints of others"). Then
--evals is needed, and all of --data is scored, or 50,000 tokens of the standard library without it. Several
checkpoints, separated by commas or by repeating the flag, are compared.

    python eval.py --checkpoint=runs/a,runs/b --evals=all --report=comparison
    python eval.py --checkpoint=runs/a --evals=needle --options='{"needle": {"max_length": 32768}}'
"""

import json
import sys
from pathlib import Path

from absl import app, flags, logging
from rich.console import Console

from path_jax import report
from path_jax.checkpoints.native import read_config, restore_params
from path_jax.data import Corpus, DataConfig, documents_at, make_corpus
from path_jax.evaluation.eval_report import Evaluated, comparison_table, write_eval_report
from path_jax.evaluation.pretrained import codec_of_run, load_with_text, vocabulary_of
from path_jax.evaluation.runner import make_all_evaluators, make_evaluators, run
from path_jax.evaluation.text_codec import TextCodec
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.decoder_lm import abstract_params

_CHECKPOINT = flags.DEFINE_multi_string(
    "checkpoint", None, "Directories of runs, or published checkpoints.", required=True
)
_EVALS = flags.DEFINE_list("evals", None, "Evaluators, or all; those of the run's configuration by default.")
_OUTPUT = flags.DEFINE_string(
    "output", "results.json", "File for {evaluator: {metric: number}}, of several checkpoints {checkpoint: {...}}."
)
_REPORT = flags.DEFINE_string("report", None, "Directory for report.html; OUTPUT_report beside --output by default.")
_DATA = flags.DEFINE_string("data", None, "Text to evaluate on (file or directory) instead of the run's held-out side.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Directory or .gguf file with the vocabulary, if a run has none.")
_OPTIONS = flags.DEFINE_string("options", "{}", 'JSON that overrides options: {"perplexity": {"stride": 64}}.')
_MAX_TOKENS = 200_000  # that --evals=all scores where the configuration does not have perplexity


def _load_corpus(data: DataConfig, names) -> Corpus:
    if not _DATA.value:
        return make_corpus(data)
    if data.source == "task":
        raise ValueError(f"the run was trained on the task {data.task}, which --data={_DATA.value} cannot replace")
    heldout = documents_at(data, _DATA.value)
    # The run's own text may be gone by now, and only the byte model learns from it.
    train = make_corpus(data).train if "byte_baselines" in names else ()
    return Corpus(train, heldout, 1 + max(int(document.tokens.max()) for document in heldout))


def _load(checkpoint: Path):
    """Configuration, evaluators to make, model, parameters, text and tokenizer."""
    config = {} if checkpoint.is_file() else read_config(checkpoint)
    if "evals" in config:
        names = list(config["evals"]) if _EVALS.value is None else _EVALS.value
        model = DecoderLM(ModelConfig(**config["model"]))
        corpus = _load_corpus(DataConfig(**config["data"]), names)
        params, codec = restore_params(checkpoint, abstract_params(model.config)), codec_of_run(config)
    elif names := _EVALS.value:
        config, model, params, corpus, codec = load_with_text(checkpoint, _DATA.value)
    else:
        raise ValueError(f"{checkpoint} has no evaluators of its own; name some, as in --evals=perplexity")
    if _TOKENIZER.value:
        vocabulary = vocabulary_of(Path(_TOKENIZER.value), model.config)
        codec = TextCodec.of(vocabulary.tokenizer, model.config.vocab_size)
    return config, names, model, params, corpus, codec


def _evaluate(checkpoint: Path, overrides: dict[str, dict]) -> Evaluated:
    config, names, model, params, corpus, codec = _load(checkpoint)
    section, skipped = config["evals"], {}
    is_all = names == ["all"]
    if is_all:
        section.setdefault("perplexity", {"max_tokens": _MAX_TOKENS})
    section |= {name: section.get(name, {}) | options for name, options in overrides.items()}
    length = DataConfig(**config["data"]).sequence_length
    if is_all:
        evaluators, skipped = make_all_evaluators(section, model, corpus, length, codec=codec)
        for name, reason in skipped.items():
            print(f"skipping {name}: {reason}", file=sys.stderr)
    else:
        evaluators = make_evaluators(section, model, corpus, length, names=names, codec=codec)
    results = run(evaluators, params, on_progress=lambda name: print(f"evaluating {name}", file=sys.stderr, flush=True))
    return Evaluated(config, results, getattr(evaluators.get("length"), "losses", None), skipped)


def _labels(values: list[str]) -> dict[str, Path]:
    """Checkpoints by the shortest end of their paths that tells them apart; a path itself may contain a comma."""
    paths = [Path(x) for value in values for x in ([value] if Path(value).exists() else value.split(","))]
    paths = list(dict.fromkeys(paths))
    for size in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-size:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return dict(zip(labels, paths))


def _run() -> None:
    output = Path(_OUTPUT.value)
    if output.is_dir():
        raise ValueError(f"--output={output} is a directory; name a file")
    try:
        overrides = {name: dict(options) for name, options in json.loads(_OPTIONS.value).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--options={_OPTIONS.value} must be JSON: {{evaluator: {{option: value}}}}") from error
    evaluated = {}
    for label, checkpoint in (checkpoints := _labels(_CHECKPOINT.value)).items():
        if len(checkpoints) > 1:
            print(f"checkpoint {label}", file=sys.stderr, flush=True)
        evaluated[label] = _evaluate(checkpoint, overrides)

    results = {label: item.results for label, item in evaluated.items()}
    results = results if len(results) > 1 else next(iter(results.values()))
    output.parent.mkdir(parents=True, exist_ok=True)
    report.write_file(output, (json.dumps(results, indent=2) + "\n").encode())
    Console().print(comparison_table(evaluated))
    directory = Path(_REPORT.value) if _REPORT.value else output.with_name(f"{output.stem}_report")
    try:
        print(f"report: {write_eval_report(directory, evaluated)}", file=sys.stderr)
    except ImportError as error:
        print(f"no report.html: {error}", file=sys.stderr)


def main(_) -> None:
    """Prints one line and exits with status 1 for input that cannot work."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns about metadata that parameters alone do not have
    try:
        _run()
    except (ValueError, OSError, NotImplementedError, ImportError) as error:  # FileNotFoundError is an OSError
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    app.run(main)
