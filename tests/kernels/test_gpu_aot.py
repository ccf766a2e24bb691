"""The Mosaic GPU kernels through the compilers for GPUs that are not there: they compile and do not spill.

    pytest -m gpu_aot

Needs JAX 0.11 or later and the extra [gpu-aot]. Takes a quarter of an hour on two cores: select with -k.
"""

import importlib.util

import jax
import pytest

from benchmarks.gpu_compile import GPUS, compile_case

pytestmark = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(
        jax.version.__version_info__ < (0, 11) or importlib.util.find_spec("jax_plugins") is None,
        reason="needs JAX 0.11 or later, the CUDA plugin and ptxas",
    ),
]
BOTH = "benchmarks.cases:both_directions"
VARIANTS = {
    "fox": {"op": "fox"},
    "fox, grouped, ragged": {"op": "fox", "N": 8, "K": 2, "T": 2500},
    "fox, window, documents": {"op": "fox", "segments": True, "options": {"window": 700}},
    "fox, prune": {"op": "fox", "options": {"prune": "auto"}},
    "fox, fewer queries": {"op": "fox", "queries": 1000},
    "fox, H 64": {"op": "fox", "H": 64},
    "fox, H 96, Hv 64": {"op": "fox", "H": 96, "Hv": 64},
    "fox, H 64, Hv 128": {"op": "fox", "H": 64, "Hv": 128},
    "fox, float16": {"op": "fox", "dtype": "float16"},
    "path": {"op": "path"},
    "path_fox": {"op": "path_fox"},
    "path_fox, grouped, ragged": {"op": "path_fox", "N": 8, "K": 2, "T": 2500},
    "path_fox, documents, prune": {"op": "path_fox", "segments": True, "options": {"prune": "auto"}},
    "path_fox, H 64": {"op": "path_fox", "H": 64},
    "path_fox, H 64, Hv 128": {"op": "path_fox", "H": 64, "Hv": 128},
    "path_fox, H 128, Hv 64": {"op": "path_fox", "H": 128, "Hv": 64},
    "path_fox, float16": {"op": "path_fox", "dtype": "float16"},
    "path_fox, float32 directions": {"op": "path_fox", "w_dtype": "float32"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_for_hopper(variant):
    compiled = compile_case(BOTH, "h100", {"T": 2048, "N": 2, "K": 2, "implementation": "gpu"} | VARIANTS[variant])
    spills = {name: kernel["spill_stores"] for name, kernel in compiled["kernels"].items()}
    assert spills.keys() >= {"attention_forward_kernel", "query_gradient_kernel", "key_gradient_kernel"}
    is_fast = "w_dtype" not in VARIANTS[variant] and VARIANTS[variant]["op"] != "fox"
    linear = {f"{name}_kernel" for name in ("tile_forward", "lift_forward", "lift_backward", "node_gradient")}
    linear.add("block_backward_kernel")
    assert spills.keys() & linear == (linear if is_fast else set())
    assert spills["attention_forward_kernel"] == spills["query_gradient_kernel"] == 0
    assert spills["key_gradient_kernel"] <= 128


DECODE_VARIANTS = {
    "path_fox": {"op": "path_fox", "K": 2},
    "path": {"op": "path", "N": 2, "K": 2},
    "fox, window": {"op": "fox", "options": {"window": 3000}},
    "fox, H 64, 24 tokens": {"op": "fox", "H": 64, "K": 2, "tokens": 24},
    "path_fox, H 64, Hv 128, prune": {"op": "path_fox", "H": 64, "Hv": 128, "options": {"prune": "auto"}},
    "path_fox, 16 groups, float16": {"op": "path_fox", "N": 16, "K": 1, "dtype": "float16"},
}


@pytest.mark.parametrize("variant", DECODE_VARIANTS)
def test_decode_compiles_for_hopper(variant):
    compiled = compile_case(
        "benchmarks.cases:decode", "h100", {"T": 16384, "implementation": None} | DECODE_VARIANTS[variant]
    )
    assert compiled["kernels"] == {"attend_parts_kernel": {"spill_stores": 0, "spill_loads": 0}}


@pytest.mark.parametrize("gpu", [name for name, gpu in GPUS.items() if gpu.capability[0] != 9])
def test_other_gpus_get_other_kernels(gpu):
    with pytest.raises(RuntimeError, match="Hopper"):
        compile_case(BOTH, gpu, {"op": "fox", "T": 256, "implementation": "gpu"})
    chosen = compile_case(BOTH, gpu, {"op": "fox", "T": 256, "H": 64, "implementation": None})
    assert not chosen["kernels"]


def test_hopper_gets_the_kernels():
    assert compile_case(BOTH, "h100", {"op": "fox", "T": 256, "implementation": None})["kernels"]
