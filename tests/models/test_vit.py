"""The vision transformer's own properties; what it computes is compared in checkpoints/test_vit_checkpoint.py."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.models.vit import ViT, ViTConfig, abstract_params
from path_jax.nn.taps import BLOCK_TAPS, is_tap

CONFIG = ViTConfig(
    image_size=8, patch_size=4, num_channels=2, num_classes=5, num_layers=3, embed_dim=16, num_heads=2, mlp_dim=24
)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 2)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="config")
def run(params, config=CONFIG):
    return ViT(config).apply({"params": params}, IMAGES)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), abstract_params(CONFIG))


def test_lens_of_the_last_stream_is_the_output(params):
    model = ViT(CONFIG)
    out = run(params)
    assert (out.logits.shape, out.streams.shape) == ((2, 5), (3, 2, 16))
    lens = model.apply({"params": params}, out.streams, method="lens")
    assert lens.shape == (3, 2, 5) and lens.dtype == "float32"
    np.testing.assert_allclose(lens[-1], out.logits, atol=1e-5)
    assert np.abs(lens[0] - lens[-1]).max() > 0.1


def test_taps_show_and_replace_the_streams(params):
    model = ViT(CONFIG)

    def silence(call, args, kwargs, context):
        path = context.module.path
        return args[0] * 0 if path in (("layers_2", "mixer_out"), ("layers_2", "mlp_out")) else call(*args, **kwargs)

    @jax.jit
    def observe(params):
        out = model.apply({"params": params}, IMAGES, capture_intermediates=is_tap)
        with nn.intercept_methods(silence):
            return *out, model.apply({"params": params}, IMAGES)

    out, seen, edited = observe(params)
    taps = seen["intermediates"]
    assert set(taps) == {"layers_0", "layers_1", "layers_2"}
    assert set(taps["layers_0"]) == {*BLOCK_TAPS, "mixer"}
    assert set(taps["layers_0"]["mixer"]) == {"q", "k", "v", "attn_probs", "head_out"}
    for layer in range(3):
        np.testing.assert_array_equal(taps[f"layers_{layer}"]["resid_post"]["__call__"][0][:, 0], out.streams[layer])
    weights = taps["layers_1"]["mixer"]["attn_probs"]["__call__"][0]
    assert weights.shape == (2, 2, 5, 5)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(edited.streams[2], out.streams[1], atol=1e-6)


def test_low_precision_is_close_and_keeps_float32_logits(params):
    exact, out = run(params), run(params, dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert (out.logits.dtype, out.streams.dtype) == ("float32", "bfloat16")
    assert np.abs(out.logits - exact.logits).max() < 0.15 * np.abs(exact.logits).max()


def test_arguments_out_of_range(params):
    for change, reason in (
        (dict(num_layers=0), "num_layers=0 must be positive"),
        (dict(patch_size=3), "image_size=8 is not a multiple of patch_size=3"),
        (dict(num_heads=3), "embed_dim=16 is not a multiple of num_heads=3"),
        (dict(dtype="int8"), "dtype='int8' is unknown"),
        (dict(norm_eps=0.0), "norm_eps=0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=reason):
            dataclasses.replace(CONFIG, **change)
    for images in (IMAGES[0], IMAGES[:, :4], IMAGES[..., :1]):
        with pytest.raises(ValueError, match=r"the model takes \[B, 8, 8, 2\]"):
            ViT(CONFIG).apply({"params": params}, images)
