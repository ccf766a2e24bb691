"""Checkpoints of a training run: Orbax for the state, JSON for data position and resolved configuration.

workdir/config.json             what was run; eval.py reads it back
workdir/checkpoints/<step>/     committed atomically:
  state/                        any pytree of arrays
  position/                     JSON: where the data stand, for any number of processes
  data/                         one state per process, for data that can only be read in order
  manifest.json                 sizes and hashes of these files
workdir/checkpoints/<step>.damaged/   a step that could not be restored, set aside
"""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp

from path_jax.checkpoints.folders import read_json
from path_jax.checkpoints.manifest import damage, write_manifest
from path_jax.parallel import cluster
from path_jax.parallel.sharding import path_name

_TEMPORARY = "*.orbax-checkpoint-tmp*"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written."""


class Checkpointer:
    """Saves and restores a run, asynchronously; a step is visible only once it is complete.

    A save that fails is reported in one line, the run goes on, and the next save tries again; `finish` raises if the
    last one failed. With several processes a failed save ends the run, since the others cannot know of it.

    Args:
      workdir: of the run; what a killed save left there is removed.
      max_to_keep: newest steps that stay; keep_every: so do multiples of it, 0 for none.
      data_shards: into how many shards the processes divide a batch; see `RowShard`.
    """

    def __init__(self, workdir: Path, max_to_keep: int = 2, keep_every: int = 0, data_shards: int = 1):
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._data_shards = data_shards
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        self._saving: int | None = None  # the step under way
        self._failure: str | None = None  # of the newest save
        cluster.on_first(self._remove_temporary)
        self._manager = ocp.CheckpointManager(self.directory, options=self._options)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # Waiting for the other processes is hopeless when this one leaves early.
        if kind is None or jax.process_count() == 1:
            self.close()

    def close(self) -> None:
        """Waits for the save under way."""
        self._wait()
        self._manager.close()

    def latest_step(self) -> int | None:
        """Last complete step, or None."""
        return max(_steps(self.directory), default=None)

    def save(self, step: int, state, data: grain.DatasetIterator) -> None:
        """Starts saving; the state may be donated once this returns.

        Raises:
          CheckpointError: for what went wrong in a run of several processes.
        """
        self._wait()
        if step == self.latest_step():
            return
        items = {"state": ocp.args.StandardSave(state)}
        batches = _num_batches(data)
        if batches is None:
            items["data"] = grain.checkpoint.CheckpointSave(data)
        items["position"] = ocp.args.JsonSave({"batches": batches, "data_shards": self._data_shards})
        self._saving, self._failure = step, None
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # Orbax and TensorStore raise bare Exceptions, too
            self._report(error)

    def finish(self) -> None:
        """Waits for the save under way.

        Raises:
          CheckpointError: if the newest save failed.
        """
        self._wait()
        if self._failure:
            raise CheckpointError(self._failure)

    def restore_latest(self, abstract_state, data: grain.DatasetIterator):
        """(step, state) of the newest good step; moves `data` there. None if nothing has been saved.

        Newer steps that turn out to be damaged are renamed to `<step>.damaged`.

        Raises:
          CheckpointError: if no step is good, or the newest undamaged one holds another state.
        """
        skipped, steps = [], sorted(_steps(self.directory), reverse=True)
        cluster.check_same(f"list of checkpoints in {self.directory}", str(steps))
        for step in steps:
            if reason := self._damage(step):
                skipped.append((step, reason))
                continue
            try:
                state = self.restore(step, abstract_state, data)
            except CheckpointError as error:
                # With a manifest the files are what was saved: not damage, but another model or other data.
                if (self.directory / str(step) / "manifest.json").exists() or jax.process_count() > 1:
                    raise
                skipped.append((step, str(error)))
                continue
            self._set_aside(skipped, step)
            return step, state
        if skipped:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in skipped)
            raise CheckpointError(
                f"{self.directory} holds no good checkpoint ({reasons}); restore one from a copy, or remove that "
                "directory to start again"
            )
        return None

    def restore(self, step: int, abstract_state, data: grain.DatasetIterator):
        """State in the shapes, dtypes and shardings of `abstract_state`; moves `data` to its saved position.

        Raises:
          CheckpointError: if the step is damaged or holds another state, or if the position of data that can only be
            read in order belongs to other processes.
        """
        path = self.directory / str(step)
        items = {"state": ocp.args.StandardRestore(abstract_state)}
        batches = self._read_position(path, data)
        if batches is None:
            items["data"] = grain.checkpoint.CheckpointRestore(data)
        state = _reading(path, lambda: self._manager.restore(step, args=ocp.args.Composite(**items))).state
        if batches is not None:
            data.set_state({"next_index": batches})
        return state

    def _read_position(self, path: Path, data: grain.DatasetIterator) -> int | None:
        """Number of batches taken, or None where each process has a state of its own, which must then be there."""
        read = lambda file: _reading(path, lambda: read_json(file))
        own = path / "data" / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
        if (path / "position").is_dir():
            position = read(path / "position" / "metadata")
            if position["batches"] is not None:
                return position["batches"]
            shards = position["data_shards"]
        else:  # saved before there were positions
            if _num_batches(data) is not None:
                first = next(iter(sorted((path / "data").glob("process_0-of-*.json"))), own)
                return read(first)["next_index"]
            shards = jax.process_count()
        if not own.exists() or shards != self._data_shards:
            saved = len(list((path / "data").glob("process_*.json")))
            raise CheckpointError(
                f"{path} was saved by {saved} processes with {shards} shards of the data, which can only be read in "
                f"order; now there are {jax.process_count()} with {self._data_shards}: resume with as many, or "
                "prepare the data for random access"
            )
        return None

    def _damage(self, step: int) -> str | None:
        """What is wrong with a step, in every process the same; each reads its share of the files."""
        share = (jax.process_index(), jax.process_count())
        reason = damage(self.directory / str(step), share)
        if cluster.all_true(reason is None):
            return None
        return reason or "another process found a damaged file"

    def _set_aside(self, skipped, good: int) -> None:
        def rename():
            for step, reason in skipped:
                target = self.directory / f"{step}.damaged"
                number = 1
                while target.exists():
                    number += 1
                    target = self.directory / f"{step}.damaged{number}"
                (self.directory / str(step)).rename(target)
                print(
                    f"checkpoint of step {step} is damaged ({reason}); it is now {target.name}, "
                    f"and the run goes on from step {good}",
                    file=sys.stderr,
                )

        if skipped:
            cluster.on_first(rename)
            self._manager.reload()

    def _wait(self) -> None:
        """Returns when nothing is being saved."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # see save
            self._report(error)
        self._saving = None

    def _report(self, error: Exception) -> None:
        free = shutil.disk_usage(self.directory).free / 2**20 if self.directory.is_dir() else 0
        self._failure = (
            f"checkpoint of step {self._saving} could not be saved ({_reason(error)}); {self.directory} has "
            f"{free:,.1f} MiB free"
        )
        if jax.process_count() > 1:
            raise CheckpointError(self._failure) from error
        self._remove_temporary()
        # A manager remembers what failed and would raise it again.
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = ocp.CheckpointManager(self.directory, options=self._options)
        good = self.latest_step()
        kept = "there is none before it" if good is None else f"that of step {good} is kept"
        print(f"{self._failure}; {kept}, and the next save tries again", file=sys.stderr)

    def _remove_temporary(self) -> None:
        for path in self.directory.glob(_TEMPORARY):
            shutil.rmtree(path, ignore_errors=True)

    def _write_manifest(self) -> None:
        """Called by Orbax on process 0 when all files of a step are written but its directory is not yet renamed."""
        for directory in self.directory.glob(f"{self._saving}{_TEMPORARY[1:]}"):
            write_manifest(directory)


def _num_batches(data: grain.DatasetIterator) -> int | None:
    """How many batches were taken from data with random access; None for a stream, whose state is more than that."""
    state = data.get_state()
    return state["next_index"] if isinstance(state, dict) and set(state) == {"next_index"} else None


def _steps(directory: Path) -> list[int]:
    return [int(path.name) for path in directory.glob("*") if path.name.isdigit()] if directory.is_dir() else []


def _reason(error: BaseException) -> str:
    """An exception's kind and first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0][:200]}"


def _reading(path: Path, read):
    """Turns what a damaged checkpoint raises into one line that says what to do."""
    try:
        return read()
    except Exception as error:  # Orbax and TensorStore raise bare Exceptions for damaged arrays
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({_reason(error)}); if it is damaged, delete that directory to go on "
            "from the step before"
        ) from error


def write_config(workdir: Path, config: dict) -> None:
    """Writes config.json atomically."""
    path = Path(workdir) / "config.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)


def read_config(workdir: Path) -> dict:
    """The resolved configuration of a run.

    Raises:
      FileNotFoundError: if the directory is not a run directory.
      CheckpointError: if config.json is not a JSON object.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is not a run directory: it has no config.json")
    return _reading(path, lambda: read_json(path))


def save_params(workdir: Path, params) -> None:
    """Writes parameters alone, as step 0 of a run directory."""
    with ocp.CheckpointManager(Path(workdir).absolute() / "checkpoints") as manager:
        manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave({"params": params})))


def restore_params(workdir: Path, abstract_params, step: int | None = None):
    """Parameters alone, from the given or the last complete step.

    Args:
      abstract_params: tree of shapes and dtypes (with shardings, to place them).

    Raises:
      FileNotFoundError: if the run has no such complete checkpoint.
      CheckpointError: if the checkpoint is damaged or holds other parameters.
    """
    directory = Path(workdir).absolute() / "checkpoints"
    steps = sorted(_steps(directory))
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(f"{directory} holds no complete checkpoint{'' if step is None else f' of step {step}'}")
    path = directory / str(steps[-1] if step is None else step) / "state"
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or device),
        abstract_params,
    )
    arguments = ocp.args.PyTreeRestore(
        {"params": target},
        restore_args=ocp.checkpoint_utils.construct_restore_args({"params": target}),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = _reading(path, lambda: checkpointer.metadata(path).item_metadata["params"])
        _check_same_parameters(path, stored, abstract_params)
        return _reading(path, lambda: checkpointer.restore(path, args=arguments))["params"]


def _check_same_parameters(path: Path, stored, expected) -> None:
    """Raises CheckpointError listing what only one side has."""
    stored, expected = (
        {f"{path_name(key)} {tuple(x.shape)}" for key, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (stored, expected)
    )
    if stored != expected:
        raise CheckpointError(
            f"checkpoint {path} holds other parameters; only there: {', '.join(sorted(stored - expected)) or 'none'}; "
            f"only in the model: {', '.join(sorted(expected - stored)) or 'none'}"
        )
