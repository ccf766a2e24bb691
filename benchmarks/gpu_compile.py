"""Compiles one case for an NVIDIA GPU that is not there, and reports what each kernel takes.

    python -m benchmarks.gpu_compile benchmarks.cases:both_directions --gpu=h100 -a op=path_fox -a T=4096

Needs the CUDA plugin and ptxas (extra [gpu-aot]), but neither a GPU nor its driver. XLA does not tune its own kernels
without a GPU; those of Pallas come out as on one.
"""

import argparse
import inspect
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks import ahead_of_time


class Gpu(NamedTuple):
    """What XLA must know of a GPU."""

    kind: str
    capability: tuple[int, int]
    cores: int
    shared_memory: int  # of a thread block, bytes
    shared_memory_per_core: int
    memory: int
    bandwidth: int  # bytes/s
    l2: int
    clock: float  # GHz


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 167936, 85899345920, 2039 * 10**9, 41943040, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448, 233472, 84942979072, 3352320000000, 52428800, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 232448, 233472, 191504253952, 7672 * 10**9, 132644864, 1.965),
}


def compile_case(case: str, gpu: str, arguments: dict, *, timeout: float = 900) -> dict:
    """Compiles `module:function` called with `arguments`.

    Args:
      case: name of a function that returns a `Case`.
      gpu: one of GPUS.
      arguments: keyword arguments of the function; JSON types.
      timeout: seconds.

    Returns:
      hlo (text of the optimised program), temp_bytes, and kernels: {name: {spill_stores, spill_loads}} of
      Mosaic's kernels, in bytes.

    Raises:
      RuntimeError: with the end of the compiler's message, when it fails.
    """
    environment = {"MOSAIC_GPU_DUMP_PTXAS": "1"}
    request = {"case": case, "target": gpu, "arguments": arguments}
    result, printed = ahead_of_time.run("benchmarks.gpu_compile", request, environment, timeout)
    return result | {"kernels": _kernels(printed)}


def _kernels(printed: str) -> dict:
    """Kernels in what Mosaic and ptxas print, in the order in which they were compiled."""
    spills = re.findall(
        r"entry function '(\w+?)(?:_mosaic_gpu_kernel)?' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        printed,
        re.DOTALL,
    )
    return {name: {"spill_stores": int(stores), "spill_loads": int(loads)} for name, stores, loads in spills}


def target_config(gpu: Gpu) -> str:
    """XLA's description of a GPU, as text of a protocol buffer."""
    major, minor = gpu.capability
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_block_optin: {gpu.shared_memory}
          shared_memory_per_core: {gpu.shared_memory_per_core}
          core_count: {gpu.cores} fpus_per_core: {64 if major == 8 else 128}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock}
          device_memory_size: {gpu.memory}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}
        device_description_str: "{gpu.kind}"
    """


def abstract_mesh(gpu: Gpu):
    """The mesh of one such GPU, as the programs being traced for it see it."""
    import jax

    has_platform = "platform" in inspect.signature(jax.sharding.AbstractDevice).parameters
    device = jax.sharding.AbstractDevice(
        device_kind=gpu.kind, num_cores=None, **({"platform": "cuda"} if has_platform else {})
    )
    # Like programs without a mesh: no axis in the types of arrays.
    axes = {"axis_types": (jax.sharding.AxisType.Auto,)}
    return jax.sharding.AbstractMesh((1,), ("device",), **axes, abstract_device=device)


def _compile(request: dict) -> dict:
    import jax
    from jax.experimental import topologies
    from jax.experimental.mosaic.gpu import utils as mosaic

    gpu = GPUS[request["target"]]
    topology = topologies.get_topology_desc(
        request["target"], platform="cuda", target_config=target_config(gpu), topology="1x1x1"
    )
    placement = jax.sharding.SingleDeviceSharding(topology.devices[0])
    mosaic._infer_arch = lambda: gpu.capability  # would take a GPU that is not there for a Hopper
    with jax.sharding.use_abstract_mesh(abstract_mesh(gpu)):
        case = ahead_of_time.build(request)
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), case.inputs)
        compiled = jax.jit(case.function).trace(*inputs).lower(lowering_platforms=("cuda",)).compile()
    return {"hlo": compiled.as_text(), "temp_bytes": compiled.memory_analysis().temp_size_in_bytes}


def _main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", help="module:function that returns a Case")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("-a", "--argument", action="append", default=[], metavar="NAME=VALUE", help="of the function")
    args = parser.parse_args()
    compiled = compile_case(args.case, args.gpu, dict(map(ahead_of_time.argument, args.argument)))
    for name, kernel in compiled["kernels"].items():
        print(name, *(f"{key} {value}" for key, value in kernel.items()))
    print("temporary memory", compiled["temp_bytes"], "bytes")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].startswith("{"):
        Path(sys.argv[2]).write_text(json.dumps(_compile(json.loads(sys.argv[1]))))
    else:
        _main()
