"""What the optimised HLO of a TPU program says about its kernels and about everything around them.

Kernels are the custom calls that Pallas makes. The rest of the entry computation, layout changes, casts and reductions
by XLA, is reported as HBM traffic: the bytes of operands and results in their tiled layouts, a fusion counted once.
Arrays that the compiler placed in VMEM cost nothing; one it staged from HBM into VMEM ahead of a kernel is counted
apart, because the kernel would have read it otherwise. An operand of which only a slice is used counts in full.
"""

import dataclasses
import re

import numpy as np

from path_jax.planning.hlo import LEAF, computations, type_bytes

_KERNEL_TARGET = 'custom_call_target="tpu_custom_call"'
_FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all")
_FORWARDING = ("copy", "copy-start", "copy-done", "bitcast")
# Arithmetic that belongs into a kernel, and loops whose trips are not counted.
_SUSPICIOUS = ("dot", "convolution", "triangular-solve", "while")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A call of a Pallas kernel: instruction name, and the scalar tables among its operands as 32-bit words."""

    name: str
    tables: dict[int, list[int]]


def _is_kernel(operation) -> bool:
    """Whether an operation calls a Pallas kernel."""
    return operation.opcode == "custom-call" and _KERNEL_TARGET in operation.line


@dataclasses.dataclass(frozen=True)
class Traffic:
    """HBM traffic of one call outside its kernels.

    Attributes:
      outside: bytes that XLA's own operations read and write.
      staged: bytes copied unchanged from HBM into VMEM for a later operation.
      largest: (operation, bytes) of the largest contributors to `outside`.
      suspicious: opcodes that should not be there: products, solves, loops.
    """

    outside: int
    staged: int
    largest: list[tuple[str, int]]
    suspicious: list[str]


def outside_traffic(hlo: str) -> Traffic:
    """Traffic of the entry computation's operations other than kernels."""
    parts = computations(hlo)
    entry = {operation.name: operation for operation in parts["ENTRY"]}
    moved, staged = {}, 0
    for operation in entry.values():
        if operation.opcode in _FREE or _is_kernel(operation) or operation.opcode.endswith("-start"):
            continue
        if operation.opcode == "custom-call" and "AllocateBuffer" in operation.line:
            continue
        size = type_bytes(operation.result)
        if operation.opcode.endswith("-done"):
            start = entry[operation.operands[0]]
            source_in_hbm = type_bytes(entry[start.operands[0]].result) > 0 if start.operands else False
            if source_in_hbm and not size:
                staged += type_bytes(operation.result, in_hbm=False)
                continue
            size += type_bytes(operation.result, in_hbm=False) if source_in_hbm else 0
        else:
            size += sum(type_bytes(entry[name].result) for name in operation.operands if name in entry)
        if size:
            moved[f"{operation.opcode} {operation.name}"] = size
    opcodes = {operation.opcode for operations in parts.values() for operation in operations}
    return Traffic(
        outside=sum(moved.values()),
        staged=staged,
        largest=sorted(moved.items(), key=lambda item: -item[1])[:5],
        suspicious=[opcode for opcode in _SUSPICIOUS if opcode in opcodes],
    )


def pack_words(values: np.ndarray, tile: tuple[int, ...] | None) -> list[int]:
    """Integers as the signed 32-bit words of scalar memory, narrow types packed and tiled like T(rows, columns)(p, 1).

    Args:
      values: any integer or boolean array of at most 32 bits.
      tile: (rows, columns) for two or more axes, else None or (columns,).

    Raises:
      ValueError: when fewer rows than values per word are tiled together: such a layout has not been seen.
    """
    values = np.asarray(values)
    bits = 8 * values.dtype.itemsize
    per_word = 32 // bits
    patterns = (values.astype(np.int64) & ((1 << bits) - 1)).astype(np.uint64)
    if values.ndim < 2:
        flat = patterns.reshape(-1)
        grouped = np.pad(flat, (0, -flat.size % per_word)).reshape(-1, per_word)
    else:
        rows, columns = tile if tile and len(tile) == 2 else (1, tile[0] if tile else 128)
        if rows % per_word:
            raise ValueError(f"tile {tile} with {per_word} values per word")
        height, width = values.shape[-2:]
        matrices = patterns.reshape(-1, height, width)
        matrices = np.pad(matrices, ((0, 0), (0, -height % rows), (0, -width % columns)))
        tiled = matrices.reshape(
            len(matrices), matrices.shape[1] // rows, rows // per_word, per_word, matrices.shape[2] // columns, columns
        )
        grouped = tiled.transpose(0, 1, 4, 2, 5, 3).reshape(-1, per_word)
    words = (grouped << (np.arange(per_word, dtype=np.uint64) * np.uint64(bits))).sum(axis=1, dtype=np.uint64)
    return words.astype(np.uint32).view(np.int32).tolist()


def _constant_table(operation) -> list[int] | None:
    """Words of an integer constant printed in full, else None."""
    dtype, dims, layout = LEAF.match(operation.result).groups()
    printed = operation.line[operation.line.index(" constant(") :].split("), ")[0]
    numpy_type = {"pred": np.bool_, "s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16, "s32": np.int32,
                  "u32": np.uint32}.get(dtype)  # fmt: skip
    if numpy_type is None or "..." in printed:
        return None
    shape = [int(size) for size in dims.split(",") if size]
    found = re.findall(r"-?\d+|true|false", re.sub(r"/\*.*?\*/", "", printed))
    values = [{"true": 1, "false": 0}.get(text) if text[0] in "tf" else int(text) for text in found]
    tile = re.search(r"T\(([\d,]+)\)", layout or "")
    array = np.array(values, np.int64).astype(numpy_type).reshape(shape)
    return pack_words(array, tuple(int(size) for size in tile.group(1).split(",")) if tile else None)


def kernels(hlo: str, dumped: str = "") -> list[Kernel]:
    """Kernel calls of a program.

    Args:
      hlo: the optimised HLO.
      dumped: the same in the compiler's dump, where large constants are not elided.

    Raises:
      ValueError: when a kernel runs inside a loop: one trip would be counted.
    """
    parts = computations(hlo)
    bodies = set(re.findall(r"body=%?([\w.\-]+)", hlo))
    known = {operation.name: operation for text in (hlo, dumped) for part in computations(text).values()
             for operation in part}  # fmt: skip
    found = []
    for name, part in parts.items():
        for operation in part if name != "ENTRY" else ():
            if not _is_kernel(operation):
                continue
            if name in bodies:
                raise ValueError(f"kernel {operation.name} runs inside a loop of the HLO; move the loop into its grid")
            found.append(Kernel(operation.name, _tables(operation, known)))
    return found


def _tables(kernel, known) -> dict[int, list[int]]:
    tables = {}
    for index, name in enumerate(kernel.operands):
        operation = known.get(name)
        while operation is not None and operation.opcode in _FORWARDING and operation.operands:
            operation = known.get(operation.operands[0])  # an operand may be staged through VMEM
        if operation is not None and operation.opcode == "constant":
            table = _constant_table(operation)
            if table is not None:
                tables[index] = table
    return tables
