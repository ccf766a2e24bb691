"""The TPU kernels in interpret mode: definition -> reference -> kernels, in float32 and in bfloat16.

The suites of the two operations run their properties on the kernels as well, marked slow.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kernels.recurrence import (
    TOLERANCE,
    assert_all_close,
    assert_close,
    assert_padding_is_inert,
    cast,
    enable_x64,
    random_cotangents,
    random_inputs,
    relative_error,
    run_with_gradients,
    unit,
    with_implementation,
)

import pallas_kernels
from pallas_kernels import forgetting_attention, path_attention
from pallas_kernels.blockwise.tpu import operation

# Ids that no float32 tells apart.
DOCUMENTS = np.repeat([0, 2**30 + 1, 2**30 + 2, 3, 0], [5, 120, 160, 90, 25])[None].astype(np.int32)


def in_float64(op, inputs, cotangents, segment_ids=None, **options):
    """The reference on the same numbers."""
    with enable_x64(True):
        inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, "float64"), (inputs, cotangents))
        call = with_implementation("reference", **options)
        return jax.tree.map(np.asarray, run_with_gradients(op, inputs, cotangents, segment_ids, call))


def compare(op, inputs, dtype="float32", segment_ids=None, implementation="tpu", w_dtype=None, **options):
    """Output, lse and gradients as `run_with_gradients` returns them: those of the kernels and in float64."""
    do, dlse = random_cotangents(1, inputs)
    dtypes = {"beta": "float32", "log_forget": "float32", "w": w_dtype or dtype}
    inputs = {name: jnp.asarray(x, dtypes.get(name, dtype)) for name, x in inputs.items()}
    cotangents = jnp.asarray(do, dtype), jnp.asarray(dlse)
    actual = run_with_gradients(op, inputs, cotangents, segment_ids, with_implementation(implementation, **options))
    return actual, in_float64(op, inputs, cotangents, segment_ids, **options)


def parameters(cases, slow_cases):
    """{name: arguments} of both as pytest parameters."""
    named = lambda cases, **marks: [pytest.param(*case, id=name, **marks) for name, case in cases.items()]
    return named(cases) + named(slow_cases, marks=pytest.mark.slow)


# Three superchunks of 128 and a tail; the tree above them has two levels, the second of them not full.
CASES = {
    "path_fox, grouped": (path_attention, dict(length=400, heads=2, kv_heads=1), {}),
    "fox, fewer queries, window, documents": (
        forgetting_attention,
        dict(length=400, queries=300, heads=2, kv_heads=1, path=False),
        dict(window=150, segment_ids=DOCUMENTS),
    ),
}
SLOW_CASES = {
    "path": (path_attention, dict(length=300, gate=None), {}),
    "path, one superchunk": (path_attention, dict(length=70, v_head_dim=24), {}),
    "path, one token": (path_attention, dict(length=1), {}),
    "path, documents": (path_attention, dict(length=400, heads=1, kv_heads=1), dict(segment_ids=DOCUMENTS)),
    "path, head dims": (path_attention, dict(length=140, heads=1, kv_heads=1, head_dim=96, v_head_dim=256), {}),
    "path, scales": (path_attention, dict(length=140, heads=1, kv_heads=1), dict(scale=-0.3, gate_scale=0.5)),
    "path, two rows": (path_attention, dict(length=140, batch=2), {}),
    "path, superchunks of 256": (path_attention, dict(length=1024, heads=1, kv_heads=1, gate=0.05), {}),
    "fox": (forgetting_attention, dict(length=300, path=False), {}),
    "fox, five superchunks": (forgetting_attention, dict(length=620, heads=1, kv_heads=1, path=False), {}),
    "fox, scale below 0": (forgetting_attention, dict(length=140, path=False), dict(scale=-0.3)),
    "fox, one key per query": (forgetting_attention, dict(length=300, path=False), dict(window=1)),
    "fox, head dims": (forgetting_attention, dict(length=140, path=False, head_dim=256, v_head_dim=96), {}),
}


@pytest.mark.parametrize(
    "op, shape, options",
    parameters(CASES, SLOW_CASES),
)
def test_float32(op, shape, options):
    with pallas_kernels.interpret():
        actual, desired = compare(op, random_inputs(0, **shape), **options)
    assert_all_close(actual, desired, "float32")
    if "segment_ids" in options and "queries" not in shape:
        assert_padding_is_inert(actual, options["segment_ids"])


@pytest.mark.slow
def test_bfloat16():
    """Directions in bfloat16 as well, so that the kernels compute on bfloat16 matrix units throughout."""
    inputs = random_inputs(2, 520, heads=1, kv_heads=1, head_dim=64, gate=0.05)
    actual, desired = compare_in_bfloat16(inputs, "bfloat16")
    assert_within_tolerance(jax.tree.map(relative_error, actual, desired))


REGIMES = {"near 0": (0.0, 0.1, 0.0), "anywhere": (0.0, 2.0, 0.0), "near 2": (1.9, 2.0, 0.0), "alike": (1.9, 2.0, 0.8)}


@pytest.mark.slow
@pytest.mark.parametrize("w_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_regimes(head_dim, regime, w_dtype, record_property):
    """Directions in float32 make the linear stage float32: then no error exceeds 1.25 times that of `xla`."""
    low, high, cosine = REGIMES[regime]
    inputs = random_inputs(3, 1024, heads=1, kv_heads=1, head_dim=head_dim, gate=0.05)
    rng = np.random.default_rng(4)
    common = unit(rng.standard_normal(head_dim))
    inputs["w"] = unit(np.sqrt(cosine) * common + np.sqrt(1 - cosine) * inputs["w"])
    inputs["beta"] = rng.uniform(low, high, inputs["beta"].shape)
    actual, desired = compare_in_bfloat16(inputs, w_dtype)
    errors = jax.tree.map(relative_error, actual, desired)
    peers = jax.tree.map(relative_error, compare_in_bfloat16(inputs, w_dtype, "xla")[0], desired)
    ratios = {"o": errors[0][0] / peers[0][0]} | {name: error / peers[1][name] for name, error in errors[1].items()}
    for name, ratio in ratios.items():
        record_property(name, float(ratio))
    print(errors[0][0], errors[1], ratios)
    assert_within_tolerance(errors)
    assert ratios["o"] <= 1.25
    if w_dtype == "float32":
        assert max(ratios.values()) <= 1.25, ratios


def compare_in_bfloat16(inputs, w_dtype, implementation="tpu"):
    """As `compare`; beta is clipped where rounding makes a direction longer than 1."""
    squared = np.sum(np.square(np.asarray(jnp.asarray(inputs["w"], w_dtype), np.float64)), -1)
    inputs = inputs | {"beta": np.minimum(inputs["beta"], 2 / squared)}
    with pallas_kernels.interpret():
        return compare(path_attention, inputs, "bfloat16", implementation=implementation, w_dtype=w_dtype)


def assert_within_tolerance(errors):
    (output, _), gradients = errors
    assert output <= TOLERANCE["bfloat16"]["output"]
    assert max(gradients.values()) <= TOLERANCE["bfloat16"]["gradient"], gradients


@pytest.mark.slow
@pytest.mark.parametrize("op", [path_attention, forgetting_attention])
def test_prune_keeps_its_bound(op):
    """Nothing is dropped that matters, and something is: small logits make the bound tight enough to show."""
    inputs = random_inputs(5, 640, heads=2, kv_heads=1, path=op is path_attention, gate=0.057)
    inputs["q"] *= 0.02
    with pallas_kernels.interpret():
        pruned, desired = compare(op, inputs, prune=1e-3)
        whole, _ = compare(op, inputs)
    assert np.max(np.abs(pruned[0][0] - whole[0][0])) <= 2e-3 * np.max(np.abs(inputs["v"]))
    assert not np.array_equal(pruned[0][0], whole[0][0])
    for name, gradient in pruned[1].items():
        assert_close(gradient, desired[1][name], 1e-2, f"d{name}")


@pytest.mark.slow
def test_kept_versions_are_the_recomputed_ones():
    inputs = cast(random_inputs(6, 300, heads=2, kv_heads=1), "float32")
    do, dlse = cast(random_cotangents(7, inputs), "float32")
    call = path_attention.as_call(**inputs)
    kept, recomputed = (
        _run_both(dataclasses.replace(call.options, interpret=True, keep_versions=keep), call, do, dlse)
        for keep in (True, False)
    )
    jax.tree.map(np.testing.assert_array_equal, kept, recomputed)


def _run_both(options, call, do, dlse):
    out, lse, kept = operation.forward(options, call.inputs)
    assert (kept is not None) == options.keep_versions
    return operation.backward(options, call.inputs, out, lse, kept, do, dlse)


@pytest.mark.slow
@pytest.mark.parametrize("op", [path_attention, forgetting_attention])
def test_no_data_races(op):
    inputs = random_inputs(8, 400, heads=2, kv_heads=1, path=op is path_attention)
    with pallas_kernels.interpret(pltpu.InterpretParams(detect_races=True)):
        actual, desired = compare(op, inputs)
    assert_all_close(actual, desired, "float32")
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the detector has no public result

    assert not interpret_pallas_call.races.races_found


def test_elsewhere_it_says_what_to_do():
    inputs = cast(random_inputs(9, 64), "float32")
    for run in (path_attention, jax.jit(path_attention, static_argnames="implementation")):
        with pytest.raises(NotImplementedError, match="interpret"):
            run(**inputs, implementation="tpu")


def test_where_a_tpu_is_expected_other_platforms_have_the_same_results(monkeypatch):
    """The program then keeps what the kernels would, zeros on other platforms."""
    monkeypatch.setattr(operation.tuning, "is_tpu_expected", lambda: True)
    inputs = cast(random_inputs(12, 64), "float32")
    loss = lambda implementation: lambda inputs: path_attention(**inputs, implementation=implementation).sum()
    found, expected = (jax.jit(jax.value_and_grad(loss(name)))(inputs) for name in (None, "xla"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_programs_for_a_tpu_get_the_kernels():
    inputs = cast(random_inputs(10, 300), "float32")
    assert "tpu_custom_call" not in str(jax.jit(path_attention).lower(**inputs).as_text())
    for options in ({}, {"implementation": "tpu"}):
        exported = jax.export.export(
            jax.jit(lambda inputs, o=options: path_attention(**inputs, **o)), platforms=["tpu"]
        )
        assert "tpu_custom_call" in exported(inputs).mlir_module()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_refuses_other_precisions(dtype):
    with enable_x64(True):
        inputs = {name: jax.ShapeDtypeStruct(x.shape, dtype) for name, x in random_inputs(11, 64).items()}
        reason = pallas_kernels.explain(path_attention, **inputs)["tpu"]
    assert dtype in reason
