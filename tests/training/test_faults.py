"""A run under fire: storage, data, clocks and neighbours that fail; nothing that was saved is lost."""

import itertools
import json
import resource
import time

import jax
import numpy as np
import pytest
from training import tiny_config
from training.processes import batches, lines, losses, outcome, write_corpus

from path_jax.checkpoints.native import CheckpointError
from path_jax.training import loop, placement
from path_jax.training.experiment import make_experiment
from path_jax.training.lock import owned


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def train(corpus, workdir, evaluators=None, mesh=None, batch_size=8, **settings):
    config = tiny_config.get_config(str(corpus))
    config.train.update(settings)
    config.data.batch_size = batch_size
    config = config.to_dict() | {"mesh": mesh or {"fsdp": 8}}
    return loop.run(make_experiment(config), workdir, evaluators)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(corpus, workdir)
    return workdir


def assert_same_outcome(left, right, step=20):
    (left_records, left_state), (right_records, right_state) = outcome(left, step), outcome(right, step)
    assert left_records == right_records
    jax.tree.map(np.testing.assert_array_equal, left_state, right_state)
    assert batches(left) == batches(right)


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


class Stopped(Exception):
    """Raised in place of a kill."""


def at(step, action):
    """An evaluator that acts once, at the given step of eval_every=1."""
    counter = itertools.count(1)
    return {"fault": lambda params: action() or {} if next(counter) == step else {}}


def stop():
    raise Stopped


def run_until(step, corpus, workdir, **settings):
    with pytest.raises(Stopped):
        train(corpus, workdir, at(step, stop), eval_every=1, **settings)


def flip_a_bit(checkpoint):
    path = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(corpus, undisturbed, tmp_path, capsys):
    run_until(13, corpus, tmp_path, keep_checkpoints=3)
    assert steps(tmp_path) == [5, 10] and len(lines(tmp_path / "metrics.jsonl")) >= 12
    flip_a_bit(tmp_path / "checkpoints" / "10")
    train(corpus, tmp_path, eval_every=1)
    assert "checkpoint of step 10 is damaged" in capsys.readouterr().err
    assert_same_outcome(tmp_path, undisturbed)  # every step once: records beyond step 5 were dropped
    summary = json.loads((tmp_path / "goodput.json").read_text())
    assert summary[1]["first_step"] == 5 and summary[1]["redone_steps"] >= 7


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "sequence": 2}], ids=str)
def test_goes_on_with_another_mesh(corpus, undisturbed, tmp_path, mesh):
    run_until(7, corpus, tmp_path)
    train(corpus, tmp_path, mesh=mesh, eval_every=1, keep_every=10, hang_seconds=600.0)
    np.testing.assert_allclose(losses(tmp_path), losses(undisturbed), rtol=1e-5)
    assert batches(tmp_path) == batches(undisturbed)
    with pytest.raises(ValueError, match=r"another run \(config.data.batch_size is 8 there, 16 here\)"):
        train(corpus, tmp_path, batch_size=16, eval_every=1)


@pytest.fixture
def file_size():
    """A function that limits the size of the files that this process writes; Python ignores SIGXFSZ."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_storage_that_fails_for_a_while_costs_nothing(corpus, undisturbed, tmp_path, capsys, file_size):
    faults = at(3, lambda: file_size(600)) | {"end": at(13, lambda: file_size(None))["fault"]}
    train(corpus, tmp_path, faults, eval_every=1)
    said = [line for line in capsys.readouterr().err.splitlines() if "the next save tries again" in line]
    assert len(said) == 2 and said[0].startswith("checkpoint of step 5 could not be saved")
    assert steps(tmp_path) == [15, 20]
    assert_same_outcome(tmp_path, undisturbed)


def test_storage_that_fails_for_good_ends_the_run(corpus, tmp_path, file_size):

    def fail_once_5_is_saved():
        while steps(tmp_path) != [5]:
            time.sleep(0.01)
        file_size(600)

    with pytest.raises((CheckpointError, OSError), match="could not be saved|File too large"):
        train(corpus, tmp_path, at(8, fail_once_5_is_saved), eval_every=1)
    file_size(None)
    assert steps(tmp_path) == [5]
    assert train(corpus, tmp_path, eval_every=1).step == 20


class Failing:
    """An iterator whose data vanish after so many batches."""

    def __init__(self, iterator, count, error):
        self._iterator, self._left, self._error = iterator, count, error

    def __next__(self):
        if not self._left:
            raise self._error
        self._left -= 1
        return next(self._iterator)

    def __getattr__(self, name):
        return getattr(self._iterator, name)


@pytest.mark.parametrize(
    "error, reason",
    [
        (FileNotFoundError(2, "No such file or directory", "shard-7"), "No such file or directory: 'shard-7'"),
        (RuntimeError("corrupted record\nat byte 12"), "corrupted record at byte 12"),
    ],
)
def test_data_that_cannot_be_read_any_more(corpus, undisturbed, tmp_path, monkeypatch, error, reason):
    make = placement.make_iterator
    with monkeypatch.context() as patch:
        patch.setattr(placement, "make_iterator", lambda *args, **more: Failing(make(*args, **more), 7, error))
        with pytest.raises(ValueError, match=rf"batch 8 cannot be read \(.*{reason}\); step 7 is saved"):
            train(corpus, tmp_path)
    train(corpus, tmp_path)
    assert_same_outcome(tmp_path, undisturbed)


def test_a_hang_is_written_down(corpus, tmp_path, monkeypatch, capfd):
    make = placement.make_iterator

    class Slow(Failing):
        def __next__(self):
            if not self._left:
                time.sleep(2)
            return super().__next__() if self._left else next(self._iterator)

    monkeypatch.setattr(placement, "make_iterator", lambda *args, **more: Slow(make(*args, **more), 15, None))
    train(corpus, tmp_path, num_steps=16, hang_seconds=0.8, hang_exit=False)
    assert "_next_batch" in (tmp_path / "hang-0.txt").read_text()
    assert "no step ended for" in capfd.readouterr().err


def test_a_directory_in_use_is_refused(corpus, tmp_path):
    with owned(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        train(corpus, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]


def test_clocks_that_jump_do_not_matter(corpus, undisturbed, tmp_path, monkeypatch):
    real, jumps = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() - 86400 * next(jumps))
    train(corpus, tmp_path)
    monkeypatch.undo()
    assert_same_outcome(tmp_path, undisturbed)
    assert all(0 < record["step_seconds"] < 600 for record in lines(tmp_path / "metrics.jsonl"))
    (launch,) = json.loads((tmp_path / "goodput.json").read_text())
    assert all(0 <= launch[name] < 600 for name in ("initialisation", "data", "steps", "checkpoint"))


def test_a_sequence_that_its_axis_does_not_divide(corpus, tmp_path):
    config = tiny_config.get_config(str(corpus))
    config.data.sequence_length = 30
    with pytest.raises(ValueError, match="sequence_length=30 is not a multiple of twice mesh.sequence=8"):
        make_experiment(config.to_dict() | {"mesh": {"sequence": 8}})


def test_settings_out_of_range(corpus):
    for name in ("keep_every", "hang_seconds"):
        config = tiny_config.get_config(str(corpus))
        config.train[name] = -1
        with pytest.raises(ValueError, match=f"train.{name}=-1.* must not be negative"):
            make_experiment(config.to_dict())
