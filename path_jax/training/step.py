"""The training step."""

import jax
import jax.numpy as jnp
import optax

from path_jax.training.state import TrainState


def make_train_step(objective, optimizer: optax.GradientTransformation, accumulate: int = 1):
    """A pure function (state, batch, *frozen) -> (state, metrics).

    Args:
      objective: see path_jax.training.objectives.
      accumulate: number of micro-batches a batch is cut into; sums are added and divided once, so the result is that of
        one large batch.
    """
    gradient = jax.grad(objective, has_aux=True)

    def train_step(state: TrainState, batch, *frozen):
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if accumulate == 1:
            grads, metrics = gradient(state.params, batch, rng, *frozen)
        else:
            # Row i goes to micro-batch i % accumulate, so that every micro-batch spans all data shards.
            micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            first = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], micro), rng, *frozen)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
            add = lambda total, rows: (jax.tree.map(jnp.add, total, gradient(state.params, rows, rng, *frozen)), None)
            (grads, metrics), _ = jax.lax.scan(add, zeros, micro)
        weight = jnp.maximum(metrics["loss"][1], 1)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = (optax.tree.norm(grads), jnp.ones(()))
        return TrainState(state.step + 1, params, opt_state, state.rng), metrics

    return train_step
