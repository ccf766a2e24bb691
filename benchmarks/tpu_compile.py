"""Compiles one case for a TPU that is not there, in a process of its own.

libtpu holds the TPU compiler and works on any host, but reads its options once per process, so every compilation gets a
fresh one: `compile_case` starts it, and this module run as a program is it.

The abstract mesh of the TPU is current while the case is built and traced: `jax.sharding.get_abstract_mesh()` has an
`abstract_device` whose `device_kind` names the TPU that is compiled for, and `pltpu.get_tpu_info()` describes it.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.tpu_chips import full_topology

LAYOUTS = ("auto", "default")


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to count.

    Attributes:
      function: what is compiled; jitted or not.
      inputs: its arguments as a tuple of trees of `jax.ShapeDtypeStruct`.
      flops: useful floating-point operations, for the share of the peak.
      tables: contents of scalar-prefetch operands that are not constants of the program, {operand index: array}.
    """

    function: object
    inputs: tuple
    flops: int | None = None
    tables: dict = dataclasses.field(default_factory=dict)


def compile_case(
    case: str, topology: str, arguments: dict, dump: Path | None, *, layouts: str = "auto", timeout: float = 1800
) -> dict:
    """Compiles `module:function` called with `arguments`, leaving the compiler's dump in a folder.

    Args:
      case: name of a function that returns a `Case`.
      topology: "v5e:2x2", or a chip's name for its default topology.
      arguments: keyword arguments of the function; JSON types.
      dump: folder for the compiler's dump, tens to hundreds of MB; None for none.
      layouts: "auto" lets the compiler choose those of inputs and results, as when projections produce and use them;
        "default" is row-major.
      timeout: seconds.

    Returns:
      hlo (text of the optimised program), temp_bytes, flops and tables of the case.

    Raises:
      RuntimeError: with the end of the compiler's message, when it fails.
    """
    options = [os.environ.get("LIBTPU_INIT_ARGS", "")]
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        options += [f"--xla_jf_dump_to={dump.resolve()}", "--xla_jf_dump_llo_text=true", "--xla_jf_dump_hlo_text=true"]
    root = Path(__file__).parent.parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",  # leave an attached accelerator alone
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations may run at once
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "LIBTPU_INIT_ARGS": " ".join(filter(None, options)),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH")))),
    }
    request = {"case": case, "topology": full_topology(topology), "arguments": arguments, "layouts": layouts}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "compiled.json"
        command = [sys.executable, "-m", "benchmarks.tpu_compile", json.dumps(request), str(result)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{case} for {topology} took more than {timeout:.0f} s to compile") from None
        if done.returncode:
            message = [line for line in done.stderr.splitlines() if line.strip() and line[:2] not in ("I0", "W0", "E0")]
            raise RuntimeError("\n".join(message)[-4000:])
        return json.loads(result.read_text())


def _load(case: str):
    module, _, function = case.rpartition(":")
    return getattr(importlib.import_module(module), function)


def _compile(request: dict) -> dict:
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    placement = NamedSharding(mesh, PartitionSpec())
    if request["layouts"] == "auto":
        placement = Format(Layout.AUTO, placement)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # a concrete mesh would send eager operations to it
        case = _load(request["case"])(**request["arguments"])
        function = jax.jit(case.function, in_shardings=placement, out_shardings=placement)
        compiled = function.trace(*case.inputs).lower(lowering_platforms=("tpu",)).compile()
    tables = {index: np.asarray(table) for index, table in case.tables.items()}
    return {
        "hlo": compiled.as_text(),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "flops": case.flops,
        "tables": {index: [str(table.dtype), table.tolist()] for index, table in tables.items()},
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_compile(json.loads(sys.argv[1]))))
