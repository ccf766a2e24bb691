"""Forgetting attention: definition -> reference -> every implementation, then the properties that no number shows."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.recurrence import (
    DOCUMENTS,
    GOLDEN,
    IMPLEMENTATIONS,
    TOLERANCE,
    WITH_KERNELS,
    assert_all_close,
    assert_causal,
    assert_close,
    assert_documents_are_separate,
    assert_padding_is_inert,
    assert_prune_keeps_its_bound,
    assert_slope,
    attention,
    cast,
    enable_x64,
    random_cotangents,
    random_inputs,
    run,
    run_with_gradients,
    segment_ids_of,
    with_implementation,
)

from pallas_kernels import explain, forgetting_attention

GOLDEN_CASES = sorted(GOLDEN.glob("fox_*.npz"))


# --- published numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", WITH_KERNELS)
@pytest.mark.parametrize("path", GOLDEN_CASES, ids=lambda path: path.stem)
def test_golden(path, implementation):
    """Outputs and gradients of the public PyTorch code in float64."""
    golden = np.load(path)
    names = {"q": "q", "k": "k", "v": "v", "log_forget": "g"}
    inputs = {ours: golden[theirs] for ours, theirs in names.items()}
    batch, length, heads, _ = inputs["q"].shape
    window = int(golden["window_size"]) if "window_size" in golden else None
    (o, _), gradients = run_with_gradients(
        forgetting_attention,
        inputs,
        (golden["do"], np.zeros((batch, heads, length))),
        segment_ids_of(golden["cu_seqlens"]) if "cu_seqlens" in golden else None,
        with_implementation(implementation, scale=float(golden["scale"]), window=window),
    )
    assert_close(o, golden["o_f64"], TOLERANCE["float32"]["output"], "o")
    for name, gradient in gradients.items():
        assert_close(gradient, golden[f"d{names[name]}_f64"], TOLERANCE["float32"]["gradient"], f"d{name}")


def test_golden_cases_are_present():
    assert len(GOLDEN_CASES) == 4


# --- the ladder ------------------------------------------------------------------------------------------------------

# Sizes, options and documents.
LADDER = {
    "gate": (dict(length=70, head_dim=8), {}, None),
    "no gate": (dict(length=70, kv_heads=4, gate=None), dict(log_forget=None, scale=0.3), None),
    "gate times scale, wide values": (dict(length=70, kv_heads=1, v_head_dim=24), dict(gate_scale=0.25), None),
    "window, narrow values": (dict(length=150, v_head_dim=8), dict(window=17), None),
    "window of one": (dict(length=70, kv_heads=1), dict(window=1), None),
    "window of a block, no gate": (dict(length=150, gate=None), dict(log_forget=None, window=64), None),
    "documents": (dict(length=150, batch=2), {}, DOCUMENTS),
    "one query": (dict(length=70, queries=1), {}, None),
    "fewer queries, window": (dict(length=150, queries=70), dict(window=40), None),
    "fewer queries, documents, window": (dict(length=150, queries=97, batch=2), dict(window=20), DOCUMENTS),
}


@pytest.mark.parametrize("case", LADDER)
def test_ladder(case):
    """In float64 the reference is the recurrence, and every implementation is the reference.

    Gradients of the reference are automatic differentiation of the definition.
    """
    sizes, options, segment_ids = LADDER[case]
    inputs = random_inputs(1, path=False, **sizes)
    o, lse = attention(**inputs, segment_ids=segment_ids, **options)
    with enable_x64(True):
        reference, xla = (
            run_with_gradients(
                forgetting_attention,
                cast(inputs, "float64"),
                random_cotangents(2, inputs),
                segment_ids,
                with_implementation(implementation, **options),
            )
            for implementation in ("reference", "xla")
        )
        assert reference[0][0].dtype == jnp.float64
        assert_close(reference[0][0], o, TOLERANCE["float64"]["definition"], "o of the reference")
        assert_close(reference[0][1], lse, TOLERANCE["float64"]["lse"], "lse of the reference")
        assert_all_close(xla, reference, "float64")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_finite_difference(implementation):
    """Every input moves at once."""
    inputs, directions = (random_inputs(seed, 70, head_dim=8, path=False) for seed in (4, 5))
    cotangents = random_cotangents(6, inputs)
    assert_slope(forgetting_attention, inputs, directions, cotangents, with_implementation(implementation))


# T, S, H, Hv, K with N = 4: every value of every axis, lengths around the powers of two that block sizes are made of.
SHAPES = [
    (1, 1, 20, 16, 2), (2, 2, 8, 48, 4), (63, 63, 64, 16, 1), (64, 64, 100, 48, 2), (65, 65, 20, 16, 4),
    (127, 127, 8, 16, 1), (65, 129, 100, 48, 4), (1, 300, 64, 48, 2), (300, 1000, 20, 16, 1),
    (1000, 1000, 8, 16, 2),
]  # fmt: skip


@pytest.mark.parametrize("queries, length, head_dim, v_head_dim, kv_heads", SHAPES)
def test_shapes(queries, length, head_dim, v_head_dim, kv_heads):
    inputs = random_inputs(
        7,
        length,
        queries=queries,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        path=False,
        gate=0.1,
    )
    actual, desired = (
        run_with_gradients(
            forgetting_attention,
            cast(inputs, "float32"),
            random_cotangents(8, inputs),
            None,
            with_implementation(implementation),
        )
        for implementation in ("xla", "reference")
    )
    assert actual[0][0].shape == (1, queries, 4, v_head_dim)
    assert actual[0][1].shape == (1, 4, queries)
    assert_all_close(actual, desired, "float32")


@pytest.mark.parametrize("implementation", WITH_KERNELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(dtype, implementation):
    """The output has q's dtype, also with log_forget in float32; gradients have their inputs' dtypes."""
    inputs = random_inputs(9, 65, path=False)
    gate = cast(inputs.pop("log_forget"), "float32")
    inputs = cast(inputs, dtype) | {"log_forget": gate}
    (o, lse), gradients = jax.eval_shape(
        lambda inputs, cotangents: inspect.unwrap(run_with_gradients)(
            forgetting_attention, inputs, cotangents, None, with_implementation(implementation)
        ),
        inputs,
        random_cotangents(10, inputs),
    )
    assert (o.dtype, lse.dtype) == (dtype, jnp.float32)
    assert {name: x.dtype for name, x in gradients.items()} == {name: x.dtype for name, x in inputs.items()}


# --- properties ------------------------------------------------------------------------------------------------------


def test_causality_is_exact():
    inputs, others = (cast(random_inputs(seed, 200, path=False, gate=0.1), "float32") for seed in (11, 12))
    assert_causal(forgetting_attention, inputs, others, with_implementation("xla"))


@pytest.mark.parametrize("implementation", WITH_KERNELS)
@pytest.mark.parametrize("window", [None, 20])
def test_packed_documents_are_separate_documents(window, implementation):
    inputs = cast(random_inputs(13, DOCUMENTS.shape[1], batch=2, path=False), "float32")
    cotangents, options = random_cotangents(14, inputs), with_implementation(implementation, window=window)
    assert_documents_are_separate(forgetting_attention, inputs, cotangents, DOCUMENTS, options)


@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_all_padding(implementation):
    inputs = cast(random_inputs(15, DOCUMENTS.shape[1], batch=2, path=False), "float32")
    segment_ids = np.zeros_like(DOCUMENTS)
    cotangents, options = random_cotangents(16, inputs), with_implementation(implementation, window=None)
    result = run_with_gradients(forgetting_attention, inputs, cotangents, segment_ids, options)
    assert_padding_is_inert(result, segment_ids)


@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_fewer_queries_are_the_last_rows(implementation):
    inputs = cast(random_inputs(17, 150, path=False), "float32")
    options = with_implementation(implementation, window=100)
    o, lse = run(forgetting_attention, inputs, None, options)
    last_o, last_lse = run(forgetting_attention, inputs | {"q": inputs["q"][:, -50:]}, None, options)
    assert_close(last_o, o[:, -50:], TOLERANCE["float32"]["output"], "o")
    assert_close(last_lse, lse[..., -50:], TOLERANCE["float32"]["lse"], "lse")


@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_window_over_everything_is_no_window(implementation):
    inputs = cast(random_inputs(18, 150, path=False), "float32")
    o, lse = run(forgetting_attention, inputs, None, with_implementation(implementation))
    for window in (150, 4000):
        window_o, window_lse = run(
            forgetting_attention, inputs, None, with_implementation(implementation, window=window)
        )
        assert_close(window_o, o, TOLERANCE["float32"]["exact"], "o")
        assert_close(window_lse, lse, TOLERANCE["float32"]["exact"], "lse")


@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_without_forgetting_it_is_causal_attention(implementation):
    inputs = cast(random_inputs(19, 150, path=False, gate=0.0), "float32")
    desired = jax.nn.dot_product_attention(inputs["q"], inputs["k"], inputs["v"], is_causal=True)
    o, _ = run(forgetting_attention, inputs, None, with_implementation(implementation))
    assert_close(o, desired, TOLERANCE["float32"]["output"], "o with log_forget = 0")
    del inputs["log_forget"]
    o, _ = run(forgetting_attention, inputs, None, with_implementation(implementation, log_forget=None))
    assert_close(o, desired, TOLERANCE["float32"]["output"], "o without log_forget")


# Sizes, options and documents at T = 1024.
PRUNE = {
    "own logit small": ({}, {}, None),
    "documents, gate times scale": ({}, dict(gate_scale=2.0), segment_ids_of([0, 10, 1024])),
    "window, fewer queries": (dict(queries=300), dict(window=900), None),
}


@pytest.mark.parametrize("prune, bound", [("auto", np.exp(-10.0)), (1e-3, 1e-3)], ids=["auto", "1e-3"])
@pytest.mark.parametrize("case", PRUNE)
def test_prune_keeps_its_bound(case, prune, bound):
    """Two speeds of forgetting; a row whose own logit is far below the others needs more distance."""
    sizes, options, segment_ids = PRUNE[case]
    inputs = random_inputs(22, 1024, heads=2, kv_heads=1, path=False, gate=0.12, **sizes)
    inputs["q"] = -0.5 * inputs["k"].repeat(2, axis=2) if case == "own logit small" else 0.1 * inputs["q"]
    inputs["log_forget"][..., 1] *= 0.5
    cotangents, options = random_cotangents(23, inputs), with_implementation("xla", **options)
    assert_prune_keeps_its_bound(forgetting_attention, inputs, cotangents, segment_ids, options, prune, bound)


# --- kinds of calls --------------------------------------------------------------------------------------------------


def valid_call():
    inputs = cast(random_inputs(24, 10, batch=2, head_dim=8, v_head_dim=6, path=False), "float32")
    return inputs | {"segment_ids": jnp.ones((2, 10), jnp.int32)}


@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_jit_is_eager(implementation):
    call = valid_call() | {"implementation": implementation}
    o, lse = forgetting_attention(**call, return_lse=True)
    assert_close(forgetting_attention(**call), o, TOLERANCE["float32"]["exact"], "o alone")
    inputs, segment_ids = valid_call(), call["segment_ids"]
    del inputs["segment_ids"]
    jitted_o, jitted_lse = run(forgetting_attention, inputs, segment_ids, with_implementation(implementation))
    assert_close(jitted_o, o, TOLERANCE["float32"]["exact"], "o")
    assert_close(jitted_lse, lse, TOLERANCE["float32"]["exact"], "lse")


def test_default_implementation():
    o, lse = forgetting_attention(**valid_call(), return_lse=True)
    desired_o, desired_lse = forgetting_attention(**valid_call(), implementation="reference", return_lse=True)
    assert_close(o, desired_o, TOLERANCE["float32"]["output"], "o")
    assert_close(lse, desired_lse, TOLERANCE["float32"]["lse"], "lse")


def shaped(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


# Arguments that replace those of a valid call (q [2, 10, 4, 8], two key/value heads, v of 6), and what the text names.
INVALID = {
    "rank of q": (dict(q=shaped(10, 4, 8)), ["10, 4, 8"]),
    "rank of v": (dict(v=shaped(2, 10, 12)), ["2, 10, 12"]),
    "rank of log_forget": (dict(log_forget=shaped(2, 10)), ["2, 10"]),
    "heads do not divide": (dict(k=shaped(2, 10, 3, 8), v=shaped(2, 10, 3, 6)), ["4", "3"]),
    "batch of k": (dict(k=shaped(3, 10, 2, 8)), ["3", "2"]),
    "head dim of k": (dict(k=shaped(2, 10, 2, 7)), ["8", "7"]),
    "length of v": (dict(v=shaped(2, 9, 2, 6)), ["10", "9"]),
    "heads of v": (dict(v=shaped(2, 10, 1, 6)), ["2", "1"]),
    "heads of log_forget": (dict(log_forget=shaped(2, 10, 2)), ["4", "2"]),
    "length of log_forget": (dict(log_forget=shaped(2, 9, 4)), ["10", "9"]),
    "more queries than keys": (dict(q=shaped(2, 12, 4, 8)), ["12", "10"]),
    "integer q": (dict(q=shaped(2, 10, 4, 8, dtype="int32")), ["int32"]),
    "integer log_forget": (dict(log_forget=shaped(2, 10, 4, dtype="int32")), ["int32"]),
    "float segment_ids": (dict(segment_ids=shaped(2, 10)), ["float32"]),
    "length of segment_ids": (dict(segment_ids=shaped(2, 9, dtype="int32")), ["10", "9"]),
    "segment_ids of the queries only": (
        dict(q=shaped(2, 3, 4, 8), segment_ids=shaped(2, 3, dtype="int32")),
        ["10", "3"],
    ),
    "window 0": (dict(window=0), ["0"]),
    "window -3": (dict(window=-3), ["-3"]),
    "prune 0": (dict(prune=0.0), ["0"]),
    "prune 1": (dict(prune=1.0), ["1"]),
    "prune 1.5": (dict(prune=1.5), ["1.5"]),
    "prune -0.1": (dict(prune=-0.1), ["-0.1"]),
    "prune by another name": (dict(prune="often"), ["often"]),
    "prune without a gate": (dict(prune=1e-3, log_forget=None), ["log_forget"]),
    "unknown implementation": (dict(implementation="cuda"), ["cuda"]),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_call(case):
    changes, names = INVALID[case]
    operation = inspect.unwrap(forgetting_attention)  # past a runtime type checker, which would speak first
    with pytest.raises(ValueError) as error:
        operation(**valid_call() | changes)
    for name in names:
        assert name in str(error.value), f"{name!r} is not in {str(error.value)!r}"


@pytest.mark.parametrize("name", ["tpu", "gpu", "triton"])
def test_unavailable_implementation(name):
    with pytest.raises(NotImplementedError, match=name):
        forgetting_attention(**valid_call(), implementation=name)


def test_explain():
    reasons = explain(forgetting_attention, **valid_call())
    assert reasons["reference"] is None and reasons["xla"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in reasons.values())
