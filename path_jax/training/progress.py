"""What a run says while it runs: a bar on a terminal (a line every few seconds elsewhere) and one record per step."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from path_jax.metrics import first_bad, means, peak_flops
from path_jax.models.decoder_lm import count_parameters
from path_jax.parallel import cluster
from path_jax.training.experiment import Experiment
from path_jax.training.records import Records

_LINE_SECONDS = 10.0


class TrainingProgress:
    """Context manager; `update` after every step. Says nothing if `is_silent`."""

    def __init__(self, num_steps: int, start: int, is_silent: bool = False):
        self._num_steps, self._start, self._is_silent = num_steps, start, is_silent
        self._begin = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty() and not is_silent:
            columns = (
                "step {task.completed}/{task.total}",
                "loss {task.fields[loss]:.3f}",
                "{task.fields[rate]:,.0f} tokens/s",
            )
            self._bar = Progress(
                BarColumn(), *map(TextColumn, columns), TimeElapsedColumn(), "ETA", TimeRemainingColumn(),
                console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task("train", total=num_steps, completed=start, loss=float("nan"), rate=0.0)

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Reports step `step` (counted from 1)."""
        if self._bar:
            self._bar.update(self._task, completed=step, loss=loss, rate=tokens_per_second)
            return
        now = time.monotonic()
        if self._is_silent:
            return
        if now - self._last_line >= _LINE_SECONDS or step == self._num_steps:
            self._last_line = now
            left = (now - self._begin) / max(step - self._start, 1) * (self._num_steps - step)
            print(
                f"step {step}/{self._num_steps}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  ETA {left:.0f} s",
                file=sys.stderr,
                flush=True,
            )


class StepLogger:
    """Writes one record per step, one step behind the device so that neither waits for the other."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        metrics: Records,
        progress: TrainingProgress,
        schedule: Callable[[int], float],
        latest_checkpoint: Callable[[], int | None],
    ):
        self._metrics, self._progress = metrics, progress
        self._schedule, self._latest_checkpoint = schedule, latest_checkpoint
        self._pending = None
        self._tokens_per_step = experiment.data.batch_size * experiment.data.sequence_length
        model_config = experiment.model.config
        flops = model_config.train_flops_per_token(count_parameters(model_config), experiment.data.sequence_length)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak_tokens_per_second = peak and peak * jax.device_count() / flops
        self._writer = None
        if experiment.train.tensorboard and cluster.is_first():
            from tensorboardX import SummaryWriter  # noqa: PLC0415 -- extra [tensorboard]

            self._writer = SummaryWriter(str(workdir / "tensorboard"))
        self._clock = time.perf_counter()

    def add(self, step: int, sums) -> None:
        """Takes the metrics of a step just dispatched; records the step before."""
        self.flush()
        self._pending = (step, sums)

    def flush(self) -> None:
        """Waits for the last step and records it."""
        if self._pending is None:
            return
        (step, sums), self._pending = self._pending, None
        record = means(sums)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        bad = first_bad(record)
        if bad:
            saved = self._latest_checkpoint()
            raise FloatingPointError(
                f"{bad} is {record[bad]} at step {step}; "
                + (
                    "there is no checkpoint yet"
                    if saved is None
                    else f"the last good checkpoint is that of step {saved}"
                )
            )
        rate = self._tokens_per_step / seconds
        record |= {
            "learning_rate": float(self._schedule(step - 1)),
            "tokens": step * self._tokens_per_step,
            "step_seconds": seconds,
        }
        if self._peak_tokens_per_second:
            record["model_flops_utilisation"] = rate / self._peak_tokens_per_second
        self._metrics.append({"step": step} | record)
        if self._writer:
            for name, value in record.items():
                self._writer.add_scalar(name, value, step)
        self._progress.update(step, record["loss"], rate)
