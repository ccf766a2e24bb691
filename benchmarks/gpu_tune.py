"""Times the block sizes of the Triton kernels on the GPU at hand, and writes the best into the table that they read.

    python -m pallas_kernels.benchmark gpu-tune

PaTH-FoX stands for all operations. The forward kernel is timed by the forward pass; each kernel of the backward pass by
both passes, with the other kernels as the table has them.
"""

import argparse
import functools
import itertools
import json

import jax

from benchmarks.gpu_jax import inputs, operation, with_gradients
from benchmarks.gpu_worker import measure
from pallas_kernels.blockwise.gpu import devices, triton_call

KERNELS = ("attention_forward", "query_gradient", "key_gradient")
# Queries and keys of a block, warps, stages; what needs more shared memory than there is fails to compile.
CANDIDATES = [
    triton_call.Blocks(*blocks) for blocks in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
]


def milliseconds(kernel: str, length: int, head_dim: int) -> float:
    """Median time with the blocks that the table has now; compiled anew."""
    cell = {"op": "path_fox", "by": "triton", "length": length, "head_dim": head_dim}
    function, names = operation(cell)
    values = inputs(cell)
    values["w"] = values["w"].astype(values["q"].dtype)
    arguments, dout = tuple(values[name] for name in names), values["dout"]
    run = (lambda arguments, _: function(*arguments)) if kernel == KERNELS[0] else with_gradients(function)
    jax.clear_caches()  # traces do not know the table
    compiled = jax.jit(run).lower(arguments, dout).compile()
    return measure(functools.partial(compiled, arguments, dout), jax.block_until_ready)["ms"]


def best(kernel: str, length: int, head_dim: int, key) -> triton_call.Blocks:
    """The candidate that takes the least time; `key` is its place in the table."""
    times, last = {}, None
    for blocks in CANDIDATES:
        triton_call.BLOCKS[key] = blocks
        try:
            times[blocks] = milliseconds(kernel, length, head_dim)
        # Compiler, assembler and driver have no error in common. A mistake of ours fails all candidates, and is raised.
        except Exception as error:
            last = error
            print(f"  {tuple(blocks)}: {type(error).__name__}: {str(error)[:100]!r}", flush=True)
        else:
            print(f"  {tuple(blocks)}: {times[blocks]:.3f} ms", flush=True)
    if not times:
        raise RuntimeError(f"no blocks of {kernel} run on this GPU") from last
    return min(times, key=times.get)


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.benchmark gpu-tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--head-dims", nargs="+", type=int, choices=(64, 128), default=[64, 128])
    parser.add_argument("--length", type=int, default=4096)
    args = parser.parse_args(argv)
    capability = devices.compute_capability()
    if capability is None:
        parser.exit(1, "gpu-tune: there is no NVIDIA GPU here\n")
    rows = {
        (row["capability"], row["kernel"], row["head_dim"]): row for row in json.loads(triton_call.TABLE.read_text())
    }
    for head_dim, kernel in itertools.product(args.head_dims, KERNELS):
        key = (f"{capability[0]}.{capability[1]}", kernel, head_dim)
        print(f"{kernel}, heads of {head_dim}, compute capability {key[0]}", flush=True)
        triton_call.BLOCKS[key] = blocks = best(kernel, args.length, head_dim, key)
        rows[key] = dict(zip(("capability", "kernel", "head_dim"), key)) | {"blocks": list(blocks), "by": "timed"}
        lines = ",\n".join("  " + json.dumps(rows[key]) for key in sorted(rows))
        triton_call.TABLE.write_text(f"[\n{lines}\n]\n")
