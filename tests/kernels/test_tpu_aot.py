"""The TPU kernels through libtpu's compiler, for chips that are not there: they compile, fit, and cost what they did.

    pytest -m tpu_aot tests/kernels/test_tpu_aot.py

Needs libtpu (extra [tpu]). Takes an hour on two cores: select with -k.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tpu_chips import CHIPS
from benchmarks.tpu_compile import compile_case
from benchmarks.tpu_count import analyze
from benchmarks.tpu_table import Cell, Store, total, versions
from pallas_kernels.blockwise.tpu import tuning

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler"),
]
ROOT = Path(__file__).parents[2]
ATTENTION, BOTH = "benchmarks.cases:attention", "benchmarks.cases:both_directions"

VARIANTS = {
    "fox": {"op": "fox"},
    "fox, grouped, ragged": {"op": "fox", "N": 8, "K": 2, "T": 2500},
    "fox, window, documents": {"op": "fox", "segments": True, "options": {"window": 700}},
    "fox, prune": {"op": "fox", "options": {"prune": "auto"}},
    "fox, fewer queries": {"op": "fox", "queries": 1000},
    "fox, H 64": {"op": "fox", "H": 64},
    "fox, H 96, Hv 256": {"op": "fox", "H": 96, "Hv": 256},
    "fox, H 256": {"op": "fox", "H": 256},
    "fox, float32": {"op": "fox", "dtype": "float32"},
    "path": {"op": "path"},
    "path_fox": {"op": "path_fox"},
    "path_fox, grouped, ragged": {"op": "path_fox", "N": 8, "K": 2, "T": 2500},
    "path_fox, documents, prune": {"op": "path_fox", "segments": True, "options": {"prune": "auto"}},
    "path_fox, H 64": {"op": "path_fox", "H": 64},
    "path_fox, H 256, Hv 96": {"op": "path_fox", "H": 256, "Hv": 96},
    "path_fox, float32": {"op": "path_fox", "dtype": "float32"},
    "path_fox, float32 directions": {"op": "path_fox", "w_dtype": "float32"},
    "path, one superchunk": {"op": "path", "T": 200},
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles(variant, chip):
    """The compiler checks that memory suffices."""
    arguments = {"T": 2048, "N": 2, "K": 2} | VARIANTS[variant]
    compiled = compile_case(BOTH, chip, arguments, None)
    assert compiled["hlo"].count("tpu_custom_call") >= 2


DECODE = {
    "path_fox": {"op": "path_fox"},
    "path_fox, chunk": {"op": "path_fox", "tokens": 256, "N": 8, "K": 2},
    "path, H 64, float32": {"op": "path", "H": 64, "dtype": "float32"},
    "fox, window, prune": {"op": "fox", "K": 2, "options": {"window": 3000, "prune": "auto"}},
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("variant", DECODE)
def test_decode_compiles(variant, chip):
    compiled = compile_case("benchmarks.cases:decode", chip, {"T": 8192} | DECODE[variant], None)
    assert compiled["hlo"].count("tpu_custom_call") >= 1


PAIRS = {
    "gates, documents": {},
    "grouped": {"N": 8, "K": 2, "segments": False},
    "float32, H 64": {"dtype": "float32", "H": 64, "gates": False},
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("variant", PAIRS)
def test_attention_to_earlier_keys_compiles(variant, chip):
    compiled = compile_case("benchmarks.cases:pair", chip, {"L": 1024, "M": 2048} | PAIRS[variant], None)
    assert compiled["hlo"].count("tpu_custom_call") == 2


COUNTED = [
    Cell(chip, 4096, 128, 8, op, direction)
    for chip in ("v5e", "v5p", "v6e")
    for op in ("fox", "path_fox")
    for direction in ("forward", "backward")
]


@pytest.mark.parametrize("cell", COUNTED, ids=lambda cell: cell.name)
def test_cycles_are_those_of_the_table(cell):
    """A regression guard: the committed table, recounted."""
    record = Store(ROOT / "results" / "tpu_static.json").of([cell]).get(cell)
    if record is None:
        pytest.skip(f"the table has no count with {versions()}")
    count = analyze(cell.call[0], cell.chip, cell.call[1])
    assert not any(kernel.unknown_branches for kernel in count.kernels)
    assert count.cost == pytest.approx(total(record, "cost"), rel=0.03)
    assert all(kernel.vmem <= tuning._CHIPS[cell.chip].vmem << 20 for kernel in count.kernels)


@pytest.mark.parametrize("op", ["fox", "path_fox"])
def test_memory_is_linear(op):
    """Temporary memory of both passes at most 12 times q, k, v and o."""
    length, heads, head_dim = 32768, 8, 128
    compiled = compile_case(BOTH, "v5p", {"op": op, "T": length, "N": heads, "K": heads, "H": head_dim}, None)
    assert compiled["temp_bytes"] <= 12 * 4 * length * heads * head_dim * 2


@pytest.mark.parametrize("op", ["fox", "path_fox"])
def test_long_sequences_compile(op):
    compile_case(BOTH, "v5p", {"op": op, "T": 131072, "N": 2, "K": 2}, None)


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_kernels import forgetting_attention, path_attention

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
mesh = Mesh(np.array(topology.devices).reshape(4, 4), ("data", "model"))
spec = PartitionSpec("data", None, "model")
op = {"fox": forgetting_attention, "path_fox": path_attention}[sys.argv[1]]

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

q, k = array(4, 2048, 8, 128), array(4, 2048, 4, 128)
beta, gate = array(4, 2048, 4, dtype=jnp.float32), array(4, 2048, 8, dtype=jnp.float32)
inputs = (q, k, k, gate) if op is forgetting_attention else (q, k, k, k, beta, gate)

def both(dout, *inputs):
    out, pull_back = jax.vjp(lambda *inputs: op(*inputs, implementation="tpu"), *inputs)
    return out, pull_back(dout)

both = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(both).trace(q, *inputs).lower(lowering_platforms=("tpu",))
print(lowered.compile().as_text())
"""


@pytest.mark.parametrize("op", ["fox", "path_fox"])
def test_shards_stay_apart(op):
    """Batch and heads over 4 x 4 chips under shard_map: kernels, and no communication at all."""
    environment = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PATH": ""}
    command = [sys.executable, "-c", SHARDED, op]
    hlo = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True).stdout
    assert "tpu_custom_call" in hlo
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f"{collective}(" not in hlo and f"{collective}-start(" not in hlo
