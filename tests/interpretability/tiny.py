"""Small models with random parameters, and tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.decoder_lm import abstract_params

VOCAB, WIDTH, HEADS, MLP, BATCH, LENGTH = 13, 16, 2, 24, 3, 9
OPTIONS = {"hyena": {"filter_length": 16, "filter_width": 8}, "h3": {"state_size": 4}, "mamba": {"state_size": 4}}
rng = np.random.default_rng(0)
BASE, SOURCE = (jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32) for _ in range(2))


@functools.cache
def tiny(mixer, num_layers=2, **config):
    """Model and parameters, unrolled; kernels and embeddings are N(0, 1/4), norm scales and biases N(1, 1/4)."""
    options = dict(vocab_size=VOCAB, mlp_dim=MLP, mixer_options=OPTIONS.get(mixer, {}), scan_layers=False) | config
    config = ModelConfig(num_layers=num_layers, embed_dim=WIDTH, num_heads=HEADS, mixer=mixer, **options)
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray((x.ndim == 1) + 0.25 * rng.standard_normal(x.shape), x.dtype)
    return DecoderLM(config), jax.tree.map(draw, abstract_params(config))
