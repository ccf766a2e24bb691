"""Gate statistics of scanned and unrolled models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.data import Document
from path_jax.evaluation.gates import GateStatistics
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.stacking import unstack_layers

TOKENS = np.append(256, np.random.default_rng(0).integers(0, 256, 31)).astype(np.int32)
DOCUMENTS = [Document("a", TOKENS)]


def make_model(mixer, **options):
    config = ModelConfig(257, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, mixer=mixer, **options)
    model = DecoderLM(config)
    return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]


def test_means_follow_from_the_biases():
    model, params = make_model("path_fox", num_kv_heads=2, remat="full")
    mixer = params["layers"]["mixer"]
    for name in ("forget_proj", "beta_proj"):
        mixer[name]["kernel"] = jnp.zeros_like(mixer[name]["kernel"])
        bias = mixer[name]["bias"]
        mixer[name]["bias"] = jnp.arange(bias.size, dtype=bias.dtype).reshape(bias.shape)
    result = GateStatistics(model, DOCUMENTS, length=16)(params)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    expected = {f"forget_gate/layer{i}/head{j}": sigmoid(4 * i + j) for i in range(2) for j in range(4)}
    expected |= {f"beta/layer{i}/head{j}": 2 * sigmoid(2 * i + j) for i in range(2) for j in range(2)}
    assert result == pytest.approx(expected, rel=1e-5)


def test_unrolled_equals_scanned():
    model, params = make_model("path_fox")
    unrolled = DecoderLM(dataclasses.replace(model.config, scan_layers=False))
    scanned_result = GateStatistics(model, DOCUMENTS, length=16)(params)
    unrolled_result = GateStatistics(unrolled, DOCUMENTS, length=16)(unstack_layers(params))
    assert unrolled_result == pytest.approx(scanned_result, rel=1e-5)
    assert len(scanned_result) == 16


@pytest.mark.parametrize("mixer, names", [("nope", set()), ("fox", {"forget_gate"}), ("path", {"beta"})])
def test_only_gates_that_exist(mixer, names):
    model, params = make_model(mixer)
    assert {name.split("/")[0] for name in GateStatistics(model, DOCUMENTS, length=16)(params)} == names


def test_bad_options():
    model, _ = make_model("nope")
    with pytest.raises(ValueError, match="length=0"):
        GateStatistics(model, DOCUMENTS, length=0)
    with pytest.raises(ValueError, match="too few for one text of 64"):
        GateStatistics(model, DOCUMENTS, length=64)
