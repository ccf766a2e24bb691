"""Attention over sharded sequences against the unsharded operation, and what it sends."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels.blockwise import pairs
from pallas_kernels.householder import span_frames
from path_jax.parallel import attention
from path_jax.parallel.mesh import make_mesh
from path_jax.parallel.ring_attention import _arriving, _Settings
from path_jax.parallel.zigzag import from_zigzag, to_zigzag

COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def arrays(kind, length, *, batch=1, num_heads=4, num_kv_heads=2, dim=16, value_dim=24, dtype=jnp.float32):
    """Arguments of the operation; directions are of unit length."""
    keys = jax.random.split(jax.random.key(length), 6)
    normal = lambda i, *shape: jax.random.normal(keys[i], (batch, length, *shape), dtype)
    q, k, v = normal(0, num_heads, dim), normal(1, num_kv_heads, dim), normal(2, num_kv_heads, value_dim)
    w = normal(3, num_kv_heads, dim)
    w /= jnp.linalg.norm(w, axis=-1, keepdims=True)
    beta = 2 * jax.nn.sigmoid(normal(4, num_kv_heads))
    log_forget = None if kind in ("path", "plain") else jax.nn.log_sigmoid(normal(5, num_heads) + 4)
    return (q, k, v, w, beta, log_forget) if kind.startswith("path") else (q, k, v, log_forget)


def documents(length, batch=1):
    """Three documents, cut within shards, and padding."""
    ids = np.ones((batch, length), np.int32)
    for place in (length // 5, length // 2 + 3):
        ids[:, place:] += 1
    ids[:, length - length // 10 :] = 0
    return jnp.asarray(ids)


def operation(module, kind):
    return module.path_attention if kind.startswith("path") else module.forgetting_attention


def compiled(kind, mesh, inputs, options):
    """A program for output and gradients, its inputs placed on the mesh."""
    spec = P(("data", "fsdp"), "sequence")
    placed = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec)), inputs)

    def run(inputs, cotangent):
        arrays, ids = inputs
        out, pullback = jax.vjp(lambda a: operation(attention, kind)(*a, segment_ids=ids, **options), arrays)
        return out, pullback(cotangent)[0]

    with jax.set_mesh(mesh):
        cotangent = placed[0][2].repeat(placed[0][0].shape[2] // placed[0][2].shape[2], axis=2)
        return jax.jit(run).lower(placed, cotangent).compile(), (placed, cotangent)


def assert_as_unsharded(kind, mesh, inputs, options, tolerance=1e-5):
    program, (placed, cotangent) = compiled(kind, mesh, inputs, options)
    out, gradients = program(placed, cotangent)
    arrays, ids = inputs
    reference = lambda a: operation(pallas_kernels, kind)(*a, segment_ids=ids, **options)
    expected, pullback = jax.vjp(jax.jit(reference), arrays)
    expected = (expected, pullback(np.asarray(cotangent))[0])
    for found, wanted in zip(jax.tree.leaves((out, gradients)), jax.tree.leaves(expected)):
        found, wanted = np.asarray(found), np.asarray(wanted)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    return program


@pytest.mark.parametrize(
    "kind, shape, length, has_documents, options",
    [
        ("path_fox", {"sequence": 4}, 256, True, {"gate_scale": 0.5}),
        ("path", {"sequence": 3}, 192, False, {"scale": 0.3}),
        ("fox", {"data": 2, "sequence": 2, "tensor": 2}, 128, True, {"window": 40}),
        ("plain", {"sequence": 2}, 64, False, {}),
    ],
)
def test_output_and_gradients_are_those_of_one_device(kind, shape, length, has_documents, options):
    mesh = make_mesh(shape, devices=jax.devices()[: math.prod(shape.values())])
    inputs = (arrays(kind, length, batch=2), documents(length, batch=2) if has_documents else None)
    assert_as_unsharded(kind, mesh, inputs, options)


def test_chunks_longer_than_a_tile(monkeypatch):
    """Three tiles of keys in each chunk."""
    monkeypatch.setattr(pairs, "_TILES", (32, 16))
    inputs = (arrays("path_fox", 192), documents(192))
    assert_as_unsharded("path_fox", make_mesh({"sequence": 2}, devices=jax.devices()[:2]), inputs, {})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["path_fox", "fox"])
def test_tpu_kernels_within_and_between_chunks(kind):
    inputs = (arrays(kind, 1024, num_heads=2, num_kv_heads=1), documents(1024))
    with pallas_kernels.interpret():
        mesh = make_mesh({"sequence": 2}, devices=jax.devices()[:2])
        program = assert_as_unsharded(kind, mesh, inputs, {"implementation": "tpu"})
    assert_little_is_gathered(program, limit=4 * 16 * 16)


@pytest.mark.slow
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("kind", ["path", "path_fox", "fox"])
def test_long_sequence_on_eight_devices(kind, has_documents):
    """Output, gradients, collectives and memory at T = 4096."""
    inputs = (arrays(kind, 4096, dim=64, value_dim=64), documents(4096) if has_documents else None)
    program = assert_as_unsharded(kind, make_mesh({"sequence": 8}), inputs, {})
    assert_little_is_gathered(program, limit=8 * 2 * 64 * 64)
    one_device = compiled(kind, make_mesh({}, devices=jax.devices()[:1]), inputs, {})[0]
    assert memory(program) <= 0.2 * memory(one_device)


def memory(program):
    found = program.memory_analysis()
    return found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes


def assert_little_is_gathered(program, limit):
    found = [(kind, shape) for shape, kind in COLLECTIVE.findall(program.as_text())]
    assert any(kind == "collective-permute" for kind, _ in found)
    for kind, shapes in found:
        sizes = [math.prod(map(int, filter(None, x.split(",")))) for x in re.findall(r"\[([\d,]*)\]", shapes)]
        assert kind == "collective-permute" or max(sizes) <= limit, (kind, shapes)


def test_only_transitions_and_gates_are_gathered():
    """Sequences, here 512 x 4 x 16 numbers of q, would be four times the limit."""
    inputs = (arrays("path_fox", 512), documents(512))
    program, _ = compiled("path_fox", make_mesh({"sequence": 4}, devices=jax.devices()[:4]), inputs, {})
    assert_little_is_gathered(program, limit=4 * 2 * 16 * 16)


def test_documents_in_other_shards_change_nothing():
    mesh = make_mesh({"sequence": 2}, devices=jax.devices()[:2])
    inputs, ids = arrays("path_fox", 64), documents(64)
    changed = tuple(x.at[:, :12].multiply(1.5) for x in inputs)  # of the first document
    with jax.set_mesh(mesh):
        run = jax.jit(lambda a: attention.path_attention(*a, segment_ids=ids))
        first, second = (np.asarray(run(x)) for x in (inputs, changed))
    assert np.abs(first[:, :12] - second[:, :12]).max() > 0.01
    np.testing.assert_allclose(first[:, 12:], second[:, 12:], atol=1e-6)  # they share products with the first document
    assert not first[:, 64 - 6 :].any()


@pytest.mark.parametrize("num_shards", [2, 3, 8])
def test_zigzag_has_equal_work_and_comes_back(num_shards):
    """Every shard has an early and a late chunk; over all hops each pair of chunks is computed once."""
    settings = _Settings("sequence", num_shards, None, pairs.PairOptions(1.0))
    mesh = make_mesh({"sequence": num_shards}, devices=jax.devices()[:num_shards])
    x = jnp.arange(2 * num_shards)[None]
    there = jax.shard_map(
        lambda x: to_zigzag(x, "sequence"), mesh=mesh, in_specs=P(None, "sequence"), out_specs=P(None, None, "sequence")
    )
    back = jax.shard_map(
        lambda x: from_zigzag(x, "sequence"),
        mesh=mesh,
        in_specs=P(None, None, "sequence"),
        out_specs=P(None, "sequence"),
    )
    chunks = np.asarray(there(x))[:, 0]
    np.testing.assert_array_equal(chunks, [range(num_shards), range(2 * num_shards - 1, num_shards - 1, -1)])
    np.testing.assert_array_equal(back(there(x)), x)
    arriving = jax.shard_map(
        lambda x: jnp.stack(_arriving(settings))[:, None],
        mesh=mesh,
        in_specs=P("sequence"),
        out_specs=P(None, "sequence"),
    )
    source, is_before = np.asarray(arriving(jnp.arange(num_shards)))
    found, work = [], []
    for shard in range(num_shards):
        own = [(chunks[1, shard], chunks[0, m]) for m in source[shard]]
        later = [0 if early else 1 for early in is_before[shard, 1:]]
        own += [(chunks[i, shard], chunks[i, m]) for i, m in zip(later, source[shard, 1:])]
        found += own
        work.append(len(own))
    assert max(work) == min(work) == 2 * num_shards - 1
    expected = [(c, b) for c in range(2 * num_shards) for b in range(c)]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("length", [40, 200])
def test_span_frames_reach_across_a_border(length):
    """Queries behind a border and keys before it meet in a plain product: the logits of the unsharded definition."""
    q, k, _, w, beta, _ = arrays("path", 2 * length, dtype=jnp.float32)
    first, second = (
        span_frames(*(x[:, half] for x in (q, k, w, beta))) for half in (slice(length), slice(length, None))
    )
    logits = jnp.einsum("btkgh,bskh->bkgts", second.query.reshape(1, length, 2, 2, -1), first.key)

    def of_query(i):
        """Keys of the first half, moved through all reflections up to token i."""
        moved = first.key
        for t in range(length, i + 1):
            w_t, beta_t = w[:, t], beta[:, t]
            moved = moved - (beta_t[:, None] * jnp.einsum("bskh,bkh->bsk", moved, w_t))[..., None] * w_t[:, None]
        return jnp.einsum("bkgh,bskh->bkgs", q[:, i].reshape(1, 2, 2, -1), moved)

    for i in (length, length + 33):
        np.testing.assert_allclose(logits[:, :, :, i - length], of_query(i), atol=2e-5)
    identity = span_frames(q, k, w, jnp.zeros_like(beta))
    np.testing.assert_array_equal(identity.key, k)
    np.testing.assert_allclose(identity.transition, np.broadcast_to(np.eye(16), (1, 2, 16, 16)), atol=1e-7)


def test_chunks_that_cannot_be_cut_are_refused():
    mesh = make_mesh({"sequence": 2}, devices=jax.devices()[:2])
    inputs = arrays("plain", 4 * 514, num_heads=1, num_kv_heads=1, dim=4, value_dim=4)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="2056 tokens on 2 sequence shards are 4 chunks of 514"):
        jax.eval_shape(attention.forgetting_attention, *inputs)


def test_sizes_that_a_mesh_does_not_divide_stay_whole():
    """Seven tokens on two shards, three rows on two devices, one head on two: as without a mesh."""
    inputs = arrays("fox", 7, batch=3, num_heads=1, num_kv_heads=1)
    expected = pallas_kernels.forgetting_attention(*inputs)
    with jax.set_mesh(make_mesh({"data": 2, "sequence": 2, "tensor": 2})):
        found = jax.jit(attention.forgetting_attention)(*inputs)
    np.testing.assert_allclose(found, expected, atol=1e-6)
