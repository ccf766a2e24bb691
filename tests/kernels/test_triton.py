"""The Triton kernels: in Triton's interpreter against the reference in float64, and through its compiler.

    TRITON_INTERPRET=1 pytest -m "slow or not slow" tests/kernels/test_triton.py
    pytest -m gpu_aot tests/kernels/test_triton.py

The first needs triton, PyTorch for the CPU and NumPy before 2.4, the second triton; neither needs a GPU. The
interpreter multiplies bfloat16 wrongly, hence float16 and float32.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.recurrence import TOLERANCE, assert_all_close, random_cotangents, random_inputs, relative_error
from kernels.test_gpu import CASES, SLOW_CASES
from kernels.test_gpu_decode import CASES as DECODE_CASES
from kernels.test_gpu_decode import SLOW_CASES as SLOW_DECODE_CASES
from kernels.test_gpu_decode import assert_accurate, problem
from kernels.test_tpu import DOCUMENTS, compare, in_float64, parameters

from pallas_kernels import forgetting_attention, path_attention
from pallas_kernels.blockwise.gpu import decode, layout, operation

ROOT = Path(__file__).parents[2]
has_triton = importlib.util.find_spec("triton") is not None
needs_interpreter = pytest.mark.skipif(
    not has_triton or importlib.util.find_spec("torch") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton and torch, in a process started with TRITON_INTERPRET=1",
)
KERNELS = ("attention_forward", "query_gradient", "key_gradient")


def kernels(run, capability):
    """The kernels as `operation` takes them; `run` gets the `Launch` and returns the results."""
    from pallas_kernels.blockwise.gpu import triton_call

    launches = triton_call.forward_launch, triton_call.query_launch, triton_call.key_launch
    return operation.Kernels(*(lambda *x, launch=launch: run(launch(*x, capability)) for launch in launches))


def interpret(launch):
    """Runs a launch in Triton's interpreter; what it leaves unwritten is NaN."""
    import torch

    operands = [torch.from_numpy(np.array(x)) for x in launch.operands]
    results = [torch.full(x.shape, float("nan"), dtype=getattr(torch, x.dtype.name)) for x in launch.results]
    launch.kernel[launch.grid](*operands, *results, **launch.constants)
    return [jnp.asarray(x.numpy()) for x in results]


def both_directions(op, inputs, cotangents, kernels, **options):
    """Output, lse and gradients as `run_with_gradients` returns them. Not under `jax.jit` where `kernels` are run."""
    call = op.as_call(**inputs, **options)
    # Not a mode of Pallas: calls the kernels here and now.
    options = dataclasses.replace(call.options, interpret="triton")
    arrays = jax.tree.map(jnp.asarray, call.inputs)
    out, lse, kept = operation.forward("triton", lambda: kernels, options, arrays)
    gradients = operation.backward("triton", lambda: kernels, options, arrays, out, lse, kept, *cotangents)
    return (out, lse), {name: getattr(gradients, name) for name in inputs}


@needs_interpreter
@pytest.mark.parametrize("op, shape, options", parameters(CASES, SLOW_CASES))
def test_float16(op, shape, options):
    """As `test_gpu.assert_accurate`: within the tolerance of 16-bit inputs, at most 1.25 times as far off as `xla`."""
    inputs = random_inputs(0, **shape)
    do, dlse = random_cotangents(1, inputs)
    dtypes = {"beta": "float32", "log_forget": "float32", "w": "float32"}
    rounded = {name: jnp.asarray(x, dtypes.get(name, "float16")) for name, x in inputs.items()}
    cotangents = jnp.asarray(do, "float16"), jnp.asarray(dlse)
    actual = both_directions(op, rounded, cotangents, kernels(interpret, (8, 0)), **options)
    peer, desired = compare(op, inputs, "float16", implementation="xla", w_dtype="float32", **options)
    np.testing.assert_allclose(actual[0][1], desired[0][1], atol=TOLERANCE["bfloat16"]["output"])  # log-sum-exp
    (out, _), gradients = jax.tree.map(relative_error, actual, desired)
    (peer_out, _), peer_gradients = jax.tree.map(relative_error, peer, desired)
    assert out <= min(TOLERANCE["bfloat16"]["output"], 1.25 * peer_out)
    for name, error in gradients.items():
        assert error <= TOLERANCE["bfloat16"]["gradient"], name
        assert error <= 1.25 * peer_gradients[name], (name, error, peer_gradients[name])


@needs_interpreter
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=lambda capability: "sm_{}{}".format(*capability))
@pytest.mark.parametrize("dims", [(64, 64), (64, 128), (128, 64)], ids=str)
@pytest.mark.parametrize(
    "op, options",
    [
        pytest.param(path_attention, dict(segment_ids=DOCUMENTS), id="path_fox"),
        pytest.param(forgetting_attention, dict(segment_ids=DOCUMENTS, window=150), id="fox"),
    ],
)
def test_blocks_in_float32(op, options, dims, capability):
    """Every choice of blocks, with an error that rounding to 16 bits cannot hide; a GPU would use less precision."""
    shape = dict(length=400, heads=2, kv_heads=1, gate=0.05, path=op is path_attention)
    shape |= dict(head_dim=dims[0], v_head_dim=dims[1])
    inputs = {name: jnp.asarray(x, "float32") for name, x in random_inputs(2, **shape).items()}
    cotangents = jax.tree.map(lambda x: jnp.asarray(x, "float32"), random_cotangents(3, inputs))
    actual = both_directions(op, inputs, cotangents, kernels(interpret, capability), **options)
    assert_all_close(actual, in_float64(op, inputs, cotangents, **options), "float32")


def attend_pages(run, capability):
    """As in `pages`; `run` as in `kernels`. Not under `jax.jit` where it runs anything."""
    from pallas_kernels.blockwise.gpu import triton_call

    kernel = lambda *x: run(triton_call.parts_launch(*x, capability))
    return functools.partial(decode.attend_pages, "triton", lambda: kernel, interpret="triton")


DECODE_HEAD_DIMS = {"path_fox, any head dims": (dict(dims=(40, 96), width=3), {})}


@needs_interpreter
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape, options", parameters(DECODE_CASES | SLOW_DECODE_CASES | DECODE_HEAD_DIMS, {}))
def test_decode(shape, options, dtype):
    assert_accurate(attend_pages(interpret, (8, 0)), problem(**shape, dtype=dtype), **options)


@pytest.mark.skipif(not has_triton, reason="needs triton")
def test_constants():
    from pallas_kernels.blockwise.gpu import triton_kernels

    for name in ("TILE", "LOG2E", "MASKED", "LEAST"):
        assert getattr(triton_kernels, name).value == getattr(layout, name)


VARIANTS = {
    "path": (path_attention, dict(gate=None), {}),
    "path_fox": (path_attention, {}, {}),
    "path_fox, documents, pruned": (path_attention, {}, dict(segment_ids=DOCUMENTS, prune="auto")),
    "fox": (forgetting_attention, dict(path=False), {}),
    "fox, documents, window, pruned": (
        forgetting_attention,
        dict(path=False),
        dict(segment_ids=DOCUMENTS, window=150, prune="auto"),
    ),
}


@pytest.mark.gpu_aot
@pytest.mark.skipif(not has_triton, reason="needs triton")
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (64, 128), (128, 64)], ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)], ids=lambda capability: "sm_{}{}".format(*capability))
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles(variant, capability, dims):
    """Shared memory suffices, and at most the gradient of keys spills registers (bytes per thread)."""
    compiled = compile_variant(variant, capability, dims)
    assert compiled.keys() == set(KERNELS)
    for name, kernel in compiled.items():
        assert kernel["shared"] <= (227 if capability == (9, 0) else 99) * 1024, name
        assert max(kernel["spills"]) <= (128 if name == "key_gradient" else 0), (name, kernel)


@pytest.mark.gpu_aot
@pytest.mark.skipif(not has_triton, reason="needs triton")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)], ids=lambda capability: "sm_{}{}".format(*capability))
@pytest.mark.parametrize("groups, width, dims", [(1, 1, (64, 64)), (4, 1, (128, 128)), (4, 24, (128, 128))])
def test_decode_compiles(groups, width, dims, capability, dtype):
    shape = dict(groups=groups, width=width, dims=dims, superchunk=1024, dtype=dtype)
    kernel = compile_variant(shape, capability, dims)["attend_parts"]
    assert kernel["shared"] <= (227 if capability == (9, 0) else 99) * 1024
    assert max(kernel["spills"]) == 0, kernel


def compile_variant(variant, capability, dims):
    """{kernel: {"registers", "spills": [stores, loads], "shared"}}, compiled in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [environment.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, json.dumps([variant, capability, dims])]
        environment |= {"TRITON_CACHE_DIR": cache, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def _compile_variant(variant, capability, dims):
    compiled = {}

    def run(launch):
        compiled[launch.kernel.__name__] = _compile(launch, capability)
        return [jnp.zeros(x.shape, x.dtype) for x in launch.results]

    if isinstance(variant, dict):  # of a decode step
        arguments = jax.eval_shape(lambda: problem(**variant))
        jax.eval_shape(functools.partial(attend_pages(run, capability), gate_scale=1.0, window=5000), *arguments)
        return compiled
    op, shape, options = VARIANTS[variant]
    inputs = random_inputs(0, 400, heads=4, kv_heads=2, head_dim=dims[0], v_head_dim=dims[1], **shape)
    inputs = {name: jnp.asarray(x, "float32" if x.ndim == 3 else "bfloat16") for name, x in inputs.items()}
    cotangents = [jnp.asarray(x, "float32") for x in random_cotangents(1, inputs)]
    jax.eval_shape(lambda *x: both_directions(op, *x, kernels(run, capability), **options), inputs, cotangents)
    return compiled


def _compile(launch, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.blockwise.gpu import triton_call

    types = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32"}
    arrays = [types[x.dtype.name] for x in (*launch.operands, *launch.results)]
    signature = dict(zip(launch.kernel.arg_names, arrays)) | dict.fromkeys(launch.constants, "constexpr")
    assert list(signature) == launch.kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    (major, minor), blocks = capability, launch.blocks
    kernel = triton.compile(
        ASTSource(launch.kernel, signature, launch.constants, aligned),
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options=dict(num_warps=blocks.num_warps, num_stages=blocks.num_stages, ptx_version=triton_call.PTX_VERSION),
    )
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        target = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
        command = [ptxas, "-v", f"-arch={target}", file.name, "-o", os.devnull]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", printed)
    registers = re.search(r"Used (\d+) registers", printed)[1]
    return {"registers": int(registers), "spills": list(map(int, spills.groups())), "shared": kernel.metadata.shared}


if __name__ == "__main__":
    variant, *tuples = json.loads(sys.argv[1])
    print(json.dumps(_compile_variant(variant, *map(tuple, tuples))))
