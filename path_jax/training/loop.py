"""One training run: data, steps, metrics, checkpoints, resumption.

A run can be killed at any moment and started again with the same command; it continues from its last good checkpoint as
if nothing had happened, to the bit on one machine with one mesh. SIGTERM saves first and ends with status 0.

Several processes run this code in step (see path_jax.parallel.cluster). Each reads the rows of a batch that its devices
hold and writes its own shards of a checkpoint; everything else is written by process 0, in a directory that all see.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from path_jax.checkpoints.native import Checkpointer
from path_jax.data import Batch
from path_jax.parallel import cluster
from path_jax.parallel.mesh import local_mesh
from path_jax.training.conversion import lacking, load, start_from
from path_jax.training.experiment import Experiment, check_same_experiment, prepare_workdir
from path_jax.training.goodput import Goodput
from path_jax.training.lock import owned
from path_jax.training.objectives import distillation, language_modelling, mixer_imitation
from path_jax.training.optim import make_optimizer, make_schedule
from path_jax.training.placement import GlobalBatches
from path_jax.training.preemption import Stop
from path_jax.training.profiling import ProfilerWindow
from path_jax.training.progress import StepLogger, TrainingProgress
from path_jax.training.records import Records
from path_jax.training.state import abstract_state, local_params, sharded_state
from path_jax.training.step import make_train_step
from path_jax.training.step_times import StepTimes
from path_jax.training.watchdog import HangWatchdog


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A finished, or interrupted, run."""

    step: int
    params: Any
    records: list[dict]  # of metrics.jsonl; on processes other than the first those of this launch
    interrupted: bool
    checkpoint: Path
    goodput: Goodput


def run(
    experiment: Experiment,
    workdir: str | Path,
    evaluators: Mapping[str, Callable] | None = None,
    *,
    start_time: float | None = None,
) -> RunResult:
    """Trains until `train.num_steps`, from the last good checkpoint in `workdir` if there is one.

    Args:
      evaluators: {name: params -> {metric: number}}, run every `train.eval_every` steps into evals.jsonl. With several
        processes each runs them on its own devices with the whole parameters, and process 0 writes.
      start_time: time.perf_counter() when the job started; now by default.

    Raises:
      ValueError: if `workdir` holds another configuration, is in use, or has no checkpoint that is good; if data cannot
        be read, or the last checkpoint cannot be written.
      OSError: if `workdir` cannot be written, or the processes do not match.
      FloatingPointError: at the first loss or gradient norm that is not finite; names the step and keeps the last
        checkpoint.
    """
    start_time = time.perf_counter() if start_time is None else start_time
    train, mesh, workdir = experiment.train, experiment.mesh, Path(workdir)
    check_same_experiment(workdir, experiment)
    batches = GlobalBatches(experiment.data, experiment.corpus.train, mesh)
    conversion = experiment.conversion
    optimizer = make_optimizer(experiment.optim, train.num_steps, conversion and conversion.trained)
    target = abstract_state(experiment.model, optimizer, train.seed, mesh)
    objective, frozen = _objective(experiment)
    # Before the directory is made: what cannot be loaded leaves none behind.
    source = None if (workdir / "config.json").exists() else _source(experiment, frozen, target.params)
    with contextlib.ExitStack() as stack:
        cluster.on_first(lambda: _own(workdir, experiment, stack))
        if not (workdir / "config.json").exists():
            raise OSError(
                f"process {jax.process_index()} does not see {workdir} of process 0; use a shared file system"
            )
        goodput = Goodput(workdir if cluster.is_first() else None, start_time, jax.process_count())
        checkpointer = stack.enter_context(
            Checkpointer(workdir, train.keep_checkpoints, train.keep_every, batches.shard.count)
        )
        stack.enter_context(jax.set_mesh(mesh))
        restored = checkpointer.restore_latest(target, batches.iterator)
        if restored:
            start, state = restored
        else:
            start, state = 0, sharded_state(experiment.model, optimizer, train.seed, mesh)
            if conversion:
                source = source or _source(experiment, frozen, target.params)
                state = state.replace(params=start_from(state.params, source))
        del source, restored
        shardings = jax.tree.map(lambda x: x.sharding, target)
        train_step = jax.jit(
            make_train_step(objective, optimizer, train.accumulate), donate_argnums=0, out_shardings=(shardings, None)
        )
        goodput.starts(start, workdir / "metrics.jsonl")
        steps = _Steps(experiment, workdir, start, evaluators or {}, batches, checkpointer, goodput)
        step, state = steps.run(train_step, state, frozen)
    interrupted = step < train.num_steps
    return RunResult(step, state.params, steps.records, interrupted, checkpointer.directory / str(step), goodput)


def _own(workdir: Path, experiment: Experiment, stack: contextlib.ExitStack) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(owned(workdir))
    prepare_workdir(workdir, experiment)


class _Steps:
    """The loop itself, with everything that watches it."""

    def __init__(self, experiment, workdir, start, evaluators, batches, checkpointer, goodput):
        self._experiment, self._train, self._workdir = experiment, experiment.train, workdir
        self._start, self._evaluators, self._batches = start, evaluators, batches
        self._checkpointer, self._goodput = checkpointer, goodput
        self._metrics = Records(workdir / "metrics.jsonl", start)
        self._evals = Records(workdir / "evals.jsonl", start)
        self._batch_log = Records(workdir / "batches.jsonl", start) if self._train.log_batches else None
        self.records = self._metrics.records

    def run(self, train_step: jax.stages.Wrapped, state, frozen) -> tuple[int, Any]:
        """Steps until the end or until something asks to stop; returns the last step and the state after it."""
        train, goodput, step = self._train, self._goodput, self._start
        ends = cluster.fail if train.hang_exit else None
        times = StepTimes(self._workdir, jax.process_index())
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(Stop())
            progress = stack.enter_context(TrainingProgress(train.num_steps, step, is_silent=not cluster.is_first()))
            profiler = stack.enter_context(ProfilerWindow(train, self._workdir))
            stack.callback(lambda: goodput.at(step, write=True))
            for records in filter(None, (self._metrics, self._evals, self._batch_log)):
                stack.callback(records.close)
            self._watchdog = stack.enter_context(
                HangWatchdog(self._workdir, jax.process_index(), train.hang_seconds, ends)
            )
            schedule = make_schedule(self._experiment.optim, train.num_steps)
            latest = self._checkpointer.latest_step
            logger = StepLogger(self._experiment, self._workdir, self._metrics, progress, schedule, latest)
            goodput.enter("compile")
            while step < train.num_steps and not stop.before(step):
                profiler.at(step)
                begin = time.perf_counter()
                batch = self._next_batch(step, state, logger)
                data_seconds = time.perf_counter() - begin
                if step == self._start:
                    train_step = train_step.lower(state, batch, *frozen).compile()
                    cluster.all_true(True)  # none waits in a step for one that still compiles; some give up on it early
                state, sums = train_step(state, batch, *frozen)
                if step > self._start:
                    times.add(step + 1, time.perf_counter() - begin, data_seconds)
                step += 1
                logger.add(step, sums)
                if step == self._start + 1:
                    jax.block_until_ready(sums)
                    goodput.enter("steps")
                self._watchdog.step_ended(step - 1)
                goodput.at(step - 1)
                if step % train.save_every == 0:
                    self._save(step, state, logger)
                if train.eval_every and step % train.eval_every == 0 and step < train.num_steps:
                    self._evaluate(step, state.params)
            logger.flush()
            if step > self._start:  # the end, or SIGTERM
                self._save(step, state, logger)
                times.write(step)
            with goodput.phase("checkpoint"):
                self._checkpointer.finish()
        return step, state

    def _next_batch(self, step: int, state, logger: StepLogger) -> Batch:
        """The batch after step `step`; what cannot be read ends the run, which saves first if it is one process."""
        try:
            with self._goodput.phase("data"):
                batch = next(self._batches)
        except Exception as error:  # of any reader, in threads of the loader
            if step > self._start and jax.process_count() == 1:  # the others cannot know
                self._save(step, state, logger)
                self._checkpointer.finish()
            saved = self._checkpointer.latest_step()
            kept = "nothing has been saved" if saved is None else f"step {saved} is saved"
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"batch {step + 1} cannot be read ({reason}); {kept}") from error
        if self._batch_log:
            tokens = np.asarray(multihost_utils.process_allgather(batch.tokens, tiled=True), np.int32)
            self._batch_log.append({"step": step + 1, "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()})
        return batch

    def _save(self, step: int, state, logger: StepLogger) -> None:
        logger.flush()  # metrics first: a saved step always has its records
        with self._goodput.phase("checkpoint"):
            self._checkpointer.save(step, state, self._batches.iterator)
        self._goodput.at(step, write=True)

    def _evaluate(self, step: int, params) -> None:
        with self._goodput.phase("evaluation"), self._watchdog.paused(), contextlib.ExitStack() as stack:
            if jax.process_count() > 1:
                params = local_params(params)
                stack.enter_context(jax.set_mesh(local_mesh()))
            for name, evaluate in self._evaluators.items():
                self._evals.append({"step": step, "evaluator": name} | evaluate(params))


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
