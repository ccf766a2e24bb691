"""Checkpoints that are damaged, cannot be written, or come from another number of processes."""

import errno
import json
import re
import resource
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from path_jax.checkpoints.manifest import damage
from path_jax.checkpoints.native import Checkpointer, CheckpointError

SHAPE = jax.ShapeDtypeStruct((64, 64), jnp.float32)


class Stream(grain.DatasetIterator):
    """Data that can only be read in order: its state is more than a number of batches."""

    def __init__(self):
        super().__init__()
        self._position = 0

    def __next__(self):
        self._position += 1
        return self._position

    def get_state(self):
        return {"source": {"next_index": self._position}, "packer": [1, 2]}

    def set_state(self, state):
        self._position = state["source"]["next_index"]


def rows():
    return iter(grain.MapDataset.range(1000).to_iter_dataset())


def state(step):
    return {"w": jnp.asarray(np.random.default_rng(step).normal(size=SHAPE.shape), jnp.float32)}


def target():
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {"w": jax.ShapeDtypeStruct(SHAPE.shape, SHAPE.dtype, sharding=device)}


def save(directory, *steps, **options):
    """A run that saved the given steps."""
    data = rows()
    with Checkpointer(directory, **({"max_to_keep": 10} | options)) as checkpointer:
        for step in range(1, max(steps) + 1):
            next(data)
            if step in steps:
                checkpointer.save(step, state(step), data)
        checkpointer.finish()
    return directory / "checkpoints"


def restore(directory, data=None, **options):
    data = data or rows()
    with Checkpointer(directory, 10, **options) as checkpointer:
        step, restored = checkpointer.restore_latest(target(), data)
    np.testing.assert_array_equal(restored["w"], state(step)["w"])
    return step, next(data)


def array_file(step):
    return max((path for path in (step / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(step):
    path = array_file(step)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def truncate(step):
    path = array_file(step)
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_file(step):
    array_file(step).unlink()


def lose_the_state(step):
    shutil.rmtree(step / "state")


def tear_the_manifest(step):
    path = step / "manifest.json"
    path.write_text(path.read_text()[:30])


@pytest.mark.parametrize(
    "harm, reason",
    [
        (flip_a_bit, "has changed since it was written"),
        (truncate, r"has \d+ bytes, not \d+"),
        (lose_a_file, "is missing"),
        (lose_the_state, "is missing"),
        (tear_the_manifest, "manifest.json cannot be read"),
    ],
)
def test_the_newest_good_step_is_restored(tmp_path, capsys, harm, reason):
    checkpoints = save(tmp_path, 2, 4)
    assert damage(checkpoints / "4") is None
    harm(checkpoints / "4")
    assert restore(tmp_path) == (2, 2)  # step, and the number that follows the first two
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("checkpoint of step 4 is damaged (") and line.endswith("goes on from step 2")
    assert "is now 4.damaged" in line and (checkpoints / "4.damaged").is_dir()
    assert re.search(reason, line)
    save_again = rows()
    with Checkpointer(tmp_path, 10) as checkpointer:  # the step can be saved anew, and be damaged anew
        checkpointer.restore_latest(target(), save_again)
        next(save_again), next(save_again)
        checkpointer.save(4, state(4), save_again)
    flip_a_bit(checkpoints / "4")
    assert restore(tmp_path)[0] == 2 and (checkpoints / "4.damaged2").is_dir()


def test_nothing_is_set_aside_where_no_step_is_good(tmp_path):
    checkpoints = save(tmp_path, 2, 4)
    flip_a_bit(checkpoints / "4")
    lose_a_file(checkpoints / "2")
    with pytest.raises(CheckpointError, match="holds no good checkpoint .step 4: .* changed .*; step 2: .* missing"):
        restore(tmp_path)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "4"]


def test_another_state_is_an_error_and_no_damage(tmp_path):
    checkpoints = save(tmp_path, 2, 4)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match="cannot be read"):
        checkpointer.restore_latest({"other": target()["w"]}, rows())
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "4"]


def test_nothing_saved(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(target(), rows()) is None


def test_keeps_the_newest_and_every_kth(tmp_path):
    checkpoints = save(tmp_path, *range(1, 11), max_to_keep=2, keep_every=4)
    assert sorted(int(path.name) for path in checkpoints.iterdir()) == [4, 8, 9, 10]


def test_what_a_killed_save_left_is_removed(tmp_path):
    checkpoints = save(tmp_path, 2)
    left = checkpoints / "4.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    assert restore(tmp_path)[0] == 2
    assert not left.exists()


@pytest.fixture
def small_files():
    """A function that forbids files of more than so many bytes, for this process; SIGXFSZ is ignored by Python."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_save_that_fails_is_tried_again(tmp_path, capsys, small_files):
    data = rows()
    with Checkpointer(tmp_path, 10) as checkpointer:
        checkpointer.save(1, state(1), data)
        checkpointer.finish()
        small_files(2000)  # the arrays need 16 KiB
        checkpointer.save(2, state(2), data)
        with pytest.raises(CheckpointError, match="checkpoint of step 2 could not be saved"):
            checkpointer.finish()
        small_files(None)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("that of step 1 is kept, and the next save tries again")
        assert checkpointer.latest_step() == 1
        checkpointer.save(3, state(3), data)
        checkpointer.finish()
    assert restore(tmp_path)[0] == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]


def test_storage_that_refuses_at_once(tmp_path, capsys, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:

        def refuse(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpointer._manager, "save", refuse)
            checkpointer.save(1, state(1), rows())
        said = capsys.readouterr().err
        assert "No space left on device); " in said and "MiB free; there is none before it" in said
        checkpointer.save(2, state(2), rows())
        checkpointer.finish()
    assert restore(tmp_path)[0] == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_checkpoints_without_position_and_manifest(tmp_path, processes):
    """As they were saved before there were either."""
    data = rows()
    next(data)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        items = {"state": ocp.args.StandardSave(state(1)), "data": grain.checkpoint.CheckpointSave(data)}
        manager.save(1, args=ocp.args.Composite(**items))
    folder = tmp_path / "checkpoints" / "1" / "data"
    (folder / "process_0-of-1.json").rename(folder / f"process_0-of-{processes}.json")
    assert restore(tmp_path) == (1, 1)


def test_a_stream_goes_on_with_the_same_shards_only(tmp_path):
    data = Stream()
    next(data), next(data)
    with Checkpointer(tmp_path, data_shards=2) as checkpointer:
        checkpointer.save(2, state(2), data)
    position = json.loads((tmp_path / "checkpoints" / "2" / "position" / "metadata").read_text())
    assert position == {"batches": None, "data_shards": 2}
    assert restore(tmp_path, Stream(), data_shards=2) == (2, 3)
    with pytest.raises(CheckpointError, match="saved by 1 processes with 2 shards .* now there are 1 with 4"):
        restore(tmp_path, Stream(), data_shards=4)
    assert (tmp_path / "checkpoints" / "2").is_dir()
