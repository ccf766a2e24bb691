"""HBM traffic of a compiled program: what its operations read and write, loops multiplied out."""

from path_jax.planning.collectives import num_trips
from path_jax.planning.hlo import computations, type_bytes

_FREE = (
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "while", "conditional", "call",
    "partition-id", "replica-id", "iota",
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


def hbm_bytes(hlo: str) -> int:
    """Bytes that one device moves between HBM and its cores in one run of the program.

    Every operation reads its operands and writes its results once, a fusion as a whole; a slice costs what is cut out,
    an update in place what is put in. Arrays that a TPU's compiler places in VMEM are free. So a kernel that reads an
    operand many times counts as one that reads it once, and a cache helps nobody.
    """
    return _Traffic(hlo).of("ENTRY")


class _Traffic:
    def __init__(self, hlo):
        self._parts = computations(hlo)
        self._known = {}

    def of(self, name: str) -> int:
        """Of one computation and what it calls."""
        if name not in self._known:
            scope = {operation.name: operation for operation in self._parts.get(name, ())}
            self._known[name] = sum(self._of_operation(operation, scope) for operation in scope.values())
        return self._known[name]

    def _of_operation(self, operation, scope):
        if operation.opcode == "while":
            trips = num_trips(operation, scope, self._parts.get(operation.called("condition")[0], ()))
            return (1 if trips is None else trips) * sum(map(self.of, operation.called("body")))
        if operation.opcode == "conditional":
            branches = operation.called("branch_computations")
            branches = branches or operation.called("true_computation") + operation.called("false_computation")
            return max(map(self.of, branches), default=0)
        if operation.opcode == "call":
            return sum(map(self.of, operation.called("to_apply")))
        if operation.opcode in _FREE or operation.opcode.endswith("-done"):
            return 0
        operands = [scope[name] for name in operation.operands if name in scope]
        if operation.opcode == "fusion":
            return self._of_fusion(operation, operands)
        if operation.opcode in _SLICES:
            return 2 * type_bytes(operation.result)
        if operation.opcode == "dynamic-update-slice":
            return 2 * type_bytes(operands[1].result) if len(operands) > 1 else 0
        return type_bytes(operation.result) + sum(type_bytes(x.result) for x in operands)

    def _of_fusion(self, fusion, operands):
        total, updated = 0, 0
        (name,) = fusion.called("calls")
        for number, operand in enumerate(operands):
            whole, uses = type_bytes(operand.result), list(self._uses(name, number))
            if whole and uses and all(x.opcode in _SLICES and place == 0 for x, place, _ in uses):
                total += min(whole, sum(type_bytes(x.result, in_hbm=False) for x, _, _ in uses))
            elif whole and uses and all(x.opcode == "dynamic-update-slice" and place == 0 for x, place, _ in uses):
                updated += whole  # in place: the result is this operand but for what is put in
                puts = [scope[x.operands[1]] for x, _, scope in uses]
                total += 2 * sum(type_bytes(x.result, in_hbm=False) for x in puts)
            else:
                total += whole
        return total + max(0, type_bytes(fusion.result) - updated)

    def _uses(self, name, number):
        """(operation, position of the operand, its computation) of those that use a parameter of a fused computation,
        through renamings and fusions inside."""
        scope = {operation.name: operation for operation in self._parts.get(name, ())}
        users = {}
        for operation in scope.values():
            for position, operand in enumerate(operation.operands):
                users.setdefault(operand, []).append((operation, position))

        def follow(array):
            for operation, position in users.get(array, ()):
                if operation.opcode in ("bitcast", "copy", "reshape"):
                    yield from follow(operation.name)
                elif operation.opcode == "fusion":
                    for inner in operation.called("calls"):
                        yield from self._uses(inner, position)
                else:
                    yield operation, position, scope

        parameters = (x for x in scope.values() if x.opcode == "parameter" and f"parameter({number})" in x.line)
        for parameter in parameters:
            yield from follow(parameter.name)
