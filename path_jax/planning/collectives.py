"""The collectives of a partitioned HLO program: how often each runs, over which mesh axes, and what a device sends."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from path_jax.planning.hlo import Operation, computations, value_bytes

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
UNKNOWN_AXES = "?"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, in one step of training.

    Attributes:
      kind: one of KINDS; axes: mesh axes whose devices take part, joined by "+", UNKNOWN_AXES where the program's form
        of naming them is not known here; group_size: devices in a group.
      count: how often it runs, loops multiplied out.
      payload_bytes: of one run: the whole array that is gathered, or a device's share of what is summed or moved.
      source: operation of the model that it comes from, or the loop that it is in.
      channel: number that the compiler gave it, the same where it occurs several times in fusions that run beside it.
    """

    kind: str
    axes: str
    group_size: int
    count: int
    payload_bytes: int
    source: str
    channel: int | None = None

    @property
    def sent_bytes(self) -> float:
        """What one device sends in all runs, by rings: payload (n - 1) / n, twice that for a sum, once for a move."""
        share = {"collective-permute": 1.0, "all-reduce": 2 * (1 - 1 / self.group_size)}
        return self.count * self.payload_bytes * share.get(self.kind, 1 - 1 / self.group_size)


def find_collectives(hlo: str, mesh_shape: Mapping[str, int]) -> tuple[list[Collective], int]:
    """Collectives of a program and of everything it calls.

    A loop counts as often as it runs. Of the branches of a conditional, the one that sends most counts.

    Args:
      hlo: text of the optimised program; its partitions are the mesh's devices in row-major order.
      mesh_shape: {axis: size}, in the mesh's order.

    Returns:
      The collectives, and the number of loops with collectives whose trips the program does not say (counted as one).
    """
    walk = _Walk(hlo, mesh_shape)
    return walk.collectives("ENTRY"), walk.num_unknown_loops


class _Walk:
    def __init__(self, hlo, mesh_shape):
        self._parts = computations(hlo)
        self._mesh_shape = mesh_shape
        self._found = {}
        self.num_unknown_loops = 0

    def collectives(self, name: str) -> list[Collective]:
        """Of one computation; each is visited once, however often it is called."""
        if name not in self._found:
            results = {operation.name: operation for operation in self._parts.get(name, ())}
            found, fused = [], set()
            for operation in results.values():
                for collective in self._of_operation(operation, results):
                    # TPU: a gather or move that runs beside other work is named where it starts, goes on and ends.
                    is_repeated = operation.opcode == "fusion" and collective.kind != "reduce-scatter"
                    if is_repeated and collective.channel is not None:
                        key = collective.channel, collective.kind, collective.payload_bytes
                        if key in fused:
                            continue
                        fused.add(key)
                    found.append(collective)
            self._found[name] = found
        return self._found[name]

    def _of_operation(self, operation, results):
        kind = operation.opcode.removesuffix("-start")
        if kind in KINDS:
            return [self._collective(kind, operation, results)]
        if operation.opcode == "while":
            inside = [found for body in operation.called("body") for found in self.collectives(body)]
            if not inside:
                return []
            trips = num_trips(operation, results, self._parts.get(operation.called("condition")[0], ()))
            self.num_unknown_loops += trips is None
            times = 1 if trips is None else trips
            return [dataclasses.replace(x, count=x.count * times, source=x.source or operation.source) for x in inside]
        if operation.opcode == "conditional":
            branches = operation.called("branch_computations")
            branches = branches or operation.called("true_computation") + operation.called("false_computation")
            total = lambda inside: sum(x.sent_bytes for x in inside)
            return max(map(self.collectives, branches), key=total, default=[])
        if operation.opcode in ("fusion", "async-start"):  # an async-done names the computation again
            return [self._scattered(x, name) for name in operation.called("calls") for x in self.collectives(name)]
        return [x for name in operation.called("to_apply") for x in self.collectives(name)]

    def _collective(self, kind, operation, results):
        payload = sum(value_bytes(results[name].result) for name in operation.operands if name in results)
        axes, group_size = mesh_axes(operation.line, self._mesh_shape)
        if kind == "all-gather":
            payload *= group_size
        channel = re.search(r"channel_id=(\d+)", operation.line)
        return Collective(
            kind, axes, group_size, 1, payload, operation.source, int(channel.group(1)) if channel else None
        )

    def _scattered(self, collective, called):
        """TPU compilers write a reduce-scatter as a fusion of a sum and of the slice that a device keeps."""
        is_sliced = any(operation.opcode == "dynamic-slice" for operation in self._parts[called])
        is_scatter = collective.kind == "all-reduce" and called.startswith("all-reduce-scatter") and is_sliced
        return dataclasses.replace(collective, kind="reduce-scatter") if is_scatter else collective


def num_trips(loop: Operation, results: Mapping[str, Operation], condition: Sequence[Operation]) -> int | None:
    """Trips of a loop: the compiler's own note, or the limit of a counter that rises in steps of one; None if neither.

    A counter whose first value is not to be seen starts at 0, as those of `jax.lax.scan` do.

    Args:
      loop: the `while`; results: operations of its computation, by name; condition: those of its condition.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.line):
        return int(noted.group(1))
    inside = {operation.name: operation for operation in condition}
    compare = next((x for x in condition if x.opcode == "compare" and "ROOT" in x.line), None)
    if compare is None or "direction=LT" not in compare.line:
        return None
    carried = results.get(loop.operands[0])

    def value(operation, scope):
        while operation is not None and operation.opcode in ("copy", "bitcast"):
            operation = scope.get(operation.operands[0])
        if operation is not None and operation.opcode == "constant":
            found = re.search(r" constant\((-?\d+)\)", operation.line)
            return int(found.group(1)) if found else None
        index = re.search(r"\bindex=(\d+)", operation.line) if operation is not None and scope is inside else None
        if index is None or carried is None or carried.opcode != "tuple":
            return None
        return value(results.get(carried.operands[int(index.group(1))]), results)

    first, last = (value(inside.get(name), inside) for name in compare.operands)
    return None if last is None else max(0, last - (first or 0))


def mesh_axes(line: str, mesh_shape: Mapping[str, int]) -> tuple[str, int]:
    """(axes joined by "+", devices in a group) of a collective's line."""
    sizes, num_devices = tuple(mesh_shape.values()), math.prod(mesh_shape.values())
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        groups = [tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs.group(1))]
    else:
        groups = replica_groups(line, num_devices)
    if groups is None:
        return UNKNOWN_AXES, num_devices
    varying = set()
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), sizes))
        varying |= {axis for axis, place in zip(mesh_shape, places) if np.ptp(place)}
    return "+".join(axis for axis in mesh_shape if axis in varying), max(map(len, groups), default=1)


def replica_groups(line: str, num_devices: int) -> Sequence[Sequence[int]] | None:
    """Groups of device numbers; None for forms other than these.

    {{0,1},{2,3}};  [groups,size]<=[sizes]T(permutation) of the numbers in order;  mesh['x'=2,'y'=2] {'x'}, groups along
    x of the numbers in order, or in that of a [sizes]T(permutation) behind `device_ids=`.
    """
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{('\w+'(?:,'\w+')*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh.group(3))]
        numbers = _iota(mesh.group(2) or f"[{num_devices}]")
        if numbers is None:
            return None
        numbers = np.moveaxis(numbers.reshape(tuple(sizes.values())), along, range(-len(along), 0))
        return numbers.reshape(-1, math.prod(numbers.shape[-len(along) :])).tolist()
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return _iota(iota.group(2)).reshape([int(size) for size in iota.group(1).split(",")]).tolist()
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line):
        groups = [[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))]
        return groups or [list(range(num_devices))]
    return None


def _iota(text: str) -> np.ndarray | None:
    """The numbers 0, 1, ... in an array "[sizes]", its axes permuted by "[sizes]T(permutation)"."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        return None
    sizes, order = ([int(x) for x in part.split(",")] if part else None for part in found.groups())
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers if order is None else numbers.transpose(order)
