"""Published checkpoints against what their own code computes; files that others wrote, some of them with bad intent.

`golden/models/fla_path`: PaTHAttentionForCausalLM of flash-linear-attention 0.5.2, with forget gate, grouped heads, a
full-rank w and tied embeddings. `golden/models/fox_pro`: the Pro model of the official Forgetting Transformer. Both
hold random weights as that code saved them, with its logits (of every third token), token losses and greedy tokens.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import published
from checkpoints.synthetic import MODELS, random_params
from safetensors.numpy import load_file, save_file

from path_jax.checkpoints import load_pretrained, save_pretrained
from path_jax.models import DecoderLM
from path_jax.models.generate import generate
from path_jax.models.stacking import stack_layers
from path_jax.parallel.mesh import make_mesh

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
FORMATS = {"fla_path": "fla", "fox_pro": "fox"}
MAX_ERROR = {"logits": 2e-4, "loss": 1e-5}  # the standard deviation of logits is 2.6 (fla_path) and 1.6 (fox_pro)
INDEX = "model.safetensors.index.json"


def logits_of(config, params, tokens, segment_ids=None):
    scanned = DecoderLM(dataclasses.replace(config, scan_layers=True))
    apply = jax.jit(lambda params, *args: scanned.apply({"params": params}, *args).logits)
    return np.asarray(apply(stack_layers(params), tokens, None, segment_ids))


@pytest.mark.parametrize("name", FORMATS)
def test_published_logits_losses_and_continuation(name):
    golden = np.load(GOLDEN / name / "golden.npz")
    config, params = load_pretrained(GOLDEN / name)
    logits = logits_of(config, params, golden["input_ids"])
    assert np.abs(logits[:, ::3] - golden["logits"]).max() <= MAX_ERROR["logits"]

    text = golden["text_ids"]
    log_probability = jax.nn.log_softmax(logits_of(config, params, text[None])[0])
    loss = -log_probability[np.arange(len(text) - 1), text[1:]]
    assert abs(loss.mean() - golden["text_token_loss"].mean()) <= MAX_ERROR["loss"]

    prompt, expected = golden["greedy_prompt"], golden["greedy_ids"]
    model = DecoderLM(dataclasses.replace(config, scan_layers=True))
    tokens = generate(model, stack_layers(params), prompt, max_new_tokens=expected.shape[1])
    np.testing.assert_array_equal(tokens[:, prompt.shape[1] :], expected)


def test_published_packed_logits():
    """Their cumulative lengths [0, a, b, ...] are our documents 1 (tokens 0 ... a - 1), 2 (a ... b - 1), ..."""
    golden = np.load(GOLDEN / "fla_path" / "golden.npz")
    lengths = np.diff(golden["cu_seqlens"])
    segment_ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    logits = logits_of(*load_pretrained(GOLDEN / "fla_path"), golden["input_ids"], segment_ids)[:, ::3]
    assert np.abs(logits - golden["logits_packed"]).max() <= MAX_ERROR["logits"]
    assert np.abs(logits - golden["logits"]).max() > 1  # the documents matter


@pytest.mark.parametrize("name", ["llama", "llama-biases", "gpt2"])
def test_hugging_face_models_compute_what_their_description_says(name, tmp_path):
    _, config = MODELS[name]
    save_pretrained(tmp_path / "x", config, random_params(config), "hf")
    raw, weights = (
        json.loads((tmp_path / "x" / "config.json").read_text()),
        load_file(tmp_path / "x" / "model.safetensors"),
    )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 23)
    expected = (published.gpt2 if name == "gpt2" else published.llama)(raw, weights, tokens)
    logits = logits_of(*load_pretrained(tmp_path / "x"), tokens[None])[0]
    assert np.abs(logits - expected).max() <= 1e-4 and expected.std() > 0.5


@pytest.mark.parametrize("name", FORMATS)
def test_written_files_are_the_published_ones(name, tmp_path):
    save_pretrained(tmp_path / "x", *load_pretrained(GOLDEN / name), FORMATS[name])
    assert len({path.stat().st_mode for path in (tmp_path / "x").iterdir()}) == 1
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == (GOLDEN / name / "model.safetensors").read_bytes()
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (GOLDEN / name, tmp_path / "x"))
    assert {key for key in theirs.keys() & ours.keys() if theirs[key] != ours[key]} <= {"intermediate_size"}


def assert_trees_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("name", ["fla-path-fox", "fox-pro", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_dtypes_and_scanned_trees(name, dtype, tmp_path):
    format, config = MODELS[name]
    config = dataclasses.replace(config, dtype=dtype)
    params = random_params(config, dtype)
    scanned = dataclasses.replace(config, scan_layers=True)
    save_pretrained(tmp_path / "x", scanned, stack_layers(params), format, max_shard_bytes=2000)
    names = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert names[:2] == ["config.json", f"model-00001-of-{len(names) - 2:05d}.safetensors"] and len(names) > 4
    index = json.loads((tmp_path / "x" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    loaded_config, loaded = load_pretrained(tmp_path / "x", dtype)
    assert loaded_config.dtype == dtype and {str(x.dtype) for x in jax.tree.leaves(loaded)} == {dtype}
    assert_trees_equal(loaded, params)


@pytest.mark.parametrize("source", ["fla", "native"])
def test_tensors_go_to_their_devices(source, tmp_path):
    _, config = MODELS["fla-path"]
    params = random_params(config)
    save_pretrained(tmp_path / "x", config, params, source)
    _, loaded = load_pretrained(tmp_path / "x", sharding=make_mesh({"fsdp": 4, "tensor": 2}))
    assert_trees_equal(loaded, params)
    kernel = loaded["layers_0"]["mixer"]["q_proj"]["kernel"]
    assert kernel.sharding.spec == jax.P("fsdp", "tensor") and kernel.addressable_shards[0].data.shape == (4, 8)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    _, loaded = load_pretrained(tmp_path / "x", sharding=device)
    assert {x.sharding for x in jax.tree.leaves(loaded)} == {device}


@pytest.mark.parametrize("scan_layers", [True, False])
def test_native_round_trip(scan_layers, tmp_path):
    config = dataclasses.replace(MODELS["fox-pro"][1], scan_layers=scan_layers)
    params = random_params(config)
    save_pretrained(tmp_path / "x", config, stack_layers(params) if scan_layers else params, "native")
    loaded_config, loaded = load_pretrained(tmp_path / "x")
    assert loaded_config == dataclasses.replace(config, scan_layers=False)
    assert_trees_equal(loaded, params)


@pytest.fixture
def saved(tmp_path):
    """Function: name -> (directory of a saved synthetic model, its parameters)."""

    def save(name):
        format, config = MODELS[name]
        params = random_params(config)
        save_pretrained(tmp_path / name, config, params, format)
        return tmp_path / name, params

    return save


def rewrite(directory, change):
    """Passes the tensors of a directory through `change`, in place."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)


def test_what_other_writers_add_or_leave_out(saved):
    """The GPT-2 of the hub: no prefix, causal masks as tensors; and an output projection stored although tied."""
    directory, params = saved("gpt2")
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, 4, 4), np.float32) for i in range(2)}
    rewrite(directory, lambda x: {name.removeprefix("transformer."): value for name, value in x.items()} | masks)
    assert_trees_equal(load_pretrained(directory)[1], params)
    rewrite(directory, lambda x: x | {"lm_head.weight": x["wte.weight"]})
    assert_trees_equal(load_pretrained(directory)[1], params)
    rewrite(directory, lambda x: x | {"lm_head.weight": x["wte.weight"] + 1})
    with pytest.raises(ValueError, match="ties the embeddings, but lm_head.weight differs"):
        load_pretrained(directory)


def test_files_of_a_hub_cache_are_links(saved, tmp_path):
    directory, params = saved("llama")
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "revision"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in directory.iterdir():
        shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert_trees_equal(load_pretrained(snapshot)[1], params)


def test_mismatches_are_one_error(saved):
    directory, _ = saved("llama")

    def change(tensors):
        tensors["model.extra"] = tensors.pop("model.norm.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)
        return tensors | {"model.layers.1.mlp.up_proj.weight": np.zeros((3, 4), np.float32)}

    rewrite(directory, change)
    with pytest.raises(ValueError) as error:
        load_pretrained(directory)
    for part in (
        "missing there: model.norm.weight",
        "unknown to the model: model.extra",
        "up_proj.weight (3, 4)",
        "I32",
    ):
        assert part in str(error.value)


def header(text, data=b"\0" * 4):
    return struct.pack("<Q", len(text)) + text + data


ENTRY = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HOSTILE = {
    "empty": (b"", "is truncated"),
    "short": (b"\x08\0\0", "is truncated"),
    "longer than the file": (struct.pack("<Q", 10**18) + b"{}", "is truncated"),
    "huge header": (None, "a header of .* at most 16777216 are read"),
    "not JSON": (header(b"\xff\xfe{"), "not valid JSON"),
    "a list": (header(b"[1, 2]"), "expected a JSON object"),
    "deep": (header(b'{"a":' * 50_000), "not valid JSON"),
    "a key twice": (header(b"{" + ENTRY + b"," + ENTRY + b"}"), "the key 'a' appears twice"),
    "data cut off": (header(b"{" + ENTRY + b"}", b"\0"), "truncated or malformed at the tensor a"),
    "negative offsets": (header(b"{" + ENTRY.replace(b"[0,4]", b"[-4,0]") + b"}"), "malformed at the tensor a"),
    "no shape": (header(b'{"a":{"dtype":"F32"}}'), "malformed at the tensor a"),
    "garbage behind": (header(b"{" + ENTRY + b"}", b"\0" * 9), "does not fit the model"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_tensor_files(case, saved):
    directory, _ = saved("llama")
    data, reason = HOSTILE[case]
    with (directory / "model.safetensors").open("wb") as file:
        if data is None:  # sparse: takes no disk, and reading it whole would take 2 GiB of memory
            file.write(struct.pack("<Q", 2**31 - 8))
            file.truncate(2**31)
        else:
            file.write(data)
    with pytest.raises(ValueError, match=reason) as error:
        load_pretrained(directory)
    assert "\n" not in str(error.value)


def test_overlapping_tensors_are_refused(saved):
    """Names and shapes are right, but two tensors share their bytes: the safetensors package sees that."""
    directory, _ = saved("llama")
    path = directory / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + size])
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))
    entries[second]["data_offsets"] = entries[first]["data_offsets"]
    path.write_bytes(header(json.dumps(entries).encode(), data[8 + size :]))
    with pytest.raises(ValueError, match="is damaged"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    "file, reason",
    [
        ("../other/model.safetensors", "only files of that directory are read"),
        ("/etc/passwd.safetensors", "only files of that directory are read"),
        ("..", "only .safetensors files are read"),
        ("pytorch_model.bin", "only .safetensors files are read"),
        ("absent.safetensors", "has no file absent.safetensors"),
        ("link.safetensors", "is a link to .*, outside the directory"),
        (7, "has no weight_map"),
    ],
    ids=str,
)
def test_an_index_names_files_of_its_directory_only(file, reason, saved, tmp_path):
    directory, _ = saved("llama")
    (tmp_path / "other").mkdir()
    shutil.move(directory / "model.safetensors", tmp_path / "other" / "model.safetensors")
    (directory / "link.safetensors").symlink_to(tmp_path / "other" / "model.safetensors")
    names = load_file(tmp_path / "other" / "model.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        load_pretrained(directory)


def test_an_index_that_disagrees_with_its_files(saved):
    directory, _ = saved("llama")
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "part.safetensors"}}))
    with pytest.raises(ValueError, match="disagree about .* tensors"):
        load_pretrained(directory)
    (directory / INDEX).write_text('{"weight_map": {"a": "part.safetensors", "a": "part.safetensors"}}')
    with pytest.raises(ValueError, match="the key 'a' appears twice"):
        load_pretrained(directory)
    with (directory / INDEX).open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(ValueError, match="at most 16777216 are read"):
        load_pretrained(directory)


def test_a_pickle_is_not_opened(saved):
    directory, _ = saved("llama")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin, a pickle, .* convert it to safetensors"):
        load_pretrained(directory)
    with pytest.raises(ValueError, match="neither a directory with config.json nor a .gguf file"):
        load_pretrained(directory / "pytorch_model.bin")
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        load_pretrained(directory)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_pretrained(directory / "absent")


def test_absurd_configurations_cost_nothing(saved):
    directory, _ = saved("llama")
    raw = json.loads((directory / "config.json").read_text())
    for change, reason in (
        (dict(num_hidden_layers=2**31 - 1), "has 2147483647 layers, the files 21 tensors"),
        (dict(hidden_size=2**31 - 4, head_dim=8), "does not fit the model"),
        (
            dict(hidden_size=2**31 - 1, head_dim=2**31 - 2, num_attention_heads=2**31 - 1),
            "attention_heads|fit|multiple",
        ),
        (dict(num_hidden_layers=1000), "and .* more"),
        (dict(vocab_size=2**60), "vocab_size is"),
    ):
        (directory / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(ValueError, match=reason):
            load_pretrained(directory)


def test_malformed_run_directories(tmp_path):
    format, config = MODELS["fla-fox"]
    save_pretrained(tmp_path / "x", config, random_params(config), "native")
    _, half = load_pretrained(tmp_path / "x", "bfloat16")
    assert_trees_equal(half, jax.tree.map(lambda x: x.astype("bfloat16"), random_params(config)))
    model = json.loads((tmp_path / "x" / "config.json").read_text())["model"]
    for change in (dict(colour="red"), dict(mixer_options=7), dict(mixer_options=dict(colour="red"))):
        (tmp_path / "x" / "config.json").write_text(json.dumps({"model": model | change}))
        with pytest.raises(ValueError, match="the model section of config.json is malformed"):
            load_pretrained(tmp_path / "x")


def test_saving_never_overwrites_and_leaves_nothing_behind(tmp_path):
    format, config = MODELS["fla-fox"]
    params = random_params(config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match="name a new one"):
            save_pretrained(tmp_path / name, config, params, format)
    with pytest.raises(ValueError, match="holds the mixers"):
        save_pretrained(tmp_path / "a" / "b", config, params, "hf")
    with pytest.raises(ValueError, match="only in the model: final_norm/scale"):
        save_pretrained(tmp_path / "a" / "b", config, {k: v for k, v in params.items() if k != "final_norm"}, format)
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    save_pretrained(tmp_path / "empty", config, params, format)
    assert sorted(os.listdir(tmp_path / "empty")) == ["config.json", "model.safetensors"]


def test_learned_positions_bound_the_length():
    _, config = MODELS["gpt2"]
    model, params = DecoderLM(config), random_params(config)
    with pytest.raises(ValueError, match="33 tokens are more than the model's 32 learned positions"):
        jax.eval_shape(model.apply, {"params": params}, jnp.zeros((1, 33), jnp.int32))
