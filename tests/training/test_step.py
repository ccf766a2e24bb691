"""The training step: learning, accumulation, sharding, decay mask, schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.data import Batch
from path_jax.models import DecoderLM, ModelConfig
from path_jax.parallel.mesh import make_mesh
from path_jax.parallel.sharding import batch_sharding
from path_jax.training.objectives import language_modelling
from path_jax.training.optim import OptimConfig, decay_mask, make_optimizer, make_schedule
from path_jax.training.state import abstract_state, sharded_state
from path_jax.training.step import make_train_step

MODEL = DecoderLM(ModelConfig(vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=64))
OPTIM = OptimConfig(lr=1e-2, warmup_steps=1)


def make_batch(seed=0, rows=8, length=96):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (rows, length + 1)).astype(np.int32)
    segment_ids = np.sort(rng.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    weights = (rng.uniform(size=(rows, length)) < 0.8).astype(np.float32)
    positions = np.concatenate([np.arange(n) for row in segment_ids for n in np.unique(row, return_counts=True)[1]])
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segment_ids, positions.reshape(rows, length).astype(np.int32))


def train(mesh, num_steps, accumulate=1, z_loss=1e-4, loss_chunk=32):
    """Losses and gradient norms of a few steps, with the last state."""
    optimizer = make_optimizer(OPTIM, num_steps)
    objective = language_modelling(MODEL, z_loss=z_loss, chunk_size=loss_chunk)
    with jax.set_mesh(mesh):
        state = sharded_state(MODEL, optimizer, 0, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state(MODEL, optimizer, 0, mesh))
        step = jax.jit(make_train_step(objective, optimizer, accumulate), out_shardings=(shardings, None))
        history = []
        for i in range(num_steps):
            batch = jax.device_put(make_batch(i % 2), batch_sharding(mesh))
            state, metrics = step(state, batch)
            history.append([float(metrics["loss"][0] / metrics["loss"][1]), float(metrics["grad_norm"][0])])
    return np.array(history), state


@pytest.fixture(scope="module")
def one_device():
    return train(make_mesh({}, jax.devices()[:1]), 5)


def test_loss_falls(one_device):
    history, state = one_device
    assert history[-1, 0] < history[0, 0] - 0.05
    assert int(state.step) == 5


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"data": 2, "fsdp": 4}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        {"fsdp": 2, "sequence": 2, "tensor": 2},
    ],
    ids=str,
)
def test_eight_devices_train_like_one(one_device, shape):
    history, state = train(make_mesh(shape), 5)
    np.testing.assert_allclose(history, one_device[0], rtol=1e-5)
    kernel = state.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and kernel.addressable_shards[0].data.size < kernel.size


@pytest.mark.parametrize("accumulate", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulation_equals_the_large_batch(one_device, accumulate):
    history, _ = train(make_mesh({"data": 2}, jax.devices()[:2]), 5, accumulate=accumulate)
    np.testing.assert_allclose(history, one_device[0], rtol=1e-5)


def test_decay_spares_norms_and_biases():
    params = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mask = {jax.tree_util.keystr(path): kept for path, kept in jax.tree_util.tree_leaves_with_path(decay_mask(params))}
    assert {path for path, kept in mask.items() if not kept} == {
        path for path in mask if "norm" in path or path.endswith("['bias']")
    }
    assert any("embedding" in path and kept for path, kept in mask.items())


def test_schedule_warms_up_and_decays():
    schedule = make_schedule(OptimConfig(lr=1.0, init_lr=0.1, end_lr=0.2, warmup_steps=10), 100)
    np.testing.assert_allclose(
        [schedule(0), schedule(10), schedule(55), schedule(100)], [0.1, 1.0, 0.6, 0.2], rtol=1e-6
    )
    with pytest.raises(ValueError, match="optim.warmup_steps=11 exceeds train.num_steps=10"):
        make_schedule(OptimConfig(warmup_steps=11), 10)
