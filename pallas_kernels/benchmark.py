"""Time, memory and arithmetic of the attention operations, as ratios against a peer in the same run.

    python -m pallas_kernels.benchmark                              # all tables, CPU-sized
    python -m pallas_kernels.benchmark --tables=time --lengths=2048,4096 --dtype=bfloat16
    python -m pallas_kernels.benchmark tune --help                  # block sizes of the TPU kernels, in a checkout
    python -m pallas_kernels.benchmark gpu --help                   # times on an NVIDIA GPU beside peers, in a checkout
    python -m pallas_kernels.benchmark gpu-tune --help              # block sizes of the Triton kernels, on that GPU

Tables:
  time    forward + backward (gradients of every input) of our operations over those of
          `jax.nn.dot_product_attention(is_causal=True)`; the best of several runs each.
  memory  temporary memory of the compiled forward + backward, and its growth when T doubles.
  macs    multiply-accumulates executed (dot_general times loop trips, counted on the jaxpr) over causal flash attention
          on 128 x 128 tiles: two products per tile forward, seven forward + backward.

PaTH's multiply-accumulates include its linear stage. Absolute times are of this machine and only comparable in one run.
"""

import argparse
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.forgetting_attention import forgetting_attention
from pallas_kernels.path_attention import path_attention


def count_macs(jaxpr) -> int:
    """Multiply-accumulates of all dot_generals of a jaxpr, times the trips of the scans around them.

    A conditional counts its dearest branch. Raises ValueError for a dot_general in a loop of unknown length.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (lhs_contract, _), _ = equation.params["dimension_numbers"]
            contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in lhs_contract)
            total += contracted * math.prod(equation.outvars[0].aval.shape)
            continue
        inner = [count_macs(sub) for sub in _sub_jaxprs(equation.params)]
        if equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        elif equation.primitive.name == "cond":
            total += max(inner)
        elif equation.primitive.name == "while" and sum(inner):
            raise ValueError("dot_general inside a while loop: the number of trips is unknown")
        else:
            total += sum(inner)
    return total


def _sub_jaxprs(params):
    for leaf in jax.tree.leaves(tuple(params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        jaxpr = getattr(leaf, "jaxpr", leaf)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr


def flash_macs(length: int, num_heads: int, head_dim: int, products: int) -> int:
    """Causal flash attention on 128 x 128 tiles, the diagonal ones in full."""
    tiles = -(-length // 128)
    return products * num_heads * tiles * (tiles + 1) // 2 * 128 * 128 * head_dim


def make_inputs(length: int, args) -> dict[str, jax.Array]:
    """Random inputs with unit w, beta in (0, 2) and forget gates in (0.9, 1)."""
    rng = np.random.default_rng(0)
    shape = (args.batch, length, args.heads, args.head_dim)
    kv_shape = (args.batch, length, args.kv_heads or args.heads, args.head_dim)
    w = rng.standard_normal(kv_shape)
    w /= np.linalg.norm(w, axis=-1, keepdims=True)
    dtype = jnp.dtype(args.dtype)
    return {
        "q": jnp.asarray(rng.standard_normal(shape), dtype),
        "k": jnp.asarray(rng.standard_normal(kv_shape), dtype),
        "v": jnp.asarray(rng.standard_normal(kv_shape), dtype),
        "w": jnp.asarray(w, jnp.float32),
        "beta": jnp.asarray(rng.uniform(0, 2, kv_shape[:3]), jnp.float32),
        "log_forget": jnp.asarray(np.log(rng.uniform(0.9, 1, shape[:3])), jnp.float32),
    }


def operations():
    """Name -> (function, the inputs it takes)."""
    return {
        "path": (path_attention, ("q", "k", "v", "w", "beta")),
        "path_fox": (path_attention, ("q", "k", "v", "w", "beta", "log_forget")),
        "fox": (forgetting_attention, ("q", "k", "v", "log_forget")),
    }


def with_gradients(op):
    """Function of the op's inputs returning a scalar of the output and the gradients of all inputs."""

    def loss(*inputs):
        out = op(*inputs).astype(jnp.float32)
        return jnp.vdot(out, jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    return lambda *inputs: jax.value_and_grad(loss, argnums=tuple(range(len(inputs))))(*inputs)


def best_seconds(functions: dict, repeats: int) -> dict[str, float]:
    """Best wall time of each function; runs are interleaved so that drift hits all alike."""
    for function in functions.values():
        jax.block_until_ready(function())
    best = dict.fromkeys(functions, math.inf)
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def time_table(args):
    peer = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    yield ("T", "operation", "ms", "over jax.nn")
    for length in args.lengths or (2048, 4096):
        inputs = make_inputs(length, args)
        cases = {"jax.nn": (peer, ("q", "k", "v"))} | operations()
        functions = {}
        for name, (op, names) in cases.items():
            compiled = jax.jit(with_gradients(op))
            functions[name] = lambda compiled=compiled, names=names: compiled(*(inputs[n] for n in names))
        best = best_seconds(functions, args.repeats)
        for name, seconds in best.items():
            yield (length, name, f"{seconds * 1e3:.1f}", f"{seconds / best['jax.nn']:.2f}")


def memory_table(args):
    yield ("T", "operation", "temporary MiB", "over T/2")
    for length in args.lengths or (16384,):
        for name, (op, names) in operations().items():
            sizes = []
            for tokens in (length // 2, length):
                inputs = jax.eval_shape(lambda tokens=tokens: make_inputs(tokens, args))
                compiled = jax.jit(with_gradients(op)).lower(*(inputs[n] for n in names)).compile()
                sizes.append(compiled.memory_analysis().temp_size_in_bytes)
            yield (length, name, f"{sizes[1] / 2**20:.1f}", f"{sizes[1] / sizes[0]:.2f}")


def macs_table(args):
    yield ("T", "operation", "forward over flash", "forward + backward over flash")
    for length in args.lengths or (2048, 4096, 8192, 32768):
        for name, (op, names) in operations().items():
            inputs = [jax.eval_shape(lambda length=length: make_inputs(length, args))[n] for n in names]
            ratios = []
            for function, products in ((op, 2), (with_gradients(op), 7)):
                macs = count_macs(jax.make_jaxpr(function)(*inputs).jaxpr)
                flash = args.batch * flash_macs(length, args.heads, args.head_dim, products)
                ratios.append(f"{macs / flash:.3f}")
            yield (length, name, *ratios)


TABLES = {"time": time_table, "memory": memory_table, "macs": macs_table}


def parse_args(argv=None):
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: tuple(int(n) for n in text.split(","))
    parser.add_argument("--tables", default="time,memory,macs", help="comma-separated: time, memory, macs")
    parser.add_argument(
        "--lengths", type=numbers, help="comma-separated sequence lengths; each table has its own default"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4, help="query heads N")
    parser.add_argument("--kv-heads", type=int, default=None, help="key/value heads K; N by default")
    parser.add_argument("--head-dim", type=int, default=64, help="H")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=7, help="timed runs per operation; the best counts")
    args = parser.parse_args(argv)
    unknown = set(args.tables.split(",")) - set(TABLES)
    if unknown:
        parser.error(f"unknown tables {sorted(unknown)}; choose from {', '.join(TABLES)}")
    return args


def main(argv=None):
    """Prints the requested tables."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["tune"]:
        from benchmarks import tpu_tune  # not part of the installed package

        return tpu_tune.main(argv[1:])
    if argv[:1] == ["gpu"]:
        from benchmarks import gpu_speed

        return gpu_speed.main(argv[1:])
    if argv[:1] == ["gpu-tune"]:
        try:
            from benchmarks import gpu_tune
        except ImportError as error:
            sys.exit(f"gpu-tune: {error}; pip install 'path-jax[triton]'")
        return gpu_tune.main(argv[1:])
    args = parse_args(argv)
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind} ({jax.default_backend()}), {args}")
    for name in args.tables.split(","):
        print(f"\n{name}")
        for row in TABLES[name](args):
            print("  " + "  ".join(f"{cell!s:>14}" for cell in row), flush=True)


if __name__ == "__main__":
    main()
