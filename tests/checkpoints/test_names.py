"""Name tables and configurations: the same data in both directions, and refusals by name."""

import dataclasses

import jax
import numpy as np
import pytest
from checkpoints.synthetic import GPT2, MODELS, SHAPE, random_params

from path_jax.checkpoints.dialects import DIALECTS, find_dialect, read_dialect, write_dialect
from path_jax.checkpoints.names import OPS, TABLES, check_stored, export_params, import_params, tensors_of
from path_jax.models import ModelConfig


@pytest.mark.parametrize("op", OPS)
def test_ops_are_inverses(op):
    x = np.arange(48.0).reshape((8, 6) if op != "conv" else (8, 1, 6))
    assert (OPS[op].to_theirs(OPS[op].to_ours(x, 4), 4) == x).all()


@pytest.mark.parametrize("table", TABLES)
def test_names_are_unique_and_each_of_ours_has_one(table):
    theirs = [row[1] for row in TABLES[table]]
    ours = [name for row in TABLES[table] for name in ([row[0]] if isinstance(row[0], str) else row[0])]
    assert len(set(theirs)) == len(theirs) and len(set(ours)) == len(ours)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name):
    format, config = MODELS[name]
    raw = write_dialect(config, format)
    assert dataclasses.replace(read_dialect(raw), mixer_options={}) == dataclasses.replace(
        config, mixer=read_dialect(raw).mixer, mixer_options={}
    )
    assert write_dialect(read_dialect(raw), format) == raw

    params = random_params(config)
    tensors = tensors_of(config, find_dialect(raw).table(config))
    stored = dict(export_params(config, tensors, params))
    check_stored("here", tensors, {key: (x.shape, None) for key, x in stored.items()})
    again = import_params(config, tensors, stored.__getitem__, lambda _, x: x)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_mismatches_are_listed_on_both_sides():
    tensors = tensors_of(MODELS["llama"][1], "llama")
    stored = {tensor.theirs: (tensor.shape, None) for tensor in tensors}
    stored["model.norm.weight"] = ((17,), None)
    stored["lm_head.weight"] = ((40, 16), "I8")
    stored["model.extra"] = stored.pop("model.embed_tokens.weight")
    with pytest.raises(ValueError) as error:
        check_stored("here", tensors, stored)
    for part in (
        "missing there: model.embed_tokens.weight (40, 16)",
        "unknown to the model: model.extra (40, 16)",
        "model.norm.weight (17,) (the model's is (16,))",
        "lm_head.weight (40, 16) I8",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_other_parameters_are_not_exported():
    _, config = MODELS["llama"]
    params = random_params(config)
    params["more"] = {"kernel": params.pop("final_norm")["scale"]}
    with pytest.raises(
        ValueError, match=r"only given: more/kernel \(16,\); only in the model: final_norm/scale \(16,\)"
    ):
        dict(export_params(config, tensors_of(config, "llama"), params))


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("fla-path", dict(attnres_block_size=4), "attnres_block_size=4 is not supported"),
        ("fla-path", dict(hidden_act="gelu"), "hidden_act='gelu' is not supported; it must be 'swish' or 'silu'"),
        ("fla-fox", dict(window_size=128), "window_size=128"),
        ("fox-llama", dict(fgate_type="fixed"), "fgate_type='fixed'"),
        ("fox-llama", dict(use_k_shift=True), "use_k_shift and use_v_shift differ"),
        ("fox-llama", dict(ogate_act="silu"), "ogate_act='silu'"),
        ("fox-llama", dict(num_kv_heads=2), "num_kv_heads=2"),
        ("llama", dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_scaling .* only rope_type 'default' is"),
        ("llama", dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5)), "rope_parameters .*llama3"),
        ("llama", dict(rope_theta=77.0), r"rope_theta is given as \[77.0, 10000.0\]"),
        ("llama", dict(mlp_bias=True), "mlp_bias=True"),
        ("llama", dict(quantization_config=dict(bits=4)), "quantization_config"),
        ("llama", dict(num_hidden_layers="two"), "num_hidden_layers is 'two'; it must be a positive integer"),
        ("llama", dict(vocab_size=float("inf")), "vocab_size is inf"),
        ("llama", dict(rope_theta=float("nan")), "rope_theta is nan"),
        ("llama", dict(hidden_size=True), "hidden_size is True; it must be a positive integer"),
        ("llama", dict(rms_norm_eps=None), "rms_norm_eps is None; it must be a positive number"),
        ("llama", dict(tie_word_embeddings=1), "tie_word_embeddings is 1; it must be true or false"),
        ("gpt2", dict(activation_function="relu"), "activation_function='relu'"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        ("llama", dict(model_type="mamba2"), "model_type 'mamba2' is not one of path_attn, .*, gpt2"),
        ("llama", dict(model_type=["llama"]), "model_type .* is not one of"),
    ],
)  # fmt: skip
def test_models_that_we_do_not_have_are_refused_by_name(name, change, reason):
    format, config = MODELS[name]
    with pytest.raises(ValueError, match=reason):
        read_dialect(write_dialect(config, format) | change)


@pytest.mark.parametrize(
    "format, config, reason",
    [
        ("fla", ModelConfig(**SHAPE, mixer="path_fox"), r"mixer.gate_scale=1.0 \(there 0.5\)"),
        ("fla", ModelConfig(**SHAPE, mixer="path", mixer_options=dict(beta_max=1.9)), "mixer.beta_max=1.9"),
        ("fla", ModelConfig(**SHAPE, mixer="path", mixer_options=dict(w_rank=8)), r"mixer.w_rank=8 \(there 32\)"),
        ("fla", ModelConfig(**SHAPE, mixer="fox", mixer_options=dict(kv_shift=True)), "mixer.kv_shift=True"),
        ("fla", ModelConfig(**SHAPE, mixer="rope"), "format 'fla' holds the mixers fox, path, path_fox; .* 'rope'"),
        ("fox", ModelConfig(**SHAPE, mixer="fox", num_kv_heads=2), r"num_kv_heads=2 \(there 4\)"),
        ("hf", ModelConfig(**SHAPE, mixer="rope", norm="layer"), r"norm='layer' \(there 'rms'\)"),
        ("hf", ModelConfig(**SHAPE, **GPT2), "n_positions is None"),
        ("hf", MODELS["fla-fox"][1], "holds the mixers nope, rope"),
        ("onnx", MODELS["llama"][1], "format='onnx' is unknown; choose from fla, fox, hf, native"),
    ],
)
def test_models_that_they_do_not_have_are_refused_by_name(format, config, reason):
    with pytest.raises(ValueError, match=reason):
        write_dialect(config, format)


def test_defaults_of_the_publishers_fill_in():
    raw = dict(vocab_size=40, num_hidden_layers=2, hidden_size=96, num_heads=4, model_type="path_attn")
    assert read_dialect(raw).mlp_dim == 256  # two thirds of 4 * 96, up to a multiple of 256
    assert read_dialect(raw | dict(hidden_ratio=8)).mlp_dim == 512
    assert read_dialect(raw).make_mixer().w_rank == 32
    raw = dict(vocab_size=40, n_layer=2, n_embd=16, n_head=4, n_positions=32, model_type="gpt2")
    assert read_dialect(raw).mlp_dim == 64 and read_dialect(raw).tie_embeddings


def test_further_keys_are_kept_but_never_win():
    raw = write_dialect(MODELS["llama"][1], "hf", dict(bos_token_id=7, hidden_size=1024, model_type="bert"))
    assert (raw["bos_token_id"], raw["hidden_size"], raw["model_type"]) == (7, 16, "llama")


def test_every_dialect_is_tested():
    tested = {write_dialect(config, format)["model_type"] for format, config in MODELS.values()}
    assert tested == set(DIALECTS)
