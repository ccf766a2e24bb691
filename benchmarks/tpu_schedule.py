"""The compiler's final schedule of one TPU kernel, and what executing it costs.

libtpu's low-level optimiser dumps its stages as text. Two files are read per kernel:

  *-post-bundle-packing-post-ra.txt
      the code after register allocation and packing into bundles, as a tree of regions, each with
      `region range: [first, last + 1)` in bundles;
  *-pre-delay_hlo-static-per-bundle-utilization.txt
      units in use per bundle.

One bundle issues per cycle, and at this stage waits for matrix and transpose units are still explicit empty bundles, so
the length of a region is the compiler's own estimate of its cycles. The next stage deletes empty bundles that the
hardware interlocks cover: the bundle count of the final code is a size, not a time.

Not modelled: instruction fetch of very long kernels, conflicts in VMEM, HBM shared unevenly by two cores, throttling.
"""

import dataclasses
import re
from pathlib import Path

from benchmarks.tpu_chips import COPY_LATENCY, Chip
from benchmarks.tpu_scalar import Block, Machine, Program, is_hbm

_SPACES = {"smem": 1 << 40, "vmem": 2 << 40, "hbm": 3 << 40, "sflag": 4 << 40}
_ALLOCATION = re.compile(
    r"#allocation(\w+) \[shape = '[^']*', space=(\w+), size = (0x[0-9a-f]+), offset = (\w+),(.*?)tag = '([^']*)'"
)


@dataclasses.dataclass
class Region:
    """A node of the region tree: bundles [start, end) and the compiler's remark, such as "loop_body"."""

    number: int
    remark: str
    start: int = -1
    end: int = -1


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A buffer in one of the on-chip memories, in units of that memory."""

    space: str
    offset: int
    size: int
    is_fixed: bool
    tag: str


@dataclasses.dataclass
class Execution:
    """What one core did.

    Attributes:
      cycles: bundles issued.
      timeline: cycles including waits for copies.
      hbm_bytes: bytes copied between HBM and on-chip memories.
      num_copies: copies issued.
      busy: unit -> units in use, summed over cycles.
      spans: (first bundle, last + 1) -> executions.
      unknown_branches: region -> decisions on values that are not known.
      unknown_operations: operation -> executions whose result decides something and is not modelled.
    """

    cycles: int
    timeline: float
    hbm_bytes: int
    num_copies: int
    busy: dict[str, int]
    spans: dict[tuple[int, int], int]
    unknown_branches: dict[int, int]
    unknown_operations: dict[str, int]


class Schedule:
    """Parsed schedule of one kernel.

    Args:
      code: text of the bundle-packing dump.
      utilization: text of the per-bundle utilization dump.
    """

    def __init__(self, code: str, utilization: str):
        self.allocations = {
            number: Allocation(space, int(offset, 0), int(size, 16), "fixed_abs" in flags, tag)
            for number, space, size, offset, flags, tag in _ALLOCATION.findall(code)
        }
        self._read_utilization(utilization)
        self.regions: dict[int, Region] = {}
        blocks = self._read_code(code)
        self.num_bundles = self.regions[0].end
        if len(self._used) <= self.num_bundles:
            raise ValueError(f"{self.num_bundles} bundles in the code but {len(self._used) - 1} in the utilization")
        for block in blocks:
            block.end = self.regions[block.region].end
        # Addresses only need to differ between allocations and to leave room for indices.
        self._addresses = {
            number: ((index + 1) << 34) + _SPACES.get(allocation.space, 5 << 40)
            for index, (number, allocation) in enumerate(self.allocations.items())
        }
        self.program = Program(blocks, self._addresses, self.num_bundles)

    @classmethod
    def read(cls, code_path: Path, utilization_path: Path) -> "Schedule":
        """The schedule in two dump files."""
        return cls(code_path.read_text(), utilization_path.read_text())

    @property
    def vmem(self) -> int:
        """Bytes of VMEM in use."""
        return max((a.offset + a.size for a in self.allocations.values() if a.space == "vmem"), default=0)

    @property
    def fills(self) -> int:
        """Vector loads in the code that refill spilled registers."""
        return self._used[-1][self.units.index("VLOAD:FILL")]

    @property
    def spills(self) -> int:
        """Vector stores in the code that spill registers."""
        return self._used[-1][self.units.index("VSTORE:SPILL")]

    def _read_utilization(self, text):
        lines = text.splitlines()
        self.units = [unit.strip() for unit in lines[1].split(",")]
        self.capacity = dict(zip(self.units, map(int, lines[2].split())))
        self._used = [(0,) * len(self.units)]  # prefix sums over bundles
        for line in filter(str.strip, lines[4:]):
            self._used.append(tuple(total + int(used) for total, used in zip(self._used[-1], line.split())))

    def _read_code(self, code) -> list[Block]:
        # Labels of operands, /*size=*/, are kept as size=; all other comments go, and some span several lines.
        text = re.sub(r"/\*.*?\*/", "", re.sub(r"/\*(\w+)=\*/", r"\1=", code), flags=re.S)
        blocks: list[Block] = []
        stack: list[tuple[int, int]] = []  # (indentation, region) of the regions around the current line
        for line in text.split("\n"):
            stripped = line.strip()
            indentation = len(line) - len(line.lstrip())
            if match := re.match(r"\$region(\d+):.*?(?:\s*//\s*(.*))?$", stripped):
                stack = [entry for entry in stack if entry[0] < indentation]
                number = int(match.group(1))
                self.regions[number] = Region(number, (match.group(2) or "").strip())
                stack.append((indentation, number))
                blocks.append(Block(number, []))
            elif (match := re.match(r"// region range: \[(\d+), (\d+)\)", stripped)) and stack:
                region = self.regions[stack[-1][1]]
                region.start, region.end = map(int, match.groups())
            elif stripped.startswith("%"):
                outer = [entry for entry in stack if entry[0] < indentation]
                if outer != stack or not blocks:
                    stack = outer
                    blocks.append(Block(stack[-1][1] if stack else 0, []))
                blocks[-1].lines.append(stripped)
                if " = sbr." in stripped:
                    blocks.append(Block(blocks[-1].region, []))
        return blocks

    def execute(
        self, chip: Chip, core: int = 0, operands: dict[int, list[int]] | None = None, *,
        skip_unknown: bool = False, latency: float = COPY_LATENCY,
    ) -> Execution:  # fmt: skip
        """Runs the kernel's scalar code as one core would.

        Args:
          chip: gives bandwidth and clock.
          core: index of the core among the device's.
          operands: contents of scalar-prefetch operands, {operand index: 32-bit words}.
          skip_unknown: jump over code behind a branch on an unknown value, instead of running it.
          latency: seconds of one copy beyond its bytes.
        """
        memory = {}
        for number, allocation in self.allocations.items():
            if allocation.space == "smem" and allocation.is_fixed and "core index" in allocation.tag:
                memory[self._addresses[number]] = core
            if match := re.match(r"prefetched SMEM operand (\d+)", allocation.tag):
                words = (operands or {}).get(int(match.group(1)), ())
                memory.update((self._addresses[number] + index, word) for index, word in enumerate(words))
        machine = Machine(memory, chip.hbm_bytes_per_cycle, latency * chip.clock, skip_unknown)
        machine.run(self.program)
        busy = [0] * len(self.units)
        for span, runs in machine.spans.items():
            busy = [total + runs * used for total, used in zip(busy, self.units_in(*span))]
        return Execution(
            cycles=machine.cycles,
            timeline=machine.now,
            hbm_bytes=sum(size for kind, size in machine.copied.items() if is_hbm(kind)),
            num_copies=machine.num_copies,
            busy=dict(zip(self.units, busy)),
            spans=machine.spans,
            unknown_branches=machine.unknown,
            unknown_operations=machine.forgotten,
        )

    def units_in(self, start: int, end: int) -> list[int]:
        """Use of each unit in one execution of bundles [start, end)."""
        return [after - before for before, after in zip(self._used[start], self._used[end])]

    def span_table(self, execution: Execution) -> list[dict]:
        """Every span of bundles between branches, with its executions and cycles, dearest first.

        `matmul` is the share of the matrix units in use during one execution.
        """
        rows = []
        matmul = self.units.index("MATMUL")
        for (start, end), runs in execution.spans.items():
            around = [region for region in self.regions.values() if 0 <= region.start <= start and end <= region.end]
            region = min(around, key=lambda region: region.end - region.start)
            share = self.units_in(start, end)[matmul] / (self.capacity["MATMUL"] * (end - start))
            rows.append(
                {"start": start, "end": end, "runs": runs, "cycles": runs * (end - start), "matmul": share,
                 "region": region.number, "remark": region.remark}
            )  # fmt: skip
        return sorted(rows, key=lambda row: -row["cycles"])
