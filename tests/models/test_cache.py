"""A whole model fed piece by piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.cache import CachePages, init_cache, unrolled

SHAPE = dict(vocab_size=31, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=64)
VARIANTS = {
    "path_fox": {},
    "fox pro": dict(mixer="fox", mixer_options=dict(kv_shift=True, qk_norm="head", output_norm=True, output_gate=True)),
    "gpt2": dict(mixer="nope", norm="layer", mlp="gelu", num_positions=90, tie_embeddings=True),
    "rope": dict(mixer="rope", tie_embeddings=True),
    "deltanet": dict(mixer="deltanet", num_kv_heads=None),
    "mamba": dict(mixer="mamba", num_kv_heads=None),
    "stick_breaking": dict(mixer="stick_breaking"),
    "hybrid": dict(
        num_layers=3, mixer="mamba+path_fox", mixer_options={"mamba": {"conv_size": 2}}, scan_layers=False, mlp="none"
    ),
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


SLOW = {"deltanet", "mamba", "stick_breaking"}  # tests/mixers has pieces of one layer


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in VARIANTS]
)
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


@pytest.mark.parametrize("mixer", ["stick_breaking", "deltanet", "mamba"])
def test_states_that_are_no_pages_are_not_shared(mixer):
    config = ModelConfig(**SHAPE | dict(mixer=mixer, num_kv_heads=None))
    with pytest.raises(ValueError, match="has no pages"):
        init_cache(config, 2, 64, num_pages=4)
    with pytest.raises(ValueError, match="has no pages to share"):
        CachePages(init_cache(config, 2, 64, superchunk=64))


@pytest.mark.parametrize("variant", ["path_fox", pytest.param("fox pro", marks=pytest.mark.slow)])
def test_requests_share_their_beginning(variant):
    """2048 tokens once, then two continuations as if each had been alone; a released row starts anew."""
    config = ModelConfig(**SHAPE | VARIANTS[variant], scan_layers=False)
    model, rng = DecoderLM(config), np.random.default_rng(2)
    shared, ends = rng.integers(0, 31, 2048), rng.integers(0, 31, (2, 20))
    tokens = np.stack([np.concatenate([shared, end]) for end in ends]).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:, :4])["params"]
    apply = jax.jit(lambda tokens, **keywords: model.apply({"params": params}, tokens, **keywords))
    open_of_parent = lambda cache: [np.asarray(x[0]) for state in cache for x in jax.tree.leaves(state.attention.open)]

    cache = init_cache(config, 2, 2176, superchunk=128, num_pages=18)
    pages = CachePages(cache)
    cache = apply(tokens[:, :2048], cache=pages.reserve(cache, [2048, 0]), lengths=jnp.array([2048, 0])).cache
    assert pages.num_used == 16
    parent = open_of_parent(cache)
    cache = pages.reserve(pages.fork(cache, 0, 1), 20)
    assert (pages.num_used, pages.num_free) == (18, 0)
    child = apply(tokens[:, 2048:], cache=cache, lengths=jnp.array([0, 20]))
    jax.tree.map(np.testing.assert_array_equal, open_of_parent(child.cache), parent)
    both = apply(tokens[:, 2048:], cache=child.cache, lengths=jnp.array([20, 0]))
    expected = apply(tokens).logits[:, 2048:]
    np.testing.assert_allclose(child.logits[1], expected[1], atol=1e-5)
    np.testing.assert_allclose(both.logits[0], expected[0], atol=1e-5)

    cache = pages.release(both.cache, 0)
    assert pages.num_used == 17
    anew = apply(tokens[:, :20], cache=pages.reserve(cache, [20, 0]), lengths=jnp.array([20, 0]))
    np.testing.assert_allclose(anew.logits[0], apply(tokens[:, :20]).logits[0], atol=1e-5)
