"""Saving and restoring: exact, resharded, parameters alone, damaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.checkpoints.native import Checkpointer, CheckpointError, read_config, restore_params, write_config
from path_jax.data import DataConfig, make_corpus, make_iterator
from path_jax.models import DecoderLM, ModelConfig
from path_jax.parallel.mesh import make_mesh
from path_jax.training.optim import OptimConfig, make_optimizer
from path_jax.training.state import abstract_state, sharded_state

MODEL = DecoderLM(ModelConfig(vocab_size=257, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32))
OPTIMIZER = make_optimizer(OptimConfig(warmup_steps=1), 10)


def make_data(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 20)
    config = DataConfig(source="files", path=str(tmp_path / "text"), sequence_length=16, batch_size=8)
    return make_iterator(config, make_corpus(config).train)


@pytest.fixture
def saved(tmp_path):
    """A run directory with one checkpoint, its state, and the batch that follows."""
    state = sharded_state(MODEL, OPTIMIZER, 0, make_mesh({"data": 2, "fsdp": 4}))
    data = make_data(tmp_path)
    next(data)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, state, data)
    checkpointer.close()
    return tmp_path, state, next(data)


def assert_equal(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b)), left, right)


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_restores_on_any_mesh_with_the_data_position(saved, shape):
    directory, state, next_batch = saved
    data = make_data(directory)
    target = abstract_state(MODEL, OPTIMIZER, 1, make_mesh(shape))
    checkpointer = Checkpointer(directory)
    assert checkpointer.latest_step() == 3
    restored = checkpointer.restore(3, target, data)
    checkpointer.close()
    assert_equal(restored, state)
    jax.tree.map(
        lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim) or pytest.fail("sharding"), restored, target
    )
    assert_equal(next(data), next_batch)


def abstract_params():
    return jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def test_parameters_alone(saved):
    directory, state, _ = saved
    assert_equal(restore_params(directory, abstract_params()), state.params)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint of step 4"):
        restore_params(directory, abstract_params(), step=4)


def test_other_parameters_are_refused(saved):
    shapes = abstract_params()
    shapes["final_norm"]["scale"] = jax.ShapeDtypeStruct((17,), jnp.float32)
    message = r"only there: final_norm/scale \(16,\); only in the model: final_norm/scale \(17,\)"
    with pytest.raises(CheckpointError, match=message):
        restore_params(saved[0], shapes)
    with pytest.raises(CheckpointError, match=r"only there: none; only in the model: extra \(2,\)"):
        restore_params(saved[0], abstract_params() | {"extra": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_truncated_checkpoint_is_one_line(saved):
    directory, *_ = saved
    for path in (directory / "checkpoints" / "3" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(CheckpointError, match="delete that directory") as error:
        restore_params(directory, abstract_params())
    assert "\n" not in str(error.value)
    checkpointer = Checkpointer(directory)
    with pytest.raises(CheckpointError, match="delete that directory"):
        checkpointer.restore(3, abstract_state(MODEL, OPTIMIZER, 0, make_mesh({"fsdp": 8})), make_data(directory))


def test_config_round_trip(tmp_path):
    write_config(tmp_path, {"model": {"a": [1, 2], "b": None}})
    assert read_config(tmp_path) == {"model": {"a": [1, 2], "b": None}}
    (tmp_path / "config.json").write_text('{"model": {')
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        read_config(tmp_path / "nothing")
