"""The Mosaic GPU kernels in interpret mode, in bfloat16, against the reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.recurrence import (
    GOLDEN,
    TOLERANCE,
    random_inputs,
    relative_error,
    run_with_gradients,
    segment_ids_of,
    with_implementation,
)
from kernels.test_tpu import DOCUMENTS, compare, parameters

import pallas_kernels
from benchmarks.gpu_compile import GPUS, abstract_mesh
from pallas_kernels import explain, forgetting_attention, path_attention
from pallas_kernels.blockwise import xla_operation
from pallas_kernels.blockwise.gpu import schedule, self_test
from pallas_kernels.householder import frame_tree_rows

is_old = tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11)
needs_interpreter = pytest.mark.skipif(is_old, reason="the kernels need JAX 0.11 or later")
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")

CASES = {
    "path_fox, grouped": (path_attention, dict(length=400, heads=2, kv_heads=1, gate=0.05), {}),
    "fox, fewer queries, window, documents": (
        forgetting_attention,
        dict(length=400, queries=300, heads=2, kv_heads=1, path=False),
        dict(window=150, segment_ids=DOCUMENTS),
    ),
}
SLOW_CASES = {
    "path": (path_attention, dict(length=300, gate=None), {}),
    "path, one tile": (path_attention, dict(length=70, v_head_dim=24), {}),
    "path, documents": (path_attention, dict(length=400, heads=1, kv_heads=1), dict(segment_ids=DOCUMENTS)),
    "path, head dims": (path_attention, dict(length=260, heads=1, kv_heads=1, head_dim=96, v_head_dim=128), {}),
    "path, scales": (path_attention, dict(length=260, heads=1, kv_heads=1), dict(scale=-0.3, gate_scale=0.5)),
    "path, two rows": (path_attention, dict(length=260, batch=2), {}),
    "path, pruned": (path_attention, dict(length=700, heads=1, kv_heads=1, gate=3.0), dict(prune="auto")),
    "fox": (forgetting_attention, dict(length=300, path=False), {}),
    "fox, five tiles": (forgetting_attention, dict(length=620, heads=1, kv_heads=1, path=False), {}),
    "fox, two keys per query": (forgetting_attention, dict(length=300, path=False), dict(window=2)),
    "fox, pruned": (
        forgetting_attention,
        dict(length=700, heads=1, kv_heads=1, path=False, gate=3.0),
        dict(prune="auto"),
    ),
    "fox, head dims": (forgetting_attention, dict(length=140, path=False, head_dim=128, v_head_dim=72), {}),
}


FAST_CASES = {
    "path_fox, grouped": (path_attention, dict(length=400, heads=2, kv_heads=1, gate=0.05), {}),
}
SLOW_FAST_CASES = {
    "path": (path_attention, dict(length=300, gate=None), {}),
    "path, one tile": (path_attention, dict(length=70, v_head_dim=24), {}),
    "path, documents": (path_attention, dict(length=400, heads=1, kv_heads=1), dict(segment_ids=DOCUMENTS)),
    "path, head dims": (path_attention, dict(length=260, heads=1, kv_heads=1, head_dim=96, v_head_dim=40), {}),
    "path, wide": (path_attention, dict(length=700, heads=2, kv_heads=1, head_dim=128, v_head_dim=128), {}),
    "path, scales": (path_attention, dict(length=260, heads=1, kv_heads=1), dict(scale=-0.3, gate_scale=0.5)),
    "path, two rows": (path_attention, dict(length=260, batch=2), {}),
}


def assert_accurate(op, shape, options, dtype, implementation="gpu", w_dtype="float32"):
    """Within the tolerance of 16-bit inputs, and at most 1.25 times as far off as `xla` on the same.

    With 16-bit directions that holds for the output; gradients of versions are rounded once per level, which `xla` does
    in float32.
    """
    inputs = random_inputs(0, **shape)
    actual, desired = compare(op, inputs, dtype, implementation=implementation, w_dtype=w_dtype, **options)
    peer, _ = compare(op, inputs, dtype, implementation="xla", w_dtype=w_dtype, **options)
    np.testing.assert_allclose(actual[0][1], desired[0][1], atol=TOLERANCE["bfloat16"]["output"])  # log-sum-exp
    (out, _), gradients = jax.tree.map(relative_error, actual, desired)
    (peer_out, _), peer_gradients = jax.tree.map(relative_error, peer, desired)
    assert out <= min(TOLERANCE["bfloat16"]["output"], 1.25 * peer_out)
    for name, error in gradients.items():
        assert error <= TOLERANCE["bfloat16"]["gradient"], name
        most = 1.25 if w_dtype == "float32" else 2.5
        assert error <= most * peer_gradients[name], (name, error, peer_gradients[name])


@needs_interpreter
@pytest.mark.parametrize(
    "op, shape, options",
    parameters(CASES, SLOW_CASES),
)
def test_bfloat16(op, shape, options):
    with pallas_kernels.interpret():
        assert_accurate(op, shape, options, "bfloat16")


@needs_interpreter
@pytest.mark.parametrize("op, shape, options", parameters(FAST_CASES, SLOW_FAST_CASES))
def test_16_bit_directions(op, shape, options):
    """Then kernels do the linear stage too."""
    with pallas_kernels.interpret():
        assert_accurate(op, shape, options, "bfloat16", w_dtype="bfloat16")


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_golden(path):
    """Outputs and gradients of the public PyTorch code in float64, from inputs rounded to float16."""
    golden = np.load(path)
    op = path_attention if path.stem.startswith("path") else forgetting_attention
    names = {"q": "q", "k": "k", "v": "v", "w": "w", "beta": "beta", "log_forget": "g"}
    options = {"scale": float(golden["scale"])}
    if op is path_attention:
        options["gate_scale"] = options["scale"]
    if "window_size" in golden:
        options["window"] = int(golden["window_size"])
    inputs = {ours: golden[theirs] for ours, theirs in names.items() if theirs in golden}
    inputs = {name: jnp.asarray(x, "float16" if name in "qkv" else "float32") for name, x in inputs.items()}
    batch, length, heads, _ = inputs["q"].shape
    cotangents = jnp.asarray(golden["do"], "float16"), jnp.zeros((batch, heads, length), "float32")
    segment_ids = segment_ids_of(golden["cu_seqlens"]) if "cu_seqlens" in golden else None
    with pallas_kernels.interpret():
        (out, _), gradients = run_with_gradients(
            op, inputs, cotangents, segment_ids, with_implementation("gpu", **options)
        )
    assert relative_error(out, golden["o_f64"]) <= TOLERANCE["bfloat16"]["output"]
    for name, gradient in gradients.items():
        desired = golden[f"d{names[name]}_f64"]
        error = relative_error(gradient, desired) if desired.any() else np.abs(gradient).max()
        assert error <= TOLERANCE["bfloat16"]["gradient"], name


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("op, path", [(path_attention, True), (forgetting_attention, False)])
def test_float16_without_races(op, path):
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape = dict(length=400, heads=2, kv_heads=1, gate=0.05, path=path)
    with pallas_kernels.interpret(plgpu.InterpretGPUParams(detect_races=True)):
        assert_accurate(op, shape, dict(), "float16", w_dtype="float16")
    assert not get_races().races_found


LONG_CASES = {
    "path_fox, T 4096": (path_attention, dict(length=4096, heads=4, kv_heads=2, head_dim=128, gate=0.02), {}),
    "fox, T 5000": (forgetting_attention, dict(length=5000, heads=4, kv_heads=1, head_dim=64, path=False), {}),
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op, shape, options", parameters(CASES | SLOW_CASES | LONG_CASES, {}))
@pytest.mark.parametrize("w_dtype", [None, "float32"])
def test_on_the_gpu(op, shape, options, dtype, w_dtype):
    """On the device itself; run with JAX_PLATFORMS=cuda,cpu."""
    assert_accurate(op, shape, options, dtype, w_dtype=w_dtype or dtype)


@pytest.mark.gpu
@needs_gpu
def test_the_gpu_is_trusted():
    inputs = {name: jnp.asarray(x, "bfloat16") for name, x in random_inputs(0, 8, path=False).items()}
    assert explain(forgetting_attention, **inputs)["gpu"] is None


def test_what_the_kernels_refuse():
    inputs = {name: jnp.asarray(x, "bfloat16") for name, x in random_inputs(0, 8, path=False).items()}
    refusal = lambda inputs: explain(forgetting_attention, **inputs)["gpu"]
    if is_old:
        assert "JAX 0.11" in refusal(inputs)
        return
    assert refusal(inputs) is None
    assert "all float16" in refusal({name: x.astype("float32") for name, x in inputs.items()})
    wide = {name: jnp.repeat(x, 20, axis=-1) if x.ndim == 4 else x for name, x in inputs.items()}
    assert "at most 128" in refusal(wide)
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs only"):
        forgetting_attention(**inputs, implementation="gpu")


@needs_interpreter
def test_only_hopper_is_accepted():
    q, gates = jax.ShapeDtypeStruct((1, 256, 2, 64), "bfloat16"), jax.ShapeDtypeStruct((1, 256, 2), "float32")
    reasons = {}
    for name, gpu in GPUS.items():
        with jax.sharding.use_abstract_mesh(abstract_mesh(gpu)):
            reasons[name] = explain(forgetting_attention, q, q, q, gates)["gpu"]
    assert reasons["h100"] is None
    assert "8.0" in reasons["a100"] and "10.0" in reasons["b200"]


@pytest.mark.slow
def test_self_test_finds_wrong_kernels():
    xla = xla_operation.refuses, xla_operation.forward, xla_operation.backward
    assert self_test.disagreement(*xla) is None

    def wrong_forward(options, inputs):
        out, lse, kept = xla_operation.forward(options, inputs)
        return out.at[:, 300].multiply(1.5), lse, kept

    assert "differs" in self_test.disagreement(xla[0], wrong_forward, xla[2])
    nan_backward = lambda *arguments: jax.tree.map(lambda x: x * jnp.nan, xla_operation.backward(*arguments))
    assert "differs" in self_test.disagreement(*xla[:2], nan_backward)

    def failing(*arguments):
        raise ValueError("no such instruction")

    assert "no such instruction" in self_test.disagreement(xla[0], failing, xla[2])
    assert self_test.failure("gpu") is None  # no GPU to ask


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 8, 13])
def test_rows_of_the_tree_meet_every_pair_once(num_tiles):
    expected = {tuple(row) for row in frame_tree_rows(num_tiles).tolist()}
    by_query = schedule.query_rows(num_tiles, num_tiles, True, None)
    found = [
        (tile, b, version, keys + b - first)
        for version, tile, first, end, keys in by_query.table.tolist()
        for b in range(first, end)
    ]
    assert len(found) == len(expected) and set(found) == expected
    by_key = schedule.key_rows(num_tiles, num_tiles, True, None)
    found = [
        (a, tile, queries + a - first, version)
        for version, tile, first, end, queries in by_key.table.tolist()
        for a in range(first, end)
    ]
    assert len(found) == len(expected) and set(found) == expected
    for rows in (by_query, by_key):
        for tile in range(num_tiles):
            assert (rows.table[rows.starts[tile] : rows.starts[tile + 1], 1] == tile).all()


@pytest.mark.parametrize("window", [None, 1, 2, 129, 130, 300])
def test_rows_of_a_window(window):
    num_queries, num_keys, tile = 3, 5, schedule.TILE
    distance = np.arange(tile * num_keys)[-tile * num_queries :, None] - np.arange(tile * num_keys)
    visible = (distance >= 0) & (distance < (window or np.inf))
    needed = visible.reshape(num_queries, tile, num_keys, tile).any((1, 3))
    for rows, table in ((needed, schedule.query_rows), (needed.T, schedule.key_rows)):
        for _, own, first, end, version in table(num_queries, num_keys, False, window).table.tolist():
            assert version == first
            np.testing.assert_array_equal(np.flatnonzero(rows[own]), np.arange(first, end))
