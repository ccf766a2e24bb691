"""Where a step's memory goes on one device."""

import dataclasses

from path_jax.planning.compilation import Program, sharded_bytes
from path_jax.planning.flops import inner_programs, live_equations
from path_jax.planning.hlo import computations, value_bytes

_NOT_ARRAYS = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "constant", "call")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array of the program: its bytes on one device, its type, and the operation of the model that makes it."""

    bytes: int
    shape: str
    source: str


def memory_by_kind(program: Program) -> dict[str, int]:
    """Bytes of one device: what the state holds, by shapes and shardings, and what the compiler takes beside it.

    params, optimizer, teacher, batch (with the step number and the key) make up the arguments; temporaries are
    gradients, kept and recomputed activations and all else that lives during a step; outputs count only where they do
    not take the place of arguments.
    """
    params, optimizer = sharded_bytes(program.state.params), sharded_bytes(program.state.opt_state)
    return {
        "params": params,
        "optimizer": optimizer,
        "teacher": program.frozen_bytes,
        "batch": program.argument_bytes - params - optimizer - program.frozen_bytes,
        "temporaries": program.temporary_bytes,
        "outputs": program.output_bytes - program.shared_bytes,
        "code": program.code_bytes,
    }


def largest_buffers(program: Program, count: int = 10) -> list[Buffer]:
    """The largest arrays that operations of the program make, one for each type and source.

    Their lifetimes are the compiler's; not all are there at once.
    """
    parts = computations(program.hlo)
    fused = {
        name for operations in parts.values() for x in operations if x.opcode == "fusion" for name in x.called("calls")
    }
    found = {}
    for name, operations in parts.items():
        for operation in operations if name not in fused and name != "ENTRY" else ():
            if operation.opcode in _NOT_ARRAYS or operation.result.startswith("("):
                continue
            shape = operation.result.split("{")[0]
            found[shape, operation.source] = Buffer(value_bytes(operation.result), shape, operation.source)
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count]


def largest_arrays(jaxpr, num_devices: int, count: int = 10) -> list[Buffer]:
    """The largest arrays of a traced step, one for each type and source: for programs that the compiler gave up.

    Fewer may exist once operations are fused; what attention needs inside depends on the platform and is left out.
    Bytes are those of an even share of the whole array, as all large ones are cut.
    """
    found = {}

    def visit(jaxpr, parts):
        for equation in live_equations(jaxpr):
            inside = 1 if equation.primitive.name == "shard_map" else parts
            is_attention = equation.params.get("branches_platforms") is not None  # arrays of other platforms' programs
            for inner in () if is_attention else inner_programs(equation.params):
                visit(inner, inside)
            for variable in equation.outvars:
                shape, source = variable.aval.str_short(short_dtypes=True), str(equation.source_info.name_stack)
                if hasattr(variable.aval, "dtype"):
                    size = variable.aval.size * variable.aval.dtype.itemsize // parts
                    found[shape, source] = Buffer(size, shape, source)

    visit(jaxpr, num_devices)
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count]
