"""A small ViT that reads handwritten digits, trained in about a minute on one core: an encoder to analyse."""

import math
import sys
from typing import NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Float, Int

from path_jax.models.vit import ViT, ViTConfig

_TEST_SHARE = 0.25
_BATCH_SIZE = 16
_WARMUP_SHARE = 0.1
_POSITION_STD = 0.5


class Digits(NamedTuple):
    """A trained model, and images that it has not seen."""

    config: ViTConfig
    params: dict
    initial_params: dict  # before training
    images: Float[np.ndarray, "N 8 8 1"]  # float32 in [0, 1]
    labels: Int[np.ndarray, "N"]
    accuracy: float  # on these images


def train_digits(
    *,
    seed: int = 0,
    steps: int = 800,
    num_layers: int = 8,
    embed_dim: int = 64,
    num_heads: int = 4,
    learning_rate: float = 1e-3,
) -> Digits:
    """Trains a ViT on three quarters of scikit-learn's digits, in batches of 16; the last quarter is held out.

    AdamW with a linear warm-up and a cosine decay.

    Args:
      seed: of the split, the parameters and the batches.
      steps: of training, at least 1.
      num_layers, embed_dim, num_heads: of the model, whose patches are of 2 x 2 pixels and whose MLPs 2 * embed_dim.

    Raises:
      ImportError: scikit-learn is missing.
      ValueError: for a number out of range.

    Source: the images are the test set of Alpaydin and Kaynak, "Optical recognition of handwritten digits", 1998, 1797
    of 8 x 8 pixels with 17 grey levels.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits are scikit-learn's; run: pip install path-jax[interp]") from error
    if steps < 1:
        raise ValueError(f"{steps=} must be at least 1")

    found = load_digits()
    images, labels = (found.images[..., None] / 16).astype(np.float32), found.target.astype(np.int32)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    test, train = np.split(order, [round(_TEST_SHARE * len(order))])

    config = ViTConfig(8, 2, 1, 10, num_layers, embed_dim, num_heads, 2 * embed_dim)
    model = ViT(config)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, int(_WARMUP_SHARE * steps)), steps + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))
    params = initial_params = _initial_params(model, seed)
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, state, images, labels):
        def mean_loss(params):
            logits = model.apply({"params": params}, images).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradient = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    for step in range(1, steps + 1):
        some = rng.choice(train, _BATCH_SIZE, replace=False)
        params, state, loss = train_step(params, state, images[some], labels[some])
        if step % 100 == 0 or step == steps:
            print(f"digits: step {step} of {steps}, loss {float(loss):.4f}", file=sys.stderr, flush=True)
    logits = jax.jit(lambda params, images: model.apply({"params": params}, images).logits)(params, images[test])
    accuracy = float((np.asarray(logits).argmax(axis=-1) == labels[test]).mean())
    print(f"digits: {accuracy:.1%} of {len(test)} held-out images", file=sys.stderr, flush=True)
    return Digits(config, params, initial_params, images[test], labels[test], accuracy)


def _initial_params(model: ViT, seed: int) -> dict:
    """Random ones; 0.02 is the standard deviation for wide models, and this one is narrow.

    Kernels have the variance 1 / inputs instead, and what is added to patches is of their size.
    """
    config = model.config
    shape = (1, config.image_size, config.image_size, config.num_channels)
    params = jax.jit(model.init)(jax.random.key(seed), np.zeros(shape, np.float32))["params"]

    def scaled(path, x):
        if path[-1].key == "kernel":
            return x * (math.prod(x.shape[:-1]) * x.var()) ** -0.5
        return x * (_POSITION_STD / x.std()) if path[-1].key in ("cls_token", "position_embed") else x

    return jax.tree_util.tree_map_with_path(scaled, params)
