"""Error of PaTH attention on bfloat16 inputs, over long sequences and in the regimes where reflections are hardest.

The yardstick is the definition in float64 on the same rounded numbers: q, k, v in bfloat16; w, beta, log_forget in
float32. Rounding the output to bfloat16 alone costs 1.6e-3.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.recurrence import (
    TOLERANCE,
    WITH_KERNELS,
    enable_x64,
    random_cotangents,
    random_inputs,
    relative_error,
    run,
    run_with_gradients,
    unit,
    with_implementation,
)

from pallas_kernels import forgetting_attention, path_attention

IMPLEMENTATIONS = WITH_KERNELS[1:]  # without the reference, which is the yardstick here
BETA = {"near 0": (0.0, 0.1), "anywhere": (0.0, 2.0), "near 2": (1.9, 2.0)}


def rounded_inputs(seed, length, head_dim, beta=(0.0, 2.0), cosine=0.0, gate=None):
    """Inputs in the dtypes of training; `cosine` is the mean cosine between two w."""
    inputs = random_inputs(seed, length, heads=1, kv_heads=1, head_dim=head_dim, gate=gate)
    rng = np.random.default_rng(seed + 1)
    inputs["beta"] = rng.uniform(*beta, inputs["beta"].shape)
    inputs["w"] = unit(np.sqrt(cosine) * unit(rng.standard_normal(head_dim)) + np.sqrt(1 - cosine) * inputs["w"])
    return {name: jnp.asarray(x, "bfloat16" if name in "qkv" else "float32") for name, x in inputs.items()}


def in_float64(function, *args, op=path_attention):
    """The reference implementation of `function` (`run` or `run_with_gradients`) on the same numbers."""
    with enable_x64(True):
        args = jax.tree.map(lambda x: jnp.asarray(x, "float64"), args)
        return jax.tree.map(np.asarray, _OPTIMISED[function](op, *args, None, with_implementation("reference")))


# The definition moves gigabytes at these lengths, which pays for the compiler's default effort.
_OPTIMISED = {
    function: jax.jit(inspect.unwrap(function), static_argnames=("op", "options"))
    for function in (run, run_with_gradients)
}


def report(record_property, errors):
    for name, error in errors.items():
        record_property(name, float(error))
        print(f"{name} {error:.1e}", end="  ")
    print()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("regime", BETA)
@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_output_and_gradients(head_dim, regime, implementation, record_property):
    inputs = rounded_inputs(1, 1024, head_dim, BETA[regime], gate=0.05)
    do, dlse = random_cotangents(2, inputs)
    cotangents = jnp.asarray(do, "bfloat16"), jnp.asarray(dlse)
    (o, _), gradients = run_with_gradients(
        path_attention, inputs, cotangents, None, with_implementation(implementation)
    )
    (desired_o, _), desired = in_float64(run_with_gradients, inputs, cotangents)
    errors = {"o": relative_error(o, desired_o)} | {
        f"d{name}": relative_error(gradients[name], desired[name]) for name in inputs
    }
    report(record_property, errors)
    assert errors.pop("o") <= TOLERANCE["bfloat16"]["output"]
    assert max(errors.values()) <= TOLERANCE["bfloat16"]["gradient"], errors


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("regime", BETA)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_output(head_dim, regime, implementation, record_property):
    inputs = rounded_inputs(3, 4096, head_dim, BETA[regime], gate=0.01)
    o, lse = run(path_attention, inputs, None, with_implementation(implementation))
    desired_o, desired_lse = in_float64(run, inputs)
    error = relative_error(o, desired_o)
    report(record_property, {"o": error, "lse": np.max(np.abs(lse - desired_lse))})
    assert error <= TOLERANCE["bfloat16"]["output"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cosine", [0.8, 0.98])
def test_correlated_directions(cosine, implementation, record_property):
    """Trained w point in similar directions, which makes the triangular systems of a block ill-conditioned."""
    inputs = rounded_inputs(4, 1024, 64, cosine=cosine, gate=0.05)
    do, dlse = random_cotangents(5, inputs)
    cotangents = jnp.asarray(do, "bfloat16"), jnp.asarray(dlse)
    (o, _), gradients = run_with_gradients(
        path_attention, inputs, cotangents, None, with_implementation(implementation)
    )
    (desired_o, _), desired = in_float64(run_with_gradients, inputs, cotangents)
    errors = {"o": relative_error(o, desired_o)} | {
        f"d{name}": relative_error(gradients[name], desired[name]) for name in inputs
    }
    report(record_property, errors)
    assert all(np.isfinite(error) for error in errors.values()), errors
    assert max(errors.values()) <= TOLERANCE["bfloat16"]["correlated"], errors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1024, pytest.param(8192, marks=pytest.mark.slow)])
@pytest.mark.parametrize("gate", [0.02, 0.5])
def test_gate_gradient_does_not_drift(gate, length, implementation, record_property):
    """The gradient is a sum over all later rows that nearly cancels; its error must not grow with the length."""
    inputs = rounded_inputs(7, length, 64, gate=gate)
    del inputs["w"], inputs["beta"]
    do, dlse = random_cotangents(8, inputs)
    cotangents = jnp.asarray(do, "bfloat16"), jnp.asarray(dlse)
    _, gradients = run_with_gradients(
        forgetting_attention, inputs, cotangents, None, with_implementation(implementation)
    )
    _, desired = in_float64(run_with_gradients, inputs, cotangents, op=forgetting_attention)
    error = relative_error(gradients["log_forget"], desired["log_forget"])
    report(record_property, {"dlog_forget": error})
    assert error <= TOLERANCE["bfloat16"]["gradient"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("same_w", [False, True], ids=["random w", "one w"])
@pytest.mark.parametrize("length", [4096, pytest.param(65536, marks=pytest.mark.slow)])
def test_outputs_are_averages_of_values(length, same_w, beta, implementation):
    """However long the product of reflections, o is finite and no larger than the largest value."""
    inputs = rounded_inputs(6, length, 64, beta=(beta, beta))
    if same_w:
        inputs["w"] = jnp.broadcast_to(inputs["w"][:, :1], inputs["w"].shape)
    o, lse = run(path_attention, inputs, None, with_implementation(implementation))
    o, v = np.asarray(o, np.float32), np.asarray(inputs["v"], np.float32)
    assert np.isfinite(o).all() and np.isfinite(lse).all()
    assert np.max(np.abs(o)) <= np.max(np.abs(v)) * (1 + TOLERANCE["bfloat16"]["bound"])
