"""Evaluates a model: `python eval.py --checkpoint=RUN_DIR --evals=perplexity,length --output=results.json`.

Evaluators and options are those of the run's configuration unless --evals and --options say otherwise, so that the
numbers reported at the end of training are reproduced. They also say how much of --data is scored.

The checkpoint may also be a directory or .gguf file of another code base (README, "Checkpoints of others"). Then
--evals is needed, and all of --data is scored, or 50,000 tokens of the standard library without it.
"""

import json
import sys
from pathlib import Path

from absl import app, flags, logging
from rich.console import Console

from path_jax import report
from path_jax.checkpoints.native import read_config, restore_params
from path_jax.data import Corpus, DataConfig, file_documents, make_corpus, token_file_documents
from path_jax.evaluation.pretrained import load_with_text
from path_jax.evaluation.run_report import length_curve, results_table
from path_jax.evaluation.runner import make_evaluators, run
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.decoder_lm import abstract_params

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of the run, or a published checkpoint.", required=True)
_EVALS = flags.DEFINE_list("evals", None, "Evaluators; those of the run's configuration by default.")
_OUTPUT = flags.DEFINE_string("output", "results.json", "File for {evaluator: {metric: number}}.")
_DATA = flags.DEFINE_string("data", None, "Text to evaluate on (file or directory) instead of the run's held-out side.")
_OPTIONS = flags.DEFINE_string("options", "{}", 'JSON that overrides options: {"perplexity": {"stride": 64}}.')


def _load_corpus(data: DataConfig, names) -> Corpus:
    if not _DATA.value:
        return make_corpus(data)
    if data.source == "task":
        raise ValueError(f"the run was trained on the task {data.task}, which --data={_DATA.value} cannot replace")
    is_tokens = data.source == "tokens"
    heldout = token_file_documents(_DATA.value, data.bos_id) if is_tokens else file_documents(_DATA.value)
    # The run's own text may be gone by now, and only the byte model learns from it.
    train = make_corpus(data).train if "byte_baselines" in names else ()
    return Corpus(train, heldout, 1 + max(int(document.tokens.max()) for document in heldout))


def _load_run(workdir: Path, config: dict, names: list[str]):
    model = DecoderLM(ModelConfig(**config["model"]))
    corpus = _load_corpus(DataConfig(**config["data"]), names)
    return model, restore_params(workdir, abstract_params(model.config)), corpus


def _evaluate() -> None:
    output = Path(_OUTPUT.value)
    if output.is_dir():
        raise ValueError(f"--output={output} is a directory; name a file")
    try:
        overrides = {name: dict(options) for name, options in json.loads(_OPTIONS.value).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--options={_OPTIONS.value} must be JSON: {{evaluator: {{option: value}}}}") from error
    checkpoint = Path(_CHECKPOINT.value)
    config = {} if checkpoint.is_file() else read_config(checkpoint)
    if "evals" in config:
        names = list(config["evals"]) if _EVALS.value is None else _EVALS.value
        model, params, corpus = _load_run(checkpoint, config, names)
    elif names := _EVALS.value:
        config, model, params, corpus = load_with_text(checkpoint, _DATA.value)
    else:
        raise ValueError(f"{checkpoint} has no evaluators of its own; name some, as in --evals=perplexity")
    section = config["evals"]
    section |= {name: section.get(name, {}) | options for name, options in overrides.items()}
    evaluators = make_evaluators(section, model, corpus, DataConfig(**config["data"]).sequence_length, names=names)
    output.parent.mkdir(parents=True, exist_ok=True)

    results = run(evaluators, params, on_progress=lambda name: print(f"evaluating {name}", file=sys.stderr, flush=True))
    report.write_file(output, (json.dumps(results, indent=2) + "\n").encode())
    Console().print(results_table(results))
    if curve := length_curve(config, results.get("length", {})):
        try:
            report.write_image(output.with_suffix(".png"), [curve])
        except ImportError as error:
            print(f"no figure: {error}", file=sys.stderr)


def main(_) -> None:
    """Prints one line and exits with status 1 for input that cannot work."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns about metadata that parameters alone do not have
    try:
        _evaluate()
    except (ValueError, OSError, NotImplementedError, ImportError) as error:  # FileNotFoundError is an OSError
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    app.run(main)
