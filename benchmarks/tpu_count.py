"""Compiles a case for a TPU and counts the cycles of its kernels and the traffic around them."""

import dataclasses
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import tpu_hlo
from benchmarks.tpu_chips import COPY_LATENCY, chip_of
from benchmarks.tpu_compile import compile_case
from benchmarks.tpu_schedule import Schedule


@dataclasses.dataclass(frozen=True)
class KernelCount:
    """Count of one kernel call.

    Attributes:
      name: of the call in the HLO.
      cycles: bundles times executions on the slowest core; waits for copies are not included.
      hbm_cycles: bytes of the slowest core's copies over its HBM bandwidth.
      timeline: cycles with the waits of a simple model of the copy queue.
      core_cycles: cycles of each core.
      hbm_bytes: copied by all cores.
      busy: unit -> share of its capacity in use during `cycles`.
      num_bundles: length of the code.
      spills: vector stores in the code that spill registers.
      fills: vector loads in the code that refill them.
      vmem: bytes.
      unknown_branches: region -> branches decided without knowing; with any, the count is not to be trusted.
      unknown_operations: operation -> executions that are not modelled although something depends on them.
      spans: stretches of code by cycles, see `Schedule.span_table`.
    """

    name: str
    cycles: int
    hbm_cycles: int
    timeline: int
    core_cycles: list[int]
    hbm_bytes: int
    busy: dict[str, float]
    num_bundles: int
    spills: int
    fills: int
    vmem: int
    unknown_branches: dict[int, int]
    unknown_operations: dict[str, int]
    spans: list[dict]

    @property
    def cost(self) -> int:
        """max(cycles, HBM cycles): of a kernel that hides its copies behind its arithmetic, or the reverse."""
        return max(self.cycles, self.hbm_cycles)


@dataclasses.dataclass(frozen=True)
class Count:
    """Count of one compiled case."""

    topology: str
    kernels: list[KernelCount]
    traffic: tpu_hlo.Traffic
    temp_bytes: int
    flops: int | None

    @property
    def cost(self) -> int:
        """Of all kernels, one after the other."""
        return sum(kernel.cost for kernel in self.kernels)

    @property
    def outside_ratio(self) -> float:
        """HBM bytes of XLA's own operations over those of the kernels."""
        return self.traffic.outside / max(1, self.kernel_bytes)

    @property
    def kernel_bytes(self) -> int:
        """HBM bytes of the kernels, arrays staged for them included."""
        return sum(kernel.hbm_bytes for kernel in self.kernels) + self.traffic.staged

    def share_of_peak(self) -> float | None:
        """Useful FLOPs over what the device could do in the kernels' cycles."""
        chip = chip_of(self.topology)
        cycles = sum(kernel.cycles for kernel in self.kernels)
        return self.flops / (cycles * chip.flops_per_cycle * chip.cores) if self.flops and cycles else None


def analyze(
    case: str, topology: str, arguments: dict | None = None, *, layouts: str = "auto", keep: Path | None = None,
    skip_unknown: bool = False, latency: float = COPY_LATENCY,
) -> Count:  # fmt: skip
    """Compiles a case and counts its kernels.

    Args:
      case: "module:function", the function returning a `tpu_compile.Case`.
      topology: topology or chip.
      arguments: keyword arguments of the function; JSON types.
      layouts: of inputs and results, see `tpu_compile.compile_case`.
      keep: folder that keeps the compiler's dump; deleted otherwise.
      skip_unknown: jump over code behind a branch on an unknown value, instead of running it.
      latency: seconds of one copy beyond its bytes.

    Raises:
      RuntimeError: when the compilation fails, or the compiler left no schedule of a kernel.
    """
    dump = keep or Path(tempfile.mkdtemp(prefix="tpu_static_"))
    try:
        compiled = compile_case(case, topology, arguments or {}, dump, layouts=layouts)
        return count_dump(dump, topology, compiled, skip_unknown=skip_unknown, latency=latency)
    finally:
        if keep is None:
            shutil.rmtree(dump)


def count_dump(dump: Path, topology: str, compiled: dict, *, skip_unknown=False, latency=COPY_LATENCY) -> Count:
    """Counts the kernels of a dump that `compile_case` left, given what it returned."""
    chip = chip_of(topology)
    dumped = "\n".join(path.read_text() for path in dump.glob("*-TLP-hlo.txt"))
    representative = _representatives(dump)
    given = {
        int(index): tpu_hlo.pack_words(np.array(values, dtype), (8, 128))
        for index, (dtype, values) in compiled["tables"].items()
    }
    schedules: dict[str, Schedule] = {}
    counts = []
    for kernel in tpu_hlo.kernels(compiled["hlo"], dumped):
        source = representative.get(kernel.name, kernel.name)
        if source not in schedules:
            schedules[source] = Schedule.read(
                _dump_file(dump, source, "post-bundle-packing-post-ra"),
                _dump_file(dump, source, "pre-delay_hlo-static-per-bundle-utilization"),
            )
        schedule = schedules[source]
        runs = [
            schedule.execute(chip, core, kernel.tables | given, skip_unknown=skip_unknown, latency=latency)
            for core in range(chip.cores)
        ]
        slowest = max(runs, key=lambda run: run.cycles)
        counts.append(
            KernelCount(
                name=kernel.name,
                cycles=slowest.cycles,
                hbm_cycles=round(slowest.hbm_bytes / chip.hbm_bytes_per_cycle),
                timeline=round(slowest.timeline),
                core_cycles=[run.cycles for run in runs],
                hbm_bytes=sum(run.hbm_bytes for run in runs),
                busy={
                    unit: used / (schedule.capacity[unit] * slowest.cycles) if slowest.cycles else 0.0
                    for unit, used in slowest.busy.items()
                },
                num_bundles=schedule.num_bundles,
                spills=schedule.spills,
                fills=schedule.fills,
                vmem=schedule.vmem,
                unknown_branches=slowest.unknown_branches,
                unknown_operations=slowest.unknown_operations,
                spans=schedule.span_table(slowest),
            )
        )
    return Count(topology, counts, tpu_hlo.outside_traffic(compiled["hlo"]), compiled["temp_bytes"], compiled["flops"])


def _representatives(dump) -> dict[str, str]:
    """Kernel -> the equal one that the compiler scheduled for both."""
    found = {}
    for path in dump.glob("*-deduplication-map.txt"):
        for line in path.read_text().splitlines():
            if line.startswith("key:"):
                key = line.removeprefix("key:").strip()
            elif line.startswith(" "):
                found[line.strip()] = key
    return found


def _dump_file(dump, kernel, stage) -> Path:
    # Names start with a time stamp; of several compilations in one folder the last counts.
    pattern = re.compile(rf"\d+-{re.escape(kernel)}-\d+-{stage}\.txt")
    found = sorted(path for path in dump.iterdir() if pattern.fullmatch(path.name))
    if not found:
        raise RuntimeError(f"the compiler left no {stage} of kernel {kernel}: the count would be too small")
    return found[-1]
