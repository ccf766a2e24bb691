"""One training run: data, steps, metrics, checkpoints, resumption.

A run can be killed at any moment and started again with the same command; it continues from its last checkpoint as if
nothing had happened, to the bit on one machine. SIGTERM saves first and ends with status 0.
"""

import dataclasses
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from path_jax.checkpoints.native import Checkpointer
from path_jax.data import make_iterator
from path_jax.metrics import MetricsFile
from path_jax.parallel.sharding import batch_sharding
from path_jax.training.conversion import lacking, load, start_from
from path_jax.training.experiment import Experiment, TrainConfig, prepare_workdir
from path_jax.training.objectives import distillation, language_modelling, mixer_imitation
from path_jax.training.optim import make_optimizer, make_schedule
from path_jax.training.progress import StepLogger, TrainingProgress
from path_jax.training.state import abstract_state, sharded_state
from path_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A finished, or interrupted, run."""

    step: int
    params: Any
    records: list[dict]  # of metrics.jsonl
    interrupted: bool
    checkpoint: Path


def run(experiment: Experiment, workdir: str | Path, evaluators: Mapping[str, Callable] | None = None) -> RunResult:
    """Trains until `train.num_steps`, from the last checkpoint in `workdir` if there is one.

    Args:
      evaluators: {name: params -> {metric: number}}, run every `train.eval_every` steps into evals.jsonl.

    Raises:
      ValueError: if `workdir` holds another configuration or a damaged checkpoint.
      OSError: if `workdir` cannot be written.
      FloatingPointError: at the first loss or gradient norm that is not finite; names the step and keeps the last
        checkpoint.
    """
    train, mesh = experiment.train, experiment.mesh
    iterator = make_iterator(
        experiment.data, experiment.corpus.train, process_index=jax.process_index(), process_count=jax.process_count()
    )
    conversion = experiment.conversion
    optimizer = make_optimizer(experiment.optim, train.num_steps, conversion and conversion.trained)
    schedule = make_schedule(experiment.optim, train.num_steps)
    target = abstract_state(experiment.model, optimizer, train.seed, mesh)
    objective, frozen = _objective(experiment)
    # Before the directory is made: what cannot be loaded leaves none behind.
    source = None if (Path(workdir) / "config.json").exists() else _source(experiment, frozen, target.params)
    workdir = prepare_workdir(Path(workdir), experiment)

    checkpointer = Checkpointer(workdir, train.keep_checkpoints)
    start = checkpointer.latest_step() or 0
    with jax.set_mesh(mesh), _StopOnSigterm() as stop:
        if start:
            state = checkpointer.restore(start, target, iterator)
        else:
            state = sharded_state(experiment.model, optimizer, train.seed, mesh)
            if conversion:
                source = source or _source(experiment, frozen, target.params)
                state = state.replace(params=start_from(state.params, source))
        del source
        shardings = jax.tree.map(lambda x: x.sharding, target)
        train_step = jax.jit(
            make_train_step(objective, optimizer, train.accumulate), donate_argnums=0, out_shardings=(shardings, None)
        )
        metrics = MetricsFile(workdir / "metrics.jsonl", start)
        evals = MetricsFile(workdir / "evals.jsonl", start)
        step = start
        try:
            with TrainingProgress(train.num_steps, start) as progress, _ProfilerWindow(train, workdir) as profiler:
                logger = StepLogger(experiment, workdir, metrics, progress, schedule, checkpointer.latest_step)
                while step < train.num_steps and not stop.requested:
                    profiler.at(step)
                    batch = jax.tree.map(
                        lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), next(iterator)
                    )
                    state, sums = train_step(state, batch, *frozen)
                    step += 1
                    logger.add(step, sums)
                    if step % train.save_every == 0:
                        logger.flush()  # metrics first: a saved step always has its records
                        checkpointer.save(step, state, iterator)
                    if train.eval_every and step % train.eval_every == 0 and step < train.num_steps:
                        for name, evaluate in (evaluators or {}).items():
                            evals.append({"step": step, "evaluator": name} | evaluate(state.params))
                logger.flush()
                if step > start:  # the end, or SIGTERM
                    checkpointer.save(step, state, iterator)
        finally:
            checkpointer.close()
            metrics.close()
            evals.close()
    interrupted = step < train.num_steps
    return RunResult(step, state.params, metrics.records, interrupted, checkpointer.directory / str(step))


def _objective(experiment: Experiment):
    """What is minimised, and what a step needs for it besides state and batch."""
    train, conversion, model = experiment.train, experiment.conversion, experiment.model
    if conversion is None or conversion.stage == "lm":
        return language_modelling(model, z_loss=train.z_loss, chunk_size=train.loss_chunk), ()
    teacher, params = load(conversion.teacher, model.config, experiment.mesh)
    if conversion.stage == "mse":
        return mixer_imitation(model, teacher), (params,)
    return distillation(model, teacher, chunk_size=train.loss_chunk), (params,)


def _source(experiment: Experiment, frozen, params):
    """What a conversion starts from: the parameters of a checkpoint, or the teacher's, which are mostly at hand."""
    conversion = experiment.conversion
    if conversion is None:
        return None
    if frozen and not conversion.start:
        return frozen[0]
    source = load(conversion.start or conversion.teacher, experiment.model.config, experiment.mesh)[1]
    if conversion.start and (missing := lacking(params, source)):
        raise ValueError(f"{conversion.start} has no {', '.join(missing)} of the model's shape")
    return source


class _ProfilerWindow:
    """Traces `profile_steps` steps from `profile_start` on into workdir/profile."""

    def __init__(self, train: TrainConfig, workdir: Path):
        self._first, self._last = train.profile_start, train.profile_start + train.profile_steps
        self._directory, self._is_tracing = str(workdir / "profile"), False

    def __enter__(self):
        return self

    def at(self, step: int) -> None:
        """Called before step `step` (counted from 0)."""
        if (self._first <= step < self._last) != self._is_tracing:
            self.__exit__() if self._is_tracing else jax.profiler.start_trace(self._directory)
            self._is_tracing = self._first <= step < self._last

    def __exit__(self, *_):
        if self._is_tracing:
            jax.profiler.stop_trace()


class _StopOnSigterm:
    """Turns SIGTERM into a request that the loop polls; only the main thread can listen."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, *_):
        self.requested = True
