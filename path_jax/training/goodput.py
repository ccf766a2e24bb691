"""Where the wall time of a run goes, over all of its launches."""

import contextlib
import json
import os
import time
from pathlib import Path

from path_jax.metrics import read_metrics

PHASES = ("initialisation", "compile", "data", "steps", "checkpoint", "evaluation")
_WRITE_SECONDS = 30.0


class Goodput:
    """Divides the time since `start` into phases; exactly one runs at a time, so they add up to the wall time.

    initialisation: until the first step is dispatched, with everything that is read and restored before.
    compile: the first step, which compiles.
    data, checkpoint, evaluation: while the loop waits for them; steps: the rest.

    workdir/goodput.json holds one record per launch: the phases in seconds, `first_step` and `last_step`, `processes`,
    and how many steps of earlier launches it did again (`redone_steps`, `redone_seconds`), because they had ended after
    the checkpoint it started from. Time between launches is not counted. Clocks are monotonic.

    Args:
      workdir: of the run; None to keep the record in memory, as processes other than the first do.
      start: time.perf_counter() when the job started.
    """

    def __init__(self, workdir: Path | None, start: float, processes: int = 1):
        self._path = workdir and workdir / "goodput.json"
        self._earlier = _read(self._path) if self._path else []
        self._launch = dict.fromkeys(PHASES, 0.0) | {"processes": processes, "redone_steps": 0, "redone_seconds": 0.0}
        self._phase, self._mark, self._written = "initialisation", start, start

    def enter(self, phase: str) -> None:
        """Ends the phase under way and starts another."""
        now = time.perf_counter()
        self._launch[self._phase] += now - self._mark
        self._phase, self._mark = phase, now

    @contextlib.contextmanager
    def phase(self, phase: str):
        """`phase` inside, then the one before goes on."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def starts(self, step: int, metrics: Path) -> None:
        """Notes the step that this launch starts after, and what `metrics` holds beyond it, before that is dropped."""
        redone = [record["step_seconds"] for record in read_metrics(metrics) if record["step"] > step]
        self._launch |= {"first_step": step, "redone_steps": len(redone), "redone_seconds": sum(redone)}

    def at(self, step: int, *, write: bool = False) -> None:
        """Notes the last step that ended; writes the file now and then, or at once."""
        self._launch["last_step"] = step
        if self._path and (write or time.perf_counter() - self._written > _WRITE_SECONDS):
            self.enter(self._phase)
            self._written = self._mark
            with contextlib.suppress(OSError):  # statistics are no reason to end a run
                temporary = self._path.with_suffix(".tmp")
                temporary.write_text(json.dumps([*self._earlier, self._launch], indent=1) + "\n")
                os.replace(temporary, self._path)

    def summary(self) -> dict[str, float]:
        """{launches, redone_steps, seconds_redone, seconds_<phase> ..., goodput} over all launches.

        goodput = (seconds in steps - seconds of steps done again) / seconds of all launches, in [0, 1].
        """
        self.enter(self._phase)
        launches = [*self._earlier, self._launch]
        total = lambda name: sum(launch.get(name, 0) for launch in launches)
        seconds = {f"seconds_{name}": total(name) for name in PHASES}
        useful = max(total("steps") - total("redone_seconds"), 0.0)
        return {
            "launches": len(launches),
            "redone_steps": total("redone_steps"),
            "seconds_redone": total("redone_seconds"),
            **seconds,
            "goodput": useful / max(sum(seconds.values()), 1e-9),
        }


def _read(path: Path) -> list[dict]:
    """Records of earlier launches; none where the file is missing or not ours."""
    try:
        launches = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [x for x in launches if isinstance(x, dict)] if isinstance(launches, list) else []
