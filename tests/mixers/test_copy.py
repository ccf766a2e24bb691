"""Two layers of every mixer learn to say a sequence again, which takes looking up what followed a token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from path_jax.mixers import MIXERS
from path_jax.models import DecoderLM, ModelConfig

VOCAB, LENGTH, BATCH, STEPS = 10, 5, 64, 200
FAST = ("stick_breaking", "base_conv")


def make_batch(rng):
    """Random sequences of different tokens, each said twice."""
    shuffled = jax.vmap(lambda rng: jax.random.permutation(rng, VOCAB))(jax.random.split(rng, BATCH))
    return jnp.tile(shuffled[:, :LENGTH], (1, 2))


def loss_and_accuracy(model, params, tokens):
    """Of the second half."""
    logits = model.apply({"params": params}, tokens[:, :-1]).logits[:, LENGTH - 1 :]
    targets = tokens[:, LENGTH:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean(), jnp.mean(jnp.argmax(logits, axis=-1) == targets)


# Optimised, unlike other tests' programs: here running takes longer than compiling.
@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 1})
def train(model, optimizer, params, rng):
    """Accuracy of every step's batch, which is new."""

    def step(state, rng):
        params, moments = state
        grad = jax.value_and_grad(functools.partial(loss_and_accuracy, model), has_aux=True)
        (_, accuracy), gradients = grad(params, make_batch(rng))
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), accuracy

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(rng, STEPS))[1]


@pytest.mark.parametrize(
    "mixer", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MIXERS]
)
def test_a_mixer_learns_to_copy(mixer):
    model = DecoderLM(ModelConfig(VOCAB, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64, mixer=mixer))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 1e-2, 30, STEPS))
    accuracy = np.asarray(train(model, optimizer, params, jax.random.key(1)))
    assert accuracy[:5].mean() < 0.3 and accuracy[-10:].mean() > 0.95
