"""Linen modules behind the NNX door: the same numbers, the same gradients, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from path_jax.mixers import PathAttention
from path_jax.models import DecoderLM, ModelConfig
from path_jax.nnx import to_nnx, to_params

WIDTH, VOCAB, LEARNING_RATE = 32, 13, 0.1
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, VOCAB, (2, 9))
X, TARGET = RNG.standard_normal((2, 2, 9, WIDTH)).astype(np.float32)
OPTIONS = dict(vocab_size=VOCAB, num_layers=2, embed_dim=WIDTH, num_heads=2, mlp_dim=32)


def random_params(module, *args):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda x: jnp.asarray(0.2 * RNG.standard_normal(x.shape), jnp.float32), shapes)


def assert_same_tree(actual, expected, check=np.testing.assert_array_equal):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(check, actual, expected)


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


def squared_error(y):
    return jnp.mean((y - TARGET) ** 2)


def sgd_step(params, loss):
    """Loss before and parameters after, the Linen way."""
    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    return value, jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradients)


@nnx.jit(static_argnames="loss")
def nnx_sgd_step(model, optimizer, loss):
    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def check_training_step(model, loss, params, expected_loss, params_of):
    """One step equals Linen's and lowers the loss."""
    optimizer = nnx.Optimizer(model, optax.sgd(LEARNING_RATE), wrt=nnx.Param)
    expected_value, expected = sgd_step(params, expected_loss)
    value = nnx_sgd_step(model, optimizer, loss)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    assert_same_tree(params_of(model), expected, lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6))
    assert nnx_sgd_step(model, optimizer, loss) < value


@pytest.mark.parametrize("scan_layers", [True, False])
def test_round_trip_is_exact(scan_layers):
    module = DecoderLM(ModelConfig(**OPTIONS, scan_layers=scan_layers))
    params = random_params(module, TOKENS)
    model = to_nnx(module, params, TOKENS)
    assert isinstance(model, nnx.Module)
    assert len(jax.tree.leaves(nnx.state(model))) == len(jax.tree.leaves(params))  # parameters and nothing else
    assert_same_tree(to_params(model), params)


def test_language_model():
    module = DecoderLM(ModelConfig(**OPTIONS, mixer="fox"))
    params = random_params(module, TOKENS)
    model = to_nnx(module, params, TOKENS)
    out = nnx.jit(lambda model: model(TOKENS))(model)
    expected = jax.jit(module.apply)({"params": params}, TOKENS)
    np.testing.assert_array_equal(out.logits, expected.logits)
    np.testing.assert_allclose(model.unembed(out.hidden), out.logits, rtol=1e-6, atol=1e-6)
    check_training_step(
        model,
        lambda model: cross_entropy(model(TOKENS).logits),
        params,
        lambda params: cross_entropy(module.apply({"params": params}, TOKENS).logits),
        to_params,
    )


class Residual(nnx.Module):
    """An NNX layer around our mixer, with a weight of its own."""

    def __init__(self, mixer):
        self.mixer = mixer
        self.scale = nnx.Param(jnp.ones(WIDTH))

    def __call__(self, x, segment_ids=None):
        y, _ = self.mixer(x, segment_ids=segment_ids)
        return x + self.scale * y


def test_mixer_inside_an_nnx_module():
    module = PathAttention(num_heads=2, forget_gate=True)
    params = {"mixer": random_params(module, X), "scale": jnp.ones(WIDTH)}
    model = Residual(to_nnx(module, params["mixer"], X))
    segment_ids = jnp.asarray(np.repeat([[1, 2]], [4, 5], axis=1).repeat(2, axis=0))

    def linen(params, segment_ids=segment_ids):
        y, _ = module.apply({"params": params["mixer"]}, X, segment_ids=segment_ids)
        return X + params["scale"] * y

    np.testing.assert_array_equal(nnx.jit(lambda m: m(X, segment_ids))(model), jax.jit(linen)(params))
    check_training_step(
        model,
        lambda model: squared_error(model(X, segment_ids)),
        params,
        lambda params: squared_error(linen(params)),
        lambda model: {"mixer": to_params(model.mixer), "scale": model.scale[...]},
    )


def test_parameters_that_do_not_fit_are_named():
    module = PathAttention(num_heads=2)
    params = random_params(module, X)
    short = {name: value for name, value in params.items() if name != "q_proj"}
    with pytest.raises(ValueError, match=r"q_proj/kernel: expected \(32, 32\), got None"):
        to_nnx(module, short, X)
    with pytest.raises(ValueError, match=r"extra: expected None, got \(3,\)"):
        to_nnx(module, params | {"extra": jnp.ones(3)}, X)
