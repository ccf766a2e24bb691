"""Whisper against what transformers computes, in the files of Hugging Face and of CTranslate2.

`golden/whisper`: config.json and tensor shapes of a WhisperForConditionalGeneration (transformers 5.23), and its
encoder output, logits, residual streams and greedy text, with the weights and features that are drawn here.
"""

import json
import pathlib
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from path_jax.checkpoints.whisper import load_decoding, load_whisper
from path_jax.models.whisper import Whisper, transcribe

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "whisper"
MODEL = json.loads((GOLDEN / "model.json").read_text())
TYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")  # in the order of their numbers
# Of a weight, the largest of which is 3 for positions, 1.5 for scales of norms and 0.5 elsewhere.
TOLERANCE = dict(float32=0, float16=2e-3, bfloat16=1e-2, int8=2.5e-3, int16=3e-4)


def draw_weights():
    """Uniform around 0, more for the decoder's positions, and around 1 for the scales of norms."""
    rng = np.random.Generator(np.random.PCG64(MODEL["seed"]))
    weights = {}
    for name in sorted(MODEL["shapes"]):
        value = rng.random(MODEL["shapes"][name], np.float32) - np.float32(0.5)
        weights[name] = value * 6 if "decoder.embed_positions" in name else value + name.endswith("norm.weight")
    return weights


def draw_mel():
    return np.random.Generator(np.random.PCG64(4)).random((2, 8, 24), np.float32) * 2 - 1


def write_hf(path, weights, **changes):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MODEL["config"] | changes))
    save_file(weights, path / "model.safetensors")
    return path


def ct2_variables(weights):
    """Names and arrays of model.bin."""
    take = lambda name: weights[f"model.{name}"]
    variables = {}

    def norm(ours, theirs):
        variables.update({f"{ours}/gamma": take(f"{theirs}.weight"), f"{ours}/beta": take(f"{theirs}.bias")})

    def linear(ours, *theirs):
        biases = [weights.get(f"model.{name}.bias", np.zeros(16, np.float32)) for name in theirs]
        variables[f"{ours}/weight"] = np.concatenate([take(f"{name}.weight") for name in theirs])
        variables[f"{ours}/bias"] = np.concatenate(biases)

    for side, count in (("encoder", 2), ("decoder", 3)):
        variables[f"{side}/num_heads"] = np.int16(MODEL["config"][f"{side}_attention_heads"])
        variables[f"{side}/position_encodings/encodings"] = take(f"{side}.embed_positions.weight")
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for i in range(count):
            ours, theirs = f"{side}/layer_{i}", f"{side}.layers.{i}"
            norm(f"{ours}/self_attention/layer_norm", f"{theirs}.self_attn_layer_norm")
            linear(f"{ours}/self_attention/linear_0", *(f"{theirs}.self_attn.{x}_proj" for x in "qkv"))
            linear(f"{ours}/self_attention/linear_1", f"{theirs}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{ours}/attention/layer_norm", f"{theirs}.encoder_attn_layer_norm")
                linear(f"{ours}/attention/linear_0", f"{theirs}.encoder_attn.q_proj")
                linear(f"{ours}/attention/linear_1", *(f"{theirs}.encoder_attn.{x}_proj" for x in "kv"))
                linear(f"{ours}/attention/linear_2", f"{theirs}.encoder_attn.out_proj")
            norm(f"{ours}/ffn/layer_norm", f"{theirs}.final_layer_norm")
            linear(f"{ours}/ffn/linear_0", f"{theirs}.fc1")
            linear(f"{ours}/ffn/linear_1", f"{theirs}.fc2")
    for name in ("conv1", "conv2"):
        linear(f"encoder/{name}", f"encoder.{name}")
    variables["decoder/embeddings/weight"] = take("decoder.embed_tokens.weight")
    scalars = dict(activation=3, pre_norm=1, scale_embeddings=0, alibi=0, start_from_zero_embedding=0)
    variables |= {f"decoder/{name}": np.int8(value) for name, value in scalars.items()}
    return variables | {"decoder/alignment_layer": np.int16(-1), "decoder/alignment_heads": np.int16(1)}


def quantized(variables, kind):
    """As ct2-transformers-converter does: weights of int8 with a scale per row, of int16 with one."""
    stored = {}
    for name, value in variables.items():
        if not value.ndim:
            stored[name] = value
        elif kind in ("int8", "int16") and name.endswith("/weight"):
            axes, largest = (tuple(range(1, value.ndim)), 127) if kind == "int8" else (None, 1024)
            scale = (largest / np.abs(value).max(axis=axes, keepdims=True)).astype(np.float32)
            stored[name] = np.rint(value * scale).astype(kind)
            stored[f"{name}_scale"] = scale.reshape(-1 if kind == "int8" else ())
        else:
            type_ = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(kind, np.float32)
            stored[name] = value.astype(type_)
    return stored


def write_ct2(path, variables, aliases=(("decoder/projection/weight", "decoder/embeddings/weight"),)):
    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in sorted(variables.items()):
        sizes = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        data += string(name) + sizes + struct.pack("<BI", TYPES.index(str(value.dtype)), value.nbytes) + value.tobytes()
    data += struct.pack("<I", len(aliases)) + b"".join(string(alias) + string(target) for alias, target in aliases)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(suppress_ids=[5, 6], suppress_ids_begin=[7], lang_ids=[8])))
    (path / "model.bin").write_bytes(data)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Hugging Face directory."""
    return write_hf(tmp_path_factory.mktemp("whisper") / "hf", draw_weights())


def test_logits_and_streams_of_transformers(directory):
    golden = np.load(GOLDEN / "golden.npz")
    config, params = load_whisper(directory)
    assert (config.encoder_heads, config.decoder_heads, config.max_target_positions) == (2, 4, 14)

    @jax.jit
    def run(params):
        encoded = Whisper(config).apply({"params": params}, draw_mel(), method="encode")
        return encoded, Whisper(config).apply({"params": params}, golden["tokens"], encoded, method="decode")

    encoded, out = run(params)
    assert np.abs(encoded - golden["encoded"]).max() <= 2e-5
    assert np.abs(out.logits - golden["logits"]).max() <= 2e-5 and golden["logits"].std() > 1
    assert np.abs(out.streams - golden["streams"]).max() <= 2e-5


def test_text_of_transformers(directory):
    config, params = load_whisper(directory)
    options = {key: MODEL[key] for key in ("prompt_ids", "eos_id", "suppress_ids", "begin_suppress_ids")}
    ids = transcribe(Whisper(config), params, draw_mel(), max_new_tokens=10, **options)
    np.testing.assert_array_equal(ids, np.load(GOLDEN / "golden.npz")["transcript"])


@pytest.mark.parametrize("kind", TOLERANCE)
def test_every_type_of_ctranslate2(kind, directory, tmp_path):
    config, expected = load_whisper(directory)
    loaded_config, loaded = load_whisper(write_ct2(tmp_path / "x", quantized(ct2_variables(draw_weights()), kind)))
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected)):
        assert ours.dtype == "float32"
        assert np.abs(ours - theirs).max() <= TOLERANCE[kind]


def test_equal_arrays_are_stored_once_and_the_head_may_be_stored_twice(directory, tmp_path):
    weights, embedding = draw_weights(), "model.decoder.embed_tokens.weight"
    weights["model.encoder.layer_norm.bias"] = weights["model.decoder.layer_norm.bias"]
    variables = ct2_variables(weights)
    del variables["encoder/layer_norm/beta"]
    aliases = [("encoder/layer_norm/beta", "decoder/layer_norm/beta")]
    _, expected = load_whisper(write_hf(tmp_path / "hf", weights | {"proj_out.weight": weights[embedding]}))
    stored = quantized(variables, "int8")
    for side in ("embeddings", "projection"):
        for name in ("weight", "weight_scale"):
            variables[f"decoder/{side}/{name}"] = stored[f"decoder/embeddings/{name}"]
    _, loaded = load_whisper(write_ct2(tmp_path / "x", variables, aliases), "bfloat16")
    np.testing.assert_array_equal(loaded["encoder_norm"]["bias"], loaded["final_norm"]["bias"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=0.02), loaded, expected)
    with pytest.raises(ValueError, match="proj_out.weight differs from the embedding"):
        load_whisper(write_hf(tmp_path / "hf2", weights | {"proj_out.weight": weights[embedding] * 2}))


def test_other_models_are_refused_by_name(directory, tmp_path):
    weights, variables = draw_weights(), ct2_variables(draw_weights())
    for number, (change, reason) in enumerate((
        (dict(model_type="bart"), "model_type='bart' is not supported; it must be 'whisper'"),
        (dict(activation_function="relu"), "activation_function='relu'"),
        (dict(scale_embedding=True), "scale_embedding=True"),
        (dict(d_model=None), "d_model is None; it must be a positive int"),
        (dict(encoder_layers=10**8), "layers, the files"),
        (dict(decoder_layers=4), "missing there: model.decoder.layers.3"),
        (dict(decoder_layers=2), "unknown to the model: model.decoder.layers.2"),
    )):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            load_whisper(write_hf(tmp_path / str(number), weights, **change))
    no_key_bias = variables["decoder/layer_0/self_attention/linear_0/bias"] + 1
    for change, reason in (
        ({"decoder/activation": np.int8(0)}, "decoder/activation=0 is not supported; it must be 3"),
        ({"decoder/rotary_dim": np.int32(4)}, "decoder/rotary_dim=4 is not supported; it must be 0"),
        ({"decoder/num_heads": np.float32(4)}, "no integer decoder/num_heads"),
        ({"encoder/num_heads": np.int16(3)}, "embed_dim=16 is not a multiple of encoder_heads=3"),
        ({"encoder/conv1/weight": np.zeros((3, 4), np.float32)}, "has no encoder/conv1/weight of 3 axes"),
        ({"encoder/conv1/bias": np.zeros(16, np.int8)}, "encoder/conv1/bias .* int8 without a scale"),
        ({"encoder/conv1/bias": np.zeros(16, np.int32)}, "encoder/conv1/bias .* int32"),
        ({"decoder/layer_0/self_attention/linear_0/bias": no_key_bias}, "has a bias of keys"),
        ({"decoder/layer_4/x": np.zeros(3, np.float32)}, "unknown to the model: decoder/layer_4/x"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_whisper(write_ct2(tmp_path / "x", variables | change))
    stored = quantized(variables, "int8")
    stored["encoder/conv1/weight_scale"] = stored["encoder/conv1/weight_scale"] * 0
    with pytest.raises(ValueError, match="encoder/conv1/weight has a scale that is not a positive number"):
        load_whisper(write_ct2(tmp_path / "x", stored))


def test_damaged_files(tmp_path):
    variables = ct2_variables(draw_weights())
    data = (write_ct2(tmp_path / "x", variables) / "model.bin").read_bytes()
    name = b"encoder/conv1/bias\0"
    at = data.index(name)
    rank = at + len(name)
    alias = data.rindex(b"decoder/projection/weight\0")
    huge = struct.pack("<I", 2**32 - 1)
    for number, damaged in enumerate((
        *(data[:size] for size in (0, 3, 9, 20, 25, rank, rank + 3, len(data) // 2, len(data) - 1)),
        data + b"\0",
        struct.pack("<I", 5) + data[4:],
        data.replace(b"WhisperSpec", b"WhisperSpek"),
        data[:22] + huge + data[26:],  # variables
        data[: rank + 1] + huge + data[rank + 5 :],  # a size
        data[:rank] + b"\xff" + data[rank + 1 :],  # the rank
        data[: rank + 5] + b"\x06" + data[rank + 6 :],  # the type
        data[: rank + 6] + huge + data[rank + 10 :],  # the bytes
        data[: at - 2] + b"\xff\xff" + data[at:],  # the length of a name
        data[: at - 2] + b"\0\0" + data[at:],
        data.replace(name, name[:-1] + b"x"),
        data.replace(name, b"encoder/conv1\nbias\0"),
        data.replace(name, b"encoder/conv1/bi\xffs\0"),
        data.replace(name, b"encoder/conv2/bias\0"),  # twice
        data.replace(b"decoder/embeddings/weight\0", b"decoder/embeddings/weighs\0", 1),  # what the alias stands for
        data[: alias - 6] + huge + data[alias - 2 :],  # aliases
    )):  # fmt: skip
        (tmp_path / "x" / "model.bin").write_bytes(damaged)
        with pytest.raises(ValueError, match="model.bin is truncated or malformed") as error:
            load_whisper(tmp_path / "x")
        assert "\n" not in str(error.value), number
    (tmp_path / "x" / "model.bin").unlink()
    with pytest.raises(ValueError, match="model_type=None is not supported"):
        load_whisper(tmp_path / "x")
    (tmp_path / "x" / "model.bin").symlink_to(__file__)
    with pytest.raises(ValueError, match="outside the directory"):
        load_whisper(tmp_path / "x")


def test_special_tokens(directory, tmp_path):
    def write(path, first, **files):
        path.mkdir(exist_ok=True)
        names = ("endoftext", "startoftranscript", "en", "de", "transcribe", "notimestamps")
        added = [dict(id=first + i, content=f"<|{name}|>") for i, name in enumerate(names)]
        files = dict(tokenizer=dict(added_tokens=added), config={}) | files
        for name, content in files.items():
            (path / f"{name}.json").write_text(json.dumps(content))
        return path

    english = write(tmp_path / "a", 50256, config=dict(suppress_ids=[5, 6], suppress_ids_begin=[7]))
    assert load_decoding(english) == ((50257, 50261), 50256, (5, 6), (7,))
    generation = dict(suppress_tokens=[1], begin_suppress_tokens=None)
    multilingual = write(tmp_path / "b", 50257, config=dict(suppress_tokens=[9]), generation_config=generation)
    assert load_decoding(multilingual, "de") == ((50258, 50260, 50261, 50262), 50257, (1,), ())
    for path, language in ((english, "de"), (multilingual, "fr"), (multilingual, "endoftext")):
        with pytest.raises(ValueError, match=f"does not know the language '{language}'"):
            load_decoding(path, language)
    with pytest.raises(ValueError, match="does not have the added_tokens of Whisper"):
        load_decoding(write(tmp_path / "c", 0, tokenizer=dict(added_tokens=[dict(id=0)])))
    with pytest.raises(ValueError, match="suppress_ids or suppress_tokens must be a list of token ids"):
        load_decoding(write(tmp_path / "c", 0, config=dict(suppress_ids="all")))
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_decoding(directory)
