"""Compiles one case for a TPU that is not there.

libtpu holds the TPU compiler and works on any host. `compile_case` starts a process, which runs this module.

The abstract mesh of the TPU is current while the case is built and traced: `jax.sharding.get_abstract_mesh()` has an
`abstract_device` whose `device_kind` names the TPU that is compiled for, and `pltpu.get_tpu_info()` describes it.
"""

import json
import os
import sys
from pathlib import Path

from benchmarks import ahead_of_time
from benchmarks.tpu_chips import full_topology

LAYOUTS = ("auto", "default")


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
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations may run at once
        "LIBTPU_INIT_ARGS": " ".join(filter(None, options)),
    }
    request = {"case": case, "target": full_topology(topology), "arguments": arguments, "layouts": layouts}
    return ahead_of_time.run("benchmarks.tpu_compile", request, environment, timeout)[0]


def _compile(request: dict) -> dict:
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=request["target"])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    placement = NamedSharding(mesh, PartitionSpec())
    if request["layouts"] == "auto":
        placement = Format(Layout.AUTO, placement)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # a concrete mesh would send eager operations to it
        case = ahead_of_time.build(request)
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
