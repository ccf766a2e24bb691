"""Where a step's memory goes on one device."""

from path_jax.planning.compilation import Buffer, Program, sharded_bytes
from path_jax.planning.hlo import computations, value_bytes

_NOT_ARRAYS = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "constant", "call")


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
