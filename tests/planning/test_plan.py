"""Plans of small models on the eight fake CPU devices, and the command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import lm_baselines, lm_path, rope_to_path
from path_jax.models.decoder_lm import count_parameters
from path_jax.parallel import attention
from path_jax.parallel.mesh import make_mesh
from path_jax.plan import plan, tables
from path_jax.planning.collectives import find_collectives
from path_jax.planning.compilation import compile_step, describe
from path_jax.planning.flops import attention_flops, product_flops
from path_jax.planning.memory import memory_by_kind
from path_jax.planning.topology import parse_topology

ROOT = Path(__file__).parents[2]
LAYERS, WIDTH, LENGTH, BATCH = 3, 64, 64, 16


def small(**mesh):
    """A RoPE model: 3 layers of width 64, 16 x 64 tokens."""
    config = lm_baselines.get_config("size=debug,mixer=rope").to_dict()
    config["model"]["num_layers"] = LAYERS
    config["data"] |= dict(source="tokens", path="", batch_size=BATCH, bos_id=1, vocab_size=257)  # there are no tokens
    config["mesh"] = dict(data=1, fsdp=1, sequence=1, tensor=1) | mesh
    return config


@pytest.fixture(scope="module")
def sharded():
    """(experiment, program, collectives) over fsdp = 4 and tensor = 2."""
    topology = parse_topology("cpu:8")
    experiment = describe(small(fsdp=4, tensor=2), topology)
    program = compile_step(experiment, topology, BATCH)
    found, num_unknown = find_collectives(program.hlo, dict(experiment.mesh.shape))
    assert num_unknown == 0
    return experiment, program, found


def sent(found, *, kind, axes, source):
    return sum(x.sent_bytes for x in found if x.kind == kind and x.axes == axes and re.search(source, x.source))


def test_kernels_of_layers_are_gathered_once_forward_and_once_backward(sharded):
    experiment, program, found = sharded
    shards = jax.tree.leaves(program.state.params["layers"])
    split = [x for x in shards if "fsdp" in jax.tree.leaves(tuple(x.sharding.spec))]
    # A device's group of 4 has the kernel but for the half of the other tensor shard.
    payload = sum(4 * x.dtype.itemsize * x.sharding.shard_shape(x.shape)[0] * 1.0 *
                  (x.size // x.shape[0]) / 8 for x in split)  # fmt: skip
    expected = 2 * payload * 3 / 4
    assert sent(found, kind="all-gather", axes="fsdp", source="layers/") == pytest.approx(expected, rel=0.1)


def test_tensor_parallel_layers_sum_activations_behind_both_projections(sharded):
    _, _, found = sharded
    activations = BATCH // 4 * LENGTH * WIDTH * 4
    forward = r"/jvp\(DecoderLM\)/.*(o_proj|down_proj)"
    expected = LAYERS * 2 * (2 * 1 / 2) * activations
    assert sent(found, kind="all-reduce", axes="tensor", source=forward) == pytest.approx(expected, rel=0.1)


def test_data_parallel_gradients_are_summed_once():
    topology = parse_topology("cpu:8")
    experiment = describe(small(data=8), topology)
    program = compile_step(experiment, topology, BATCH)
    found, _ = find_collectives(program.hlo, dict(experiment.mesh.shape))
    assert {x.axes for x in found} == {"data"}
    expected = 4 * count_parameters(experiment.model.config)
    assert sum(x.count * x.payload_bytes for x in found) == pytest.approx(expected, rel=0.1)


def test_flops_are_six_per_parameter_and_token_and_those_of_attention(sharded):
    experiment, program, _ = sharded
    config, tokens = experiment.model.config, BATCH * LENGTH
    matrices = count_parameters(config) - config.vocab_size * config.embed_dim
    attention = 12 * LAYERS * WIDTH * (LENGTH + 1) / 2 * tokens
    assert attention_flops(config, BATCH, LENGTH) == pytest.approx(attention)
    assert attention_flops(config, BATCH, LENGTH, 2) == pytest.approx(attention_flops(config, 4 * BATCH, LENGTH // 4))
    counted = product_flops(program.jaxpr.jaxpr, 8) + attention
    assert counted == pytest.approx(6 * matrices * tokens + attention, rel=0.2)
    model = config.train_flops_per_token(count_parameters(config), LENGTH) * tokens
    assert model == pytest.approx(6 * matrices * tokens + attention, rel=0.01)


@pytest.mark.parametrize("length", [512, 1024])  # chunks of 128, which XLA serves alone, and of 256
def test_flops_of_attention_between_the_chunks_of_a_ring(length):
    heads, dim, num_shards = 3, 8, 2
    q, k = (jax.ShapeDtypeStruct((1, length, n, dim), "float32") for n in (heads, 1))

    def step(q, k, v):
        return jax.grad(lambda *x: attention.forgetting_attention(*x).sum(), argnums=(0, 1, 2))(q, k, v)

    with jax.set_mesh(make_mesh({"sequence": num_shards}, devices=jax.devices()[:num_shards])):
        jaxpr = jax.make_jaxpr(step)(q, k, k)
    pairs, chunk = num_shards * (2 * num_shards - 1), length // (2 * num_shards)
    # Two products forward and five backward.
    assert product_flops(jaxpr.jaxpr, num_shards) == pairs * 2 * 7 * heads * dim * chunk**2


def test_memory_of_the_state_follows_from_shapes_and_shardings(sharded):
    _, program, _ = sharded
    memory = memory_by_kind(program)
    assert memory["optimizer"] == pytest.approx(2 * memory["params"], abs=64)  # and counters
    batch = 5 * 4 * BATCH * LENGTH // 4
    assert batch <= memory["batch"] <= batch + 64
    assert sum(memory.values()) == program.peak_bytes


def test_json_has_what_is_promised_and_tables_show_it():
    said = []
    result = plan(small(fsdp=8), "cpu:8", say=said.append, search=False)
    assert result["fits"] and json.loads(json.dumps(result)) == result
    promised = {"fits", "peak_bytes", "flops", "collectives", "step_seconds", "memory", "mesh", "num_devices"}
    assert promised <= result.keys()
    assert result["mesh"] == dict(data=1, fsdp=8, sequence=1, tensor=1)
    assert any(row["kind"] == "all-gather" and row["axes"] == "fsdp" for row in result["collectives"])
    assert result["step_seconds"] is None and "compiling" in said[0]
    assert len(tables(result)) == 3


@pytest.mark.parametrize("stage", ["mse", "kl"])
def test_conversions_count_their_teacher_without_a_checkpoint(stage):
    config = rope_to_path.get_config(f"size=debug,stage={stage}").to_dict()
    config["model"]["num_layers"] = 1
    result = plan(config, "cpu:1", say=lambda _: None, search=False)
    assert 0.8 < result["memory"]["teacher"] / result["memory"]["params"] < 1


def test_a_gpu_cluster_has_times_and_says_how_it_was_compiled():
    result = plan(small(fsdp=4, tensor=2), "h100:2x4", say=lambda _: None, search=False)
    assert result["bound"] in ("compute", "hbm", "network")
    assert result["step_seconds"] == max(result["seconds"].values()) > 0
    assert "CPU" in result["notes"][-1]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "path_jax.plan", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_what_does_not_fit_ends_with_status_1_and_names_the_largest_buffers():
    arguments = ("--config=configs/lm_path.py:size=debug", "--topology=cpu:2", "--memory_gib=0.0001", "--nosearch")
    done = command(*arguments, "--json")
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert not result["fits"] and result["peak_bytes"] > result["memory_bytes"]
    assert len(result["buffers"]) == 10 and result["buffers"][0]["bytes"] >= result["buffers"][-1]["bytes"] > 0
    assert "compiling" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (("--config=configs/lm_path.py:size=debug", "--topology=v5e"), "topology 'v5e' is not one of"),
        (("--config=configs/lm_path.py:size=tiny", "--topology=cpu:1"), "size=tiny is unknown"),
        (("--config=configs/lm_path.py:size=debug", "--topology=cpu:3"), "not a multiple of 3 data shards"),
        (("--config=configs/lm_path.py:size=debug", "--topology=cpu:1", "--config.model.mixer=cat"), "mixer='cat'"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, reason):
    done = command(*arguments)
    assert done.returncode == 1 and reason in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.tpu_aot
def test_debug_model_compiles_for_tpus():
    config = lm_path.get_config("size=debug").to_dict()
    result = plan(config, "v5e:2x2", say=lambda _: None, search=False)
    assert result["fits"] and 15 * 2**30 < result["memory_bytes"] < 16 * 2**30
    assert any(row["axes"] == "fsdp" for row in result["collectives"])
    assert result["flops"]["program"] == pytest.approx(result["flops"]["model"], rel=0.2)
