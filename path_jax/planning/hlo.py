"""Text of optimised HLO programs: computations, operations, and sizes of arrays."""

import dataclasses
import math
import re

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64,
}  # fmt: skip
# An array in a type: element type, sizes, layout.
LEAF = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation."""

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    line: str

    @property
    def source(self) -> str:
        """The operation of the model that it comes from, "" where the compiler does not say."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        return found.group(1) if found else ""

    def called(self, attribute: str) -> list[str]:
        """Computations named by an attribute: `body=%x`, `branch_computations={%x, %y}`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.line)
        return re.findall(r"[\w.\-]+", found.group(1)) if found else []


def _closing(text, start):
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses: {text[start : start + 100]}")


def parse_operation(line: str) -> Operation | None:
    """The operation on a line of HLO text, None if there is none."""
    match = re.match(r"\s*(?:ROOT )?%?([\w.\-<>]+) = ", line)
    if not match:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode = re.match(r"([\w\-]+)\(", rest)
    if not opcode:
        return None
    inside = rest[opcode.end() : _closing(rest, opcode.end() - 1)]
    operands = () if opcode.group(1) == "constant" else tuple(re.findall(r"%([\w.\-<>]+)", inside))
    return Operation(match.group(1), opcode.group(1), result, operands, line)


def computations(hlo: str) -> dict[str, list[Operation]]:
    """Operations by computation; the entry's is also under "ENTRY"."""
    found, current = {}, []
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            current = found.setdefault(match.group(2), [])
            if match.group(1):
                found["ENTRY"] = current
        elif operation := parse_operation(line):
            current.append(operation)
    return found


def array_bytes(dtype: str, dims: str, layout: str | None) -> int:
    """Bytes of an array, its minor axes padded to the tile of its layout: f32[8,1]{1,0:T(8,128)} has 4096."""
    if dtype not in _BITS:
        return 0
    shape = [int(size) for size in dims.split(",") if size]
    order = re.match(r"[\d,]+", layout or "")
    if order and shape:
        shape = [shape[int(axis)] for axis in reversed(order.group().split(","))]
    if tile := re.search(r"T\(([\d,]+)\)", layout or ""):
        sizes = [int(size) for size in tile.group(1).split(",")]
        for axis, size in zip(reversed(range(len(shape))), reversed(sizes)):
            shape[axis] = -(-shape[axis] // size) * size
    return math.prod(shape) * _BITS[dtype] // 8


def type_bytes(result: str, in_hbm: bool = True) -> int:
    """Bytes of an HLO type, tuples summed; with in_hbm only of arrays in HBM (no memory space in the layout)."""
    return sum(
        array_bytes(dtype, dims, layout)
        for dtype, dims, layout in LEAF.findall(result)
        if not (in_hbm and re.search(r"S\([1-9]\)", layout))
    )


def value_bytes(result: str) -> int:
    """Bytes of the values of an HLO type, tuples summed: without padding, wherever they are."""
    return sum(array_bytes(dtype, dims, None) for dtype, dims, _ in LEAF.findall(result))
