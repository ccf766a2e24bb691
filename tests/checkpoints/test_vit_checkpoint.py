"""Vision transformers against what transformers computes; files that do not fit.

`golden/vit`: config.json and tensor shapes of a ViTForImageClassification (transformers 5.23), and its logits and class
tokens after every block, with the weights and images that are drawn here.
"""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from path_jax.checkpoints.shards import write_tensors
from path_jax.checkpoints.vit import load_vit, vit_labels
from path_jax.models.vit import ViT

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "vit"
MODEL = json.loads((GOLDEN / "model.json").read_text())
LABELS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def draw_weights():
    """Uniform around 0, and around 1 for the scales of norms."""
    rng = np.random.Generator(np.random.PCG64(1))
    weights = {}
    for name in sorted(MODEL["shapes"]):
        is_scale = re.search(r"layernorm\w*\.weight$", name)
        weights[name] = rng.random(MODEL["shapes"][name], np.float32) - np.float32(0.5) + (1 if is_scale else 0)
    return weights


def write_model(path, weights, **changes):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MODEL["config"] | changes))
    save_file(weights, path / "model.safetensors")
    return path


def test_logits_and_streams_of_transformers(tmp_path):
    config, params = load_vit(write_model(tmp_path / "x", draw_weights()))
    assert (config.num_layers, config.num_heads, config.num_classes, config.norm_eps) == (3, 2, 7, 1e-12)
    assert vit_labels(tmp_path / "x") == LABELS
    images = np.random.Generator(np.random.PCG64(2)).random((2, 12, 12, 3), np.float32) * 2 - 1
    out = jax.jit(lambda params: ViT(config).apply({"params": params}, images))(params)
    golden = np.load(GOLDEN / "golden.npz")
    assert np.abs(out.logits - golden["logits"]).max() <= 2e-5 and golden["logits"].std() > 1
    assert np.abs(out.streams - golden["streams"]).max() <= 2e-5


def test_shards_dtypes_and_superfluous_pooler(tmp_path):
    weights = draw_weights()
    _, params = load_vit(write_model(tmp_path / "x", weights))
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "config.json").write_text(json.dumps(MODEL["config"]))
    pooler = {"vit.pooler.dense.bias": np.zeros(16, np.float32)}
    write_tensors(tmp_path / "y", (weights | pooler).items(), 9000)
    assert len(list((tmp_path / "y").glob("*.safetensors"))) > 2
    config, loaded = load_vit(tmp_path / "y", "bfloat16")
    assert config.dtype == "bfloat16"
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype("bfloat16"), y), params, loaded)


def test_what_does_not_fit_is_listed(tmp_path):
    weights = draw_weights()
    weights["vit.mask"] = weights.pop("vit.layernorm.bias")
    weights["classifier.bias"] = weights["classifier.bias"][:3]
    with pytest.raises(ValueError) as error:
        load_vit(write_model(tmp_path / "x", weights))
    for part in (
        "missing there: vit.layernorm.bias (16,)",
        "unknown to the model: vit.mask (16,)",
        "of another shape or type: classifier.bias (3,) (the model's is (7,))",
    ):
        assert part in str(error.value)


def test_other_models_are_refused_by_name(tmp_path):
    cases = (
        (dict(model_type="deit"), "model_type='deit' is not supported"),
        (dict(hidden_act="gelu_new"), "hidden_act='gelu_new' is not supported; it must be 'gelu'"),
        (dict(qkv_bias=False), "qkv_bias=False"),
        (dict(quantization_config={}), "quantization_config={}"),
        (dict(hidden_size="16"), "hidden_size is '16'; it must be a positive int"),
        (dict(image_size=[12, 12]), "image_size is"),
        (dict(patch_size=5), "image_size=12 is not a multiple of patch_size=5"),
        (dict(num_hidden_layers=10**9), "1000000000 layers, the files 5[0-9] tensors"),
        (dict(num_hidden_layers=True), "num_hidden_layers is True"),
        (dict(layer_norm_eps=-1), "layer_norm_eps is -1; it must be a positive float"),
        (dict(id2label={"1": "a"}), "id2label must map the numbers from 0 on"),
        (dict(id2label=7), "id2label must map"),
    )
    weights = draw_weights()
    for number, (change, reason) in enumerate(cases):
        with pytest.raises(ValueError, match=reason):
            load_vit(write_model(tmp_path / str(number), weights, **change))
    with pytest.raises(FileNotFoundError, match="has no file config.json"):
        load_vit(tmp_path / "absent")
