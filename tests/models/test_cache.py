"""A whole model fed piece by piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.cache import init_cache, unrolled

SHAPE = dict(vocab_size=31, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=64)
VARIANTS = {
    "path_fox": {},
    "fox pro": dict(mixer="fox", mixer_options=dict(kv_shift=True, qk_norm="head", output_norm=True, output_gate=True)),
    "gpt2": dict(mixer="nope", norm="layer", mlp="gelu", num_positions=90, tie_embeddings=True),
    "rope": dict(mixer="rope", tie_embeddings=True),
}


def full_and_pieces(config, params, tokens, lengths, *, width, superchunk):
    """Logits of the whole, and of ragged pieces of at most `width` tokens; rows are `lengths` long."""
    config, params = unrolled(config, params)
    apply = jax.jit(lambda *arguments, **keywords: DecoderLM(config).apply({"params": params}, *arguments, **keywords))
    expected = np.asarray(apply(tokens).logits)
    cache = init_cache(config, len(tokens), tokens.shape[1], superchunk=superchunk)
    starts, actual, rng = np.zeros(len(tokens), int), np.zeros_like(expected), np.random.default_rng(0)
    while (starts < lengths).any():
        count = np.minimum(rng.integers(0, width + 1, len(tokens)), lengths - starts)
        piece = np.zeros((len(tokens), width), np.int32)
        for row, (start, n) in enumerate(zip(starts, count)):
            piece[row, :n] = tokens[row, start : start + n]
        out = apply(piece, cache=cache, lengths=jnp.asarray(count))
        cache = out.cache
        for row, (start, n) in enumerate(zip(starts, count)):
            actual[row, start : start + n] = out.logits[row, :n]
        starts += count
    return expected, actual


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_equal_the_whole(variant):
    config = ModelConfig(**SHAPE | VARIANTS[variant])
    tokens = np.random.default_rng(1).integers(0, 31, (2, 90)).astype(np.int32)
    params = jax.jit(DecoderLM(config).init)(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: 3 * x, params)
    lengths = np.array([90, 70])
    expected, actual = full_and_pieces(config, params, tokens, lengths, width=25, superchunk=64)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(actual[row, :length], expected[row, :length], atol=1e-4)


def test_rows_are_no_longer_than_learned_positions():
    with pytest.raises(ValueError, match="90 learned positions"):
        init_cache(ModelConfig(**SHAPE | VARIANTS["gpt2"]), 1, 91)
