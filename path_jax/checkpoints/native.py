"""Checkpoints of a training run: Orbax for state and data position, JSON for the resolved configuration.

workdir/config.json             what was run; eval.py reads it back
workdir/checkpoints/<step>/     state (any pytree) and data (iterator position), committed atomically
"""

import json
import os
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp

from path_jax.checkpoints.folders import read_json
from path_jax.parallel.sharding import path_name


class CheckpointError(ValueError):
    """A checkpoint that cannot be read."""


class Checkpointer:
    """Saves and restores a run, asynchronously; a step is visible only once it is complete."""

    def __init__(self, workdir: Path, max_to_keep: int = 2):
        self.directory = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Last complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state, data: grain.DatasetIterator) -> None:
        """Starts saving; the state may be donated once this returns."""
        if step != self.latest_step():
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data))
            self._manager.save(step, args=items)

    def restore(self, step: int, abstract_state, data: grain.DatasetIterator):
        """State in the shapes, dtypes and shardings of `abstract_state`; moves `data` to its saved position.

        Raises:
          CheckpointError: if the step is damaged or holds another state.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), data=grain.checkpoint.CheckpointRestore(data)
        )
        return _reading(self.directory / str(step), lambda: self._manager.restore(step, args=items)).state

    def close(self) -> None:
        """Waits for the saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def _reading(path: Path, read):
    """Turns what a damaged checkpoint raises into one line that says what to do."""
    try:
        return read()
    except Exception as error:  # Orbax and TensorStore raise bare Exceptions for damaged arrays
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({type(error).__name__}: {reason}); if it is damaged, delete that "
            "directory to go on from the step before"
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
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit()) if directory.is_dir() else []
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
