"""TrainState and its sharded creation."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils

from path_jax.models import DecoderLM
from path_jax.parallel.mesh import local_mesh
from path_jax.parallel.sharding import tree_shardings


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes."""

    step: jax.Array  # int32, updates done
    params: Any
    opt_state: Any
    rng: jax.Array  # key data of the run; a step uses fold_in(rng, step)


def make_state(model: DecoderLM, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Fresh state, unsharded; trace it under `jax.eval_shape` or `jax.jit` for its shapes or shards."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key_data(run_key))


def abstract_state(model: DecoderLM, optimizer, seed: int, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; allocates nothing."""
    shapes = jax.eval_shape(lambda: make_state(model, optimizer, seed))
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, shapes, tree_shardings(shapes, mesh))


def sharded_state(model: DecoderLM, optimizer, seed: int, mesh: jax.sharding.Mesh) -> TrainState:
    """Fresh state, each shard created where it lives."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, seed, mesh))
    return jax.jit(lambda: make_state(model, optimizer, seed), out_shardings=shardings)()


def local_params(params):
    """Whole parameters on the devices of each process, for computations that processes do on their own.

    With one process they are `params`. With several every leaf is gathered in turn and sharded over `local_mesh`.
    """
    if jax.process_count() == 1:
        return params
    gather = lambda x, sharding: jax.device_put(multihost_utils.process_allgather(x, tiled=True), sharding)
    return jax.tree.map(gather, params, tree_shardings(params, local_mesh()))
