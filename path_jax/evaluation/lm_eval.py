"""Standard benchmarks: `python -m path_jax.evaluation.lm_eval --checkpoint=DIR_OR_FILE --tasks=hellaswag,piqa`.

An adapter for EleutherAI's lm-evaluation-harness (extra [eval], which needs neither PyTorch nor transformers), and a
command that runs its tasks: those it ships, whose data it downloads, and those of YAML files in --include-path, which
may read local files. The checkpoint is a run directory, a published directory or a .gguf file. Examples are in
docs/standard_benchmarks.md. Not supported: chat templates, images, several processes.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from path_jax import report
from path_jax.evaluation.text_model import TextModel
from path_jax.models.config import DTYPES

_MISSING = "this needs the package lm-eval; run: pip install path-jax[eval]"
try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    if __name__ == "__main__":
        sys.exit(f"lm_eval: {_MISSING}")
    raise ImportError(_MISSING) from error

# Parts of the harness's results that are written.
_KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "n-shot",
    "n-samples",
    "versions",
    "higher_is_better",
    "configs",
    "samples",
)
# Generation options that change nothing at these values.
_NEUTRAL = dict(num_beams=1, repetition_penalty=1.0, use_cache=True)


class PathLM(TemplateLM):
    """The harness's view of a `TextModel`.

    Contexts and continuations are tokenized, cut from the left and scored as the harness's own Hugging Face models are.
    Two things differ for models of bytes: they open every text with their document opener unless told otherwise, and
    the opener is no target of `loglikelihood_rolling`.

    Args:
      model: The model.
      show_progress: Draws a bar on standard error.
    """

    def __init__(self, model: TextModel, *, show_progress: bool = False):
        super().__init__()
        self._model, self._show_progress = model, show_progress

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or else the one that opens it."""
        return self._model.end_ids[0] if self._model.end_ids else self._model.need_prefix()

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self._model.need_prefix()

    @property
    def max_length(self) -> int:
        """Inputs per forward pass."""
        return self._model.max_length

    @property
    def tokenizer_name(self) -> str:
        """Tells vocabularies apart where the harness caches requests."""
        return f"path_jax-{type(self._model.tokenizer).__name__}-{self._model.config.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Returns the ids of `string`; see `TextModel.encode`."""
        return self._model.encode(string, add_bos=add_special_tokens)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """Scores requests (strings, context ids, continuation ids)."""
        with self._progress("scoring", len(requests), disable_tqdm) as advance:
            scores = self._model.score([(context, continuation) for _, context, continuation in requests], advance)
        for (strings, _, _), score in zip(requests, scores):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, tuple(score))
        return [tuple(score) for score in scores]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns log p of whole texts, by windows of `max_length` that do not overlap but for the last."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self._model.encode(*request.args, add_bos=False if self._model.reads_bytes else None)
            found = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs = [(None, *make_disjoint_window(window)) for window in found]
            windows += pairs
            owners += [index] * len(pairs)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[index] += value
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Returns continuations, greedy unless a request samples (temperature, top_k, top_p; the seed is 0)."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        with self._progress("generating", len(requests), disable_tqdm) as advance:
            for indices in groups.values():
                options = _generation_options(requests[indices[0]].args[1])
                prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in indices]
                for index, text in zip(indices, self._model.complete(prompts, on_progress=advance, **options)):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the results say about the model."""
        sizes = [x.size for x in jax.tree.leaves(self._model.params)]
        return dict(model_num_parameters=sum(sizes), model_dtype=self._model.config.dtype, max_length=self.max_length)

    def _progress(self, label: str, total: int, is_disabled: bool) -> "_Bar":
        return _Bar(label, total, disable=is_disabled or not self._show_progress)


class _Bar(Progress):
    """A bar on standard error; `with` gives the function that advances it."""

    def __init__(self, label: str, total: int, disable: bool):
        super().__init__(*Progress.get_default_columns(), console=Console(stderr=True), disable=disable)
        self._task = self.add_task(label, total=total)

    def __enter__(self):
        super().__enter__()
        return lambda count: self.advance(self._task, count)


def _generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `TextModel.complete` for a request's generation options."""
    from lm_eval.models.utils import normalize_gen_kwargs

    options = normalize_gen_kwargs(given, default_max_gen_toks=256)
    stop = options.pop("until", None) or []
    arguments = dict(max_new_tokens=options.pop("max_gen_toks"), stop=[stop] if isinstance(stop, str) else stop)
    temperature = options.pop("temperature", None)
    sampled = {key: options.pop(key, None) for key in ("top_k", "top_p")}
    if options.pop("do_sample", False):
        arguments |= sampled | dict(temperature=1.0 if temperature is None else temperature, rng=jax.random.key(0))
    unknown = {key: value for key, value in options.items() if _NEUTRAL.get(key, ...) != value}
    if unknown:
        raise ValueError(f"a task asks for the generation options {unknown}, which are not supported")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m path_jax.evaluation.lm_eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run or published directory, or .gguf file")
    parser.add_argument("--tasks", required=True, help="names of tasks, groups or tags, with commas between")
    parser.add_argument("--include-path", type=Path, action="append", default=[], help="directory of task YAML files")
    parser.add_argument("--num-fewshot", type=int, help="solved examples before each question (default: the task's)")
    parser.add_argument("--limit", type=float, help="documents per task, or their share if below 1 (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per forward pass (default: %(default)s)")
    parser.add_argument("--max-length", type=int, help="tokens per forward pass (default: what the checkpoint states)")
    parser.add_argument("--dtype", choices=DTYPES, help="of parameters and computation (default: float32)")
    parser.add_argument(
        "--add-bos", action=argparse.BooleanOptionalAction, help="opening token (default: the vocabulary's rule)"
    )
    parser.add_argument("--prefix-token-id", type=int, help="stands for an empty context (default: the opening token)")
    parser.add_argument(
        "--bootstrap-iters",
        type=int,
        default=1000,
        help="for standard errors of metrics that are no means (default: %(default)s)",
    )
    parser.add_argument("--log-samples", action="store_true", help="write every document's scores too")
    parser.add_argument("--output", type=Path, default=Path("results.json"), help="JSON file (default: %(default)s)")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates as the parsed arguments say, and writes and returns the results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    if args.output.is_dir():
        raise ValueError(f"--output={args.output} is a directory; name a file")
    if args.limit is not None and args.limit <= 0:
        raise ValueError(f"--limit={args.limit:g} must be above 0")
    for path in args.include_path:
        if not path.is_dir():
            raise ValueError(f"--include-path={path} is not a directory")
    manager = TaskManager(include_path=[str(path) for path in args.include_path] or None)
    names = [name for name in args.tasks.split(",") if name]
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise ValueError(
            f"unknown tasks {', '.join(unknown) or '(none given)'}; `lm-eval ls tasks` lists those it ships"
        )
    model = TextModel.load(
        args.checkpoint, args.dtype, max_length=args.max_length, prefix_id=args.prefix_token_id, add_bos=args.add_bos,
        batch_size=args.batch_size,
    )  # fmt: skip
    found = simple_evaluate(
        PathLM(model, show_progress=True), tasks=names, task_manager=manager, num_fewshot=args.num_fewshot,
        limit=args.limit, batch_size=args.batch_size, bootstrap_iters=args.bootstrap_iters,
        log_samples=args.log_samples,
    )  # fmt: skip
    results = {key: found[key] for key in _KEPT if key in found}
    results["config"] = found["config"] | dict(checkpoint=str(args.checkpoint))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    report.write_file(args.output, (text + "\n").encode())
    return results


def results_table(results: dict[str, Any]) -> Table:
    """Returns the metrics of every task and group as a table."""
    table = Table("task", "n-shot", "filter", "metric", "value", "standard error")
    for name, metrics in {**results["results"], **results.get("groups", {})}.items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            error = report.format_value(error) if isinstance(error, float) else ""
            shots = str(results.get("n-shot", {}).get(name, ""))
            table.add_row(name, shots, chosen, metric, report.format_value(value), error)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line and exits with status 1 for input that cannot work."""
    args = _parser().parse_args(argv)
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns about metadata that parameters alone do not have
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        results = run(args)
    except (ValueError, OSError, NotImplementedError, ImportError) as error:  # ConnectionError is an OSError
        sys.exit(f"lm_eval: {error}")
    Console().print(results_table(results))


if __name__ == "__main__":
    main()
