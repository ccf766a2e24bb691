"""PaTH attention: definition -> reference -> every implementation, then the properties that no single number shows."""

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

from pallas_kernels import explain, forgetting_attention, path_attention

GOLDEN_CASES = sorted(GOLDEN.glob("path_*.npz"))


# --- published numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", WITH_KERNELS)
@pytest.mark.parametrize("path", GOLDEN_CASES, ids=lambda path: path.stem)
def test_golden(path, implementation):
    """Outputs and gradients of the public PyTorch code in float64; it multiplies the gate by scale."""
    golden = np.load(path)
    scale = float(golden["scale"])
    names = {"q": "q", "k": "k", "v": "v", "w": "w", "beta": "beta", "log_forget": "g"}
    inputs = {ours: golden[theirs] for ours, theirs in names.items() if theirs in golden}
    batch, length, heads, _ = inputs["q"].shape
    (o, _), gradients = run_with_gradients(
        path_attention,
        inputs,
        (golden["do"], np.zeros((batch, heads, length))),
        segment_ids_of(golden["cu_seqlens"]) if "cu_seqlens" in golden else None,
        with_implementation(implementation, scale=scale, gate_scale=scale),
    )
    assert_close(o, golden["o_f64"], TOLERANCE["float32"]["output"], "o")
    assert_close(o, golden["o_triton"], TOLERANCE["float32"]["float16_kernel"], "o against the Triton kernel")
    for name, gradient in gradients.items():
        assert_close(gradient, golden[f"d{names[name]}_f64"], TOLERANCE["float32"]["gradient"], f"d{name}")


def test_golden_cases_are_present():
    assert len(GOLDEN_CASES) == 6


# --- the ladder ------------------------------------------------------------------------------------------------------

# Sizes, options and documents.
LADDER = {
    "no gate": (dict(length=70, kv_heads=4, gate=None), {}, None),
    "gate": (dict(length=70, head_dim=8), {}, None),
    "gate times scale, wide values": (
        dict(length=70, kv_heads=1, v_head_dim=24),
        dict(scale=0.3, gate_scale=0.3),
        None,
    ),
    "documents, gate, narrow values": (dict(length=150, batch=2, v_head_dim=8), dict(gate_scale=0.5), DOCUMENTS),
}


@pytest.mark.parametrize("case", LADDER)
def test_ladder(case):
    """In float64 the reference is the recurrence, and every implementation is the reference.

    Gradients of the reference are automatic differentiation of the definition.
    """
    sizes, options, segment_ids = LADDER[case]
    inputs = random_inputs(1, **sizes)
    o, lse = attention(**inputs, segment_ids=segment_ids, **options)
    with enable_x64(True):
        reference, xla = (
            run_with_gradients(
                path_attention,
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


def test_many_blocks():
    """1100 tokens: several levels of whatever hierarchy an implementation uses, none of them full."""
    inputs = random_inputs(4, 1100, heads=1, kv_heads=1, head_dim=8, gate=0.01)
    with enable_x64(True):
        xla, reference = (
            run_with_gradients(
                path_attention,
                cast(inputs, "float64"),
                random_cotangents(5, inputs),
                None,
                with_implementation(implementation),
            )
            for implementation in ("xla", "reference")
        )
        assert_all_close(xla, reference, "float64")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_finite_difference(implementation):
    """Every input moves at once."""
    inputs, directions = (random_inputs(seed, 70, head_dim=8) for seed in (6, 8))
    cotangents = random_cotangents(7, inputs)
    assert_slope(path_attention, inputs, directions, cotangents, with_implementation(implementation))


# T, H, Hv, K with N = 4: every value of every axis, lengths around the powers of two that block sizes are made of.
SHAPES = [
    (1, 20, 16, 2), (2, 8, 48, 1), (63, 64, 16, 4), (64, 100, 48, 1), (65, 20, 48, 2), (127, 100, 16, 2),
    (129, 20, 48, 4), (300, 64, 16, 2), (1000, 8, 48, 1),
]  # fmt: skip


@pytest.mark.parametrize("length, head_dim, v_head_dim, kv_heads", SHAPES)
def test_shapes(length, head_dim, v_head_dim, kv_heads):
    inputs = random_inputs(9, length, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_head_dim, gate=0.1)
    actual, desired = (
        run_with_gradients(
            path_attention,
            cast(inputs, "float32"),
            random_cotangents(10, inputs),
            None,
            with_implementation(implementation),
        )
        for implementation in ("xla", "reference")
    )
    assert actual[0][0].shape == (1, length, 4, v_head_dim)
    assert actual[0][1].shape == (1, 4, length)
    assert_all_close(actual, desired, "float32")


@pytest.mark.parametrize("implementation", WITH_KERNELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(dtype, implementation):
    """The output has q's dtype, also with w, beta, log_forget in float32; gradients have their inputs' dtypes."""
    inputs = cast(random_inputs(11, 65), "float32") | cast(
        {name: x for name, x in random_inputs(11, 65).items() if name in "qkv"}, dtype
    )
    (o, lse), gradients = jax.eval_shape(
        lambda inputs, cotangents: inspect.unwrap(run_with_gradients)(
            path_attention, inputs, cotangents, None, with_implementation(implementation)
        ),
        inputs,
        random_cotangents(12, inputs),
    )
    assert (o.dtype, lse.dtype) == (dtype, jnp.float32)
    assert {name: x.dtype for name, x in gradients.items()} == {name: x.dtype for name, x in inputs.items()}


# --- properties ------------------------------------------------------------------------------------------------------


def test_causality_is_exact():
    inputs, others = (cast(random_inputs(seed, 200, gate=0.1), "float32") for seed in (13, 14))
    assert_causal(path_attention, inputs, others, with_implementation("xla"))


@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_packed_documents_are_separate_documents(implementation):
    inputs = cast(random_inputs(15, DOCUMENTS.shape[1], batch=2), "float32")
    cotangents = random_cotangents(16, inputs)
    assert_documents_are_separate(path_attention, inputs, cotangents, DOCUMENTS, with_implementation(implementation))


@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_all_padding(implementation):
    inputs = cast(random_inputs(17, DOCUMENTS.shape[1], batch=2), "float32")
    segment_ids = np.zeros_like(DOCUMENTS)
    cotangents, options = random_cotangents(18, inputs), with_implementation(implementation)
    result = run_with_gradients(path_attention, inputs, cotangents, segment_ids, options)
    assert_padding_is_inert(result, segment_ids)


@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_beta_zero_is_forgetting_attention(implementation):
    inputs = random_inputs(21, DOCUMENTS.shape[1], batch=2)
    inputs["beta"][:] = 0
    inputs, cotangents = cast(inputs, "float32"), random_cotangents(22, inputs)
    options = with_implementation(implementation)
    outputs, gradients = run_with_gradients(path_attention, inputs, cotangents, DOCUMENTS, options)
    del inputs["w"], inputs["beta"], gradients["w"], gradients["beta"]
    desired = run_with_gradients(forgetting_attention, inputs, cotangents, DOCUMENTS, options)
    assert_all_close((outputs, gradients), desired, "float32")


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0, "all three"])
@pytest.mark.parametrize("same_w", [False, True], ids=["random w", "one w"])
def test_beta_at_its_ends(beta, same_w):
    """At 1 H is singular and at 2 a reflection; nothing may divide by either, nor by distances of w."""
    inputs = random_inputs(23, DOCUMENTS.shape[1], batch=2)
    shape = inputs["beta"].shape
    inputs["beta"] = np.random.default_rng(0).integers(0, 3, shape) if beta == "all three" else np.full(shape, beta)
    if same_w:
        inputs["w"] = np.broadcast_to(inputs["w"][:, :1], inputs["w"].shape)
    xla, reference = (
        run_with_gradients(
            path_attention,
            cast(inputs, "float32"),
            random_cotangents(24, inputs),
            DOCUMENTS,
            with_implementation(implementation),
        )
        for implementation in ("xla", "reference")
    )
    assert_all_close(xla, reference, "float32")


@pytest.mark.parametrize("prune, bound", [("auto", np.exp(-10.0)), (1e-3, 1e-3)], ids=["auto", "1e-3"])
@pytest.mark.parametrize("is_own_logit_small", [False, True])
def test_prune_keeps_its_bound(is_own_logit_small, prune, bound):
    """T = 1024 with two speeds of forgetting; a row whose own logit is far below the others needs more distance."""
    inputs = random_inputs(25, 1024, heads=2, kv_heads=1, gate=0.12)
    inputs["q"] = -0.5 * inputs["k"].repeat(2, axis=2) if is_own_logit_small else 0.1 * inputs["q"]
    inputs["log_forget"][..., 1] *= 0.5
    cotangents, options = random_cotangents(26, inputs), with_implementation("xla")
    assert_prune_keeps_its_bound(path_attention, inputs, cotangents, None, options, prune, bound)


# --- kinds of calls --------------------------------------------------------------------------------------------------


def valid_call():
    inputs = cast(random_inputs(26, 10, batch=2, head_dim=8, v_head_dim=6), "float32")
    return inputs | {"segment_ids": jnp.ones((2, 10), jnp.int32)}


@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_jit_is_eager(implementation):
    call = valid_call() | {"implementation": implementation}
    o, lse = path_attention(**call, return_lse=True)
    assert_close(path_attention(**call), o, TOLERANCE["float32"]["exact"], "o alone")
    inputs, segment_ids = valid_call(), call["segment_ids"]
    del inputs["segment_ids"]
    jitted_o, jitted_lse = run(path_attention, inputs, segment_ids, with_implementation(implementation))
    assert_close(jitted_o, o, TOLERANCE["float32"]["exact"], "o")
    assert_close(jitted_lse, lse, TOLERANCE["float32"]["exact"], "lse")


def test_default_implementation():
    o, lse = path_attention(**valid_call(), return_lse=True)
    desired_o, desired_lse = path_attention(**valid_call(), implementation="reference", return_lse=True)
    assert_close(o, desired_o, TOLERANCE["float32"]["output"], "o")
    assert_close(lse, desired_lse, TOLERANCE["float32"]["lse"], "lse")


def shaped(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


# Arguments that replace those of a valid call (q [2, 10, 4, 8], two key/value heads, v of 6), and what the text names.
INVALID = {
    "rank of q": (dict(q=shaped(10, 4, 8)), ["10, 4, 8"]),
    "rank of beta": (dict(beta=shaped(2, 10, 2, 1)), ["2, 10, 2, 1"]),
    "rank of log_forget": (dict(log_forget=shaped(2, 10)), ["2, 10"]),
    "heads do not divide": (
        dict(k=shaped(2, 10, 3, 8), w=shaped(2, 10, 3, 8), v=shaped(2, 10, 3, 6), beta=shaped(2, 10, 3)),
        ["4", "3"],
    ),
    "batch of k": (dict(k=shaped(3, 10, 2, 8)), ["3", "2"]),
    "head dim of k": (dict(k=shaped(2, 10, 2, 7)), ["8", "7"]),
    "length of k": (dict(k=shaped(2, 9, 2, 8)), ["10", "9"]),
    "length of q": (dict(q=shaped(2, 8, 4, 8)), ["10", "8"]),
    "length of v": (dict(v=shaped(2, 9, 2, 6)), ["10", "9"]),
    "heads of v": (dict(v=shaped(2, 10, 1, 6)), ["2", "1"]),
    "head dim of w": (dict(w=shaped(2, 10, 2, 7)), ["8", "7"]),
    "heads of w": (dict(w=shaped(2, 10, 4, 8)), ["2", "4"]),
    "heads of beta": (dict(beta=shaped(2, 10, 4)), ["2", "4"]),
    "length of beta": (dict(beta=shaped(2, 11, 2)), ["10", "11"]),
    "heads of log_forget": (dict(log_forget=shaped(2, 10, 2)), ["4", "2"]),
    "length of log_forget": (dict(log_forget=shaped(2, 9, 4)), ["10", "9"]),
    "integer q": (dict(q=shaped(2, 10, 4, 8, dtype="int32")), ["int32"]),
    "integer beta": (dict(beta=shaped(2, 10, 2, dtype="int32")), ["int32"]),
    "float segment_ids": (dict(segment_ids=shaped(2, 10)), ["float32"]),
    "length of segment_ids": (dict(segment_ids=shaped(2, 9, dtype="int32")), ["10", "9"]),
    "prune 0": (dict(prune=0.0), ["0"]),
    "prune 1": (dict(prune=1.0), ["1"]),
    "prune 1.5": (dict(prune=1.5), ["1.5"]),
    "prune -0.1": (dict(prune=-0.1), ["-0.1"]),
    "prune by another name": (dict(prune="often"), ["often"]),
    "prune without a gate": (dict(prune="auto", log_forget=None), ["log_forget"]),
    "unknown implementation": (dict(implementation="cuda"), ["cuda"]),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_call(case):
    changes, names = INVALID[case]
    operation = inspect.unwrap(path_attention)  # past a runtime type checker, which would speak first
    with pytest.raises(ValueError) as error:
        operation(**valid_call() | changes)
    for name in names:
        assert name in str(error.value), f"{name!r} is not in {str(error.value)!r}"


@pytest.mark.parametrize("name", ["tpu", "gpu", "triton"])
def test_unavailable_implementation(name):
    with pytest.raises(NotImplementedError, match=name):
        path_attention(**valid_call(), implementation=name)


def test_explain():
    reasons = explain(path_attention, **valid_call())
    assert reasons["reference"] is None and reasons["xla"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in reasons.values())
