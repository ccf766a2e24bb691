"""The scalar half of a compiled TPU kernel: its instructions as Python closures, and a machine that runs them.

Grid loop, `pl.when`, `fori_loop` and the copy pipeline of a kernel are scalar code in the compiler's schedule dump.
Running that code, and nothing of the vector code, tells how often each stretch of the schedule executes and which
copies it issues. A value that the machine cannot know (it came from a vector, or from memory nobody wrote) is None.

Only what decides something is lowered: branches, copies, waits, stores to scalar memory and what these depend on.
Address arithmetic of vector loads, which is most of the scalar code, never runs.
"""

import dataclasses
import re
from collections.abc import Callable

MAX_BLOCKS = 50_000_000  # visited by one run before it is declared endless
GRANULE = 32  # bytes per unit of a copy's size

_MASK = 0xFFFFFFFF


def _signed(x):
    return ((x + 0x80000000) & _MASK) - 0x80000000


_ARITHMETIC = {
    "sadd": lambda x, y: _signed(x + y),
    "ssub": lambda x, y: _signed(x - y),
    "smul": lambda x, y: _signed(x * y),
    "sand": lambda x, y: _signed(x & y),
    "sor": lambda x, y: _signed(x | y),
    "sxor": lambda x, y: _signed(x ^ y),
    "sshll": lambda x, y: _signed(x << (y & 31)),
    "sshrl": lambda x, y: _signed((x & _MASK) >> (y & 31)),
    "sshra": lambda x, y: _signed(x >> (y & 31)),
    "smin": min,
    "smax": max,
    "sdiv": lambda x, y: int(x / y) if y else None,
    "srem": lambda x, y: x - int(x / y) * y if y else None,
    "por": lambda x, y: x | y,
    "pand": lambda x, y: x & y,
    "pnand": lambda x, y: (x & y) ^ True,
    "pnor": lambda x, y: (x | y) ^ True,
    "pxor": lambda x, y: x ^ y,
    "pxnor": lambda x, y: x ^ y ^ True,
    "scalar_lea": lambda x, y: x + y,  # not wrapped: addresses of different memories are told apart by high bits
}
_COMPARISONS = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}
_OPERAND = re.compile(r"(!?)%(\w+)$")
_NUMBER = re.compile(r"\$?(-?0x[0-9a-f]+|-?\d+)$")
_GUARDED = re.compile(r"\((!?%\w+)\),?\s*(.*)$")
_GUARDED_UPDATE = re.compile(r"\((!?%\w+), (!?%\w+|\[[^\]]*\]|-?\d+)\),?\s*(.*)$")
_BRANCH = re.compile(r"(?:\((!?%\w+)\)\s*)?target bundleno = (\d+) \(0x[0-9a-f]+\), region = (\d+)")
_WAIT = re.compile(r"(?:\((!?%\w+)\),?\s*)?(\[[^\]]*\]|%\w+),\s*(\d+|%\w+)")


@dataclasses.dataclass(frozen=True)
class Step:
    """One lowered instruction; `target` is the register it defines, None if it acts on the machine."""

    run: Callable
    target: int | None
    sources: tuple[int, ...]


@dataclasses.dataclass
class Block:
    """Straight-line code of one region. After it: the branch if taken, else the next block.

    Attributes:
      region: number of the region it lies in.
      lines: instructions as text, comments removed.
      end: bundle at which a branch of this block is decided.
      steps: lowered instructions; filled in by `Program`.
      branch: (condition register, target bundle, target block, is back edge), or None.
    """

    region: int
    lines: list[str]
    end: int = 0
    steps: list[Step] = dataclasses.field(default_factory=list)
    branch: tuple | None = None


class Program:
    """Lowered scalar code of a kernel.

    Args:
      blocks: code in program order.
      addresses: base address of each allocation by its number.
      total: bundles of the kernel.

    Raises:
      ValueError: for a branch, copy or wait that does not parse: guessing there would change the count silently.
    """

    def __init__(self, blocks: list[Block], addresses: dict[str, int], total: int):
        self.blocks, self.addresses, self.total = blocks, addresses, total
        self.initial: list = []  # register -> constant, or None
        self._constants: dict = {}
        self._names: dict[str, int] = {}
        self._parents: dict[str, str] = {}
        self._first_block = {}
        for index, block in enumerate(blocks):
            self._first_block.setdefault(block.region, index)
            for line in block.lines:
                self._join_phi(line)
        for block in blocks:
            for line in block.lines:
                self._lower(block, line)
        self._keep_live()

    def _join_phi(self, line):
        # The code is in conventional SSA form: a phi and its inputs never live at once, so they share a register.
        if match := re.match(r"%(\w+) = [sp]phi (.*)$", line):
            for name in re.findall(r"%(\w+)", match.group(2)):
                self._parents[self._root(name)] = self._root(match.group(1))

    def _root(self, name):
        while name in self._parents and self._parents[name] != name:
            name = self._parents[name]
        return name

    def _register(self, name):
        root = self._root(name)
        if root not in self._names:
            self._names[root] = self._fresh(None)
        return self._names[root]

    def _fresh(self, value):
        self.initial.append(value)
        return len(self.initial) - 1

    def _constant(self, value):
        if value not in self._constants:
            self._constants[value] = self._fresh(value)
        return self._constants[value]

    def _operand(self, block, text) -> int:
        """Register of an operand: %name, !%name, a number, [#allocation + operand]; anything else is unknown."""
        text = re.sub(r"^\w+=", "", text.strip())
        if match := _OPERAND.match(text):
            register = self._register(match.group(2))
            return self._emit(block, lambda x, y: x ^ y, register, self._constant(True)) if match.group(1) else register
        if match := _NUMBER.match(text):
            return self._constant(_signed(int(match.group(1), 0)))
        if match := re.match(r"#allocation(\w+)$", text):
            return self._constant(self.addresses.get(match.group(1), 0))
        if text.startswith("[") and text.endswith("]"):
            total, *rest = [self._operand(block, part) for part in text[1:-1].split("+")]
            for register in rest:
                total = self._emit(block, _ARITHMETIC["scalar_lea"], total, register)
            return total
        return self._constant(None)

    def _emit(self, block, function, x, y, target=None):
        """Appends target = function(x, y), unknown if either operand is."""
        target = self._fresh(None) if target is None else target

        def run(machine):
            left, right = machine.registers[x], machine.registers[y]
            machine.registers[target] = None if left is None or right is None else function(left, right)

        block.steps.append(Step(run, target, (x, y)))
        return target

    def _emit_select(self, block, condition, on_true, on_false, target):
        def run(machine):
            registers = machine.registers
            choice = registers[condition]
            registers[target] = None if choice is None else registers[on_true if choice else on_false]

        block.steps.append(Step(run, target, (condition, on_true, on_false)))

    def _emit_load(self, block, address, target):
        def run(machine):
            machine.registers[target] = machine.memory.get(machine.registers[address])

        block.steps.append(Step(run, target, (address,)))

    def _emit_effect(self, block, act, guard, *sources):
        """Appends an effect: act(machine, was the guard known, *values) unless the guard is known to be false."""
        guard = self._constant(True) if guard is None else self._operand(block, guard)

        def run(machine):
            condition = machine.registers[guard]
            if condition is None or condition:
                act(machine, condition is not None, *(machine.registers[source] for source in sources))

        block.steps.append(Step(run, None, (guard, *sources)))

    def _lower(self, block, line):
        match = re.match(r"%(\w+) = ([\w.]+)\s*(.*)$", line)
        if not match:
            return
        name, operation, rest = match.groups()
        base, rest = operation.split(".")[0], rest.strip()
        if base == "sbr":
            self._lower_branch(block, rest)
        elif base == "dma":
            self._lower_copy(block, operation, rest)
        elif base == "sst":
            match = re.match(r"\[smem:(\[.*?\])\]\s*(?:\((!?%\w+)\),?\s*)?(.*)$", rest)
            address, value = self._operand(block, match.group(1)), self._operand(block, match.group(3).lstrip(", "))
            self._emit_effect(block, Machine.store, match.group(2), address, value)
        elif name[0] in "sp" and base not in ("sphi", "pphi"):
            self._lower_value(block, self._register(name), operation, rest)

    def _lower_branch(self, block, rest):
        match = _BRANCH.match(rest)
        if not match:
            raise ValueError(f"unparsed branch: {rest}")
        condition = self._operand(block, match.group(1)) if match.group(1) else self._constant(True)
        bundle, region = int(match.group(2)), int(match.group(3))
        block.branch = (condition, bundle, self._first_block[region], bundle < block.end)

    def _lower_copy(self, block, operation, rest):
        region = block.region
        if operation.startswith("dma.done"):
            match = _WAIT.match(rest)
            if not match:
                raise ValueError(f"unparsed wait: {rest}")
            flag, size = self._operand(block, match.group(2)), self._operand(block, match.group(3))
            wait = lambda machine, known, *values: machine.wait(region, known, *values)
            self._emit_effect(block, wait, match.group(1), flag, size)
            return
        kind = operation.removeprefix("dma.")
        size, flag = (
            re.search(label + r"=(\[[^\]]*\]|[^\s,]+)", rest) for label in ("size_in_granules", "dst_syncflagno")
        )
        if not size or not flag:
            raise ValueError(f"unparsed copy: {operation} {rest}")
        guard = re.search(r"\((!?%\w+)\)", rest)
        copy = lambda machine, known, *values: machine.copy(kind, region, known, *values)
        operands = self._operand(block, size.group(1)), self._operand(block, flag.group(1))
        self._emit_effect(block, copy, guard.group(1) if guard else None, *operands)

    def _lower_value(self, block, target, operation, rest):
        parts = operation.split(".")
        guard = None
        if match := _GUARDED_UPDATE.match(rest):
            guard, old, rest = match.groups()
        elif match := _GUARDED.match(rest):
            rest = match.group(2)  # speculation: without an old value, executing it anyway is harmless
        result = target if guard is None else self._fresh(None)
        if parts[0] == "sld":
            match = re.match(r"\[smem:(\[.*?\])\]", rest)
            self._emit_load(block, self._operand(block, match.group(1) if match else ""), result)
        elif parts[0] in ("smov", "pmov", "pneg", "int_to_ptr", "inlined_call_operand"):
            if parts[0] == "inlined_call_operand":
                # An array in HBM: its address only has to differ from all others.
                rest = str(int(re.search(r"index: (\d+)", rest).group(1)) - (1 << 30))
            source = self._operand(block, re.sub(r"\[resolvable:\$\w+\]\s*", "", rest))
            self._emit(block, _ARITHMETIC["pxor"], source, self._constant(parts[0] == "pneg"), result)
        elif parts[0] in (*_ARITHMETIC, "scmp", "scalar_select"):
            operands = [self._operand(block, text) for text in rest.split(",")]
            if parts[0] == "scalar_select":
                self._emit_select(block, *operands, result)
            elif parts[0] == "scmp":
                compare = _COMPARISONS[parts[1]]
                unsigned = lambda x, y: compare(x & _MASK, y & _MASK)
                self._emit(block, unsigned if "u32" in parts else compare, *operands[:2], result)
            else:
                self._emit(block, _ARITHMETIC[parts[0]], *operands[:2], result)
        else:
            forget = lambda machine: machine.forget(operation, result)
            block.steps.append(Step(forget, result, ()))
        if guard is not None:
            self._emit_select(block, self._operand(block, guard), result, self._operand(block, old), target)

    def _keep_live(self):
        """Drops steps on which no branch and no effect depends."""
        steps = [step for block in self.blocks for step in block.steps]
        sources: dict[int, set[int]] = {}
        for step in steps:
            if step.target is not None:
                sources.setdefault(step.target, set()).update(step.sources)
        pending = [source for step in steps if step.target is None for source in step.sources]
        pending += [block.branch[0] for block in self.blocks if block.branch]
        live = set()
        while pending:
            register = pending.pop()
            if register not in live:
                live.add(register)
                pending.extend(sources.get(register, ()))
        for block in self.blocks:
            block.steps = [step for step in block.steps if step.target is None or step.target in live]


def is_hbm(kind: str) -> bool:
    """Whether a copy uses HBM bandwidth; "general" is how strided blocks move between HBM and VMEM."""
    return "hbm" in kind or kind == "general"


class Machine:
    """Runs a program on one core: compute clock, executions of each span of bundles, and a model of the copy queue.

    Copies are served in issue order at the given bandwidth, each visible `latency` cycles after its last byte.

    Args:
      memory: scalar memory at the start, {address: word}.
      bytes_per_cycle: HBM bandwidth of the core.
      latency: cycles of one copy beyond its bytes.
      skip_unknown: jump over code behind a branch on an unknown value, instead of running it.
    """

    def __init__(self, memory: dict[int, int], bytes_per_cycle: float, latency: float, skip_unknown: bool = False):
        self.memory = memory
        self.bytes_per_cycle, self.latency, self.skip_unknown = bytes_per_cycle, latency, skip_unknown
        self.registers: list = []
        self.cycles = 0  # bundles issued, without waits
        self.now = 0.0  # cycles with waits for copies
        self.spans: dict[tuple[int, int], int] = {}  # (first bundle, last + 1) -> executions
        self.copied: dict[str, int] = {}  # kind -> bytes
        self.num_copies = 0
        self.unknown: dict[int, int] = {}  # region -> decisions on unknown values
        self.forgotten: dict[str, int] = {}  # operations that are not modelled but decide something -> executions
        self._hbm_free = 0.0
        self._in_flight: dict = {}  # flag -> [[granules, time visible], ...]

    def run(self, program: Program):
        """Executes the program to its end.

        Raises:
          RuntimeError: if it does not end, because its loops depend on something not modelled.
        """
        self.registers = list(program.initial)
        bundle = index = 0
        for _ in range(MAX_BLOCKS):
            if index >= len(program.blocks):
                self._advance(bundle, program.total)
                return
            block = program.blocks[index]
            for step in block.steps:
                step.run(self)
            index += 1
            if block.branch:
                condition, target_bundle, target_block, is_back = block.branch
                self._advance(bundle, block.end)
                bundle = block.end
                if self._takes(self.registers[condition], block.region, is_back):
                    bundle, index = target_bundle, target_block
        raise RuntimeError(f"the scalar code did not end within {MAX_BLOCKS} blocks")

    def _takes(self, condition, region, is_back) -> bool:
        if condition is None:
            self._note_unknown(region)
            return not is_back and self.skip_unknown  # a loop of unknown length is left after one trip
        return bool(condition)

    def _advance(self, start, end):
        if end > start:
            self.spans[start, end] = self.spans.get((start, end), 0) + 1
            self.cycles += end - start
            self.now += end - start

    def _note_unknown(self, region):
        self.unknown[region] = self.unknown.get(region, 0) + 1

    def forget(self, operation, register):
        """Result of an operation that is not modelled."""
        self.registers[register] = None
        self.forgotten[operation] = self.forgotten.get(operation, 0) + 1

    def store(self, _, address, value):
        """Scalar store. One under an unknown guard is executed: it costs no time by itself."""
        self.memory[address] = value

    def copy(self, kind, region, is_known, granules, flag):
        """Issues a copy of `granules` that raises `flag` when done."""
        if not is_known or granules is None:
            self._note_unknown(region)
        size = (granules or 0) * GRANULE
        self.copied[kind] = self.copied.get(kind, 0) + size
        self.num_copies += 1
        done = self.now
        if is_hbm(kind):
            self._hbm_free = max(self.now, self._hbm_free) + size / self.bytes_per_cycle
            done = self._hbm_free + self.latency
        self._in_flight.setdefault(flag, []).append([granules or 0, done])

    def wait(self, region, is_known, flag, granules):
        """Waits until copies of `granules` in total have raised `flag`."""
        if not is_known:
            self._note_unknown(region)
        queue = self._in_flight.get(flag)
        needed = granules or 0
        while queue and needed > 0:
            left, done = queue[0]
            self.now = max(self.now, done)
            queue[0][0] = left - needed
            needed -= left
            if queue[0][0] <= 0:
                queue.pop(0)
