"""Table of static counts: PaTH, PaTH-FoX and FoX against JAX's flash and splash attention, on every TPU.

8 query heads, bf16, causal, one sequence. Each cell of the grid is compiled once and kept in a JSON file next to the
table under its name and the versions of jax and libtpu, failures with their reason, so an interrupted run continues.
Splash attention is counted with several block sizes and stands for the best; with grouped heads it is counted with
the block sizes that were best without.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import time
from pathlib import Path

from benchmarks import tpu_hlo
from benchmarks.tpu_chips import CHIPS, chip_of
from benchmarks.tpu_compile import compile_case
from benchmarks.tpu_count import analyze

NUM_HEADS = 8
LENGTHS = (8192, 4096, 32768)
OURS = ("path", "path_fox", "fox")
FLASH_BLOCKS = ((1024,),)
_TREE_SOURCES = ("chunk_call", "chunk_forward", "chunk_backward", "lift", "transform")  # FoX does without


def splash_blocks(chip: str, length: int, direction: str) -> list[tuple[int, int, int]]:
    """Block sizes (block_q, block_kv, block_kv_compute) worth counting: what won somewhere in wider sweeps."""
    blocks = [(1024, 1024, 512)]
    if direction == "forward" or length > 8192:
        blocks.append((1024, 2048, 512))
    if direction == "forward" and chip == "v6e":  # elsewhere more than the VMEM that a kernel gets
        blocks.append((2048, 2048, 512))
    return blocks


@dataclasses.dataclass(frozen=True)
class Cell:
    """One program to count; `blocks` are the block sizes of a peer, empty for our operations."""

    chip: str
    length: int
    head_dim: int
    kv_heads: int
    op: str
    direction: str
    blocks: tuple[int, ...] = ()

    @property
    def problem(self) -> tuple:
        """What is computed where, whatever computes it."""
        return self.chip, self.length, self.head_dim, self.kv_heads, self.direction

    @property
    def name(self) -> str:
        """Unique and readable, for --only and as key."""
        blocks = " " + "/".join(map(str, self.blocks)) if self.blocks else ""
        return f"{self.op} {self.direction} {self.chip} T{self.length} H{self.head_dim} kv{self.kv_heads}{blocks}"

    @property
    def call(self) -> tuple[str, dict]:
        """Case and arguments for `analyze`."""
        common = {"T": self.length, "H": self.head_dim, "N": NUM_HEADS, "backward": self.direction == "backward"}
        if self.op == "flash":
            return "benchmarks.cases:flash", common | {"block": self.blocks[0]}
        if self.op == "splash":
            blocks = dict(zip(("block_q", "block_kv", "block_kv_compute"), self.blocks))
            return "benchmarks.cases:splash", common | {"K": self.kv_heads} | blocks
        return "benchmarks.cases:attention", common | {"op": self.op, "K": self.kv_heads}


def all_cells(chips) -> list[Cell]:
    """The grid, peers first and without grouped heads first: later cells compare with earlier ones."""
    problems = [
        (chip, length, head_dim, kv_heads, direction)
        for head_dim in (128, 64) for kv_heads in (8, 2) for chip in chips for length in LENGTHS
        for direction in ("forward", "backward")
    ]  # fmt: skip
    cells = []
    for *problem, direction in problems:
        cells += [Cell(*problem, "splash", direction, blocks) for blocks in splash_blocks(*problem[:2], direction)]
        if problem[-1] == NUM_HEADS:  # JAX's flash attention has no grouped heads
            cells += [Cell(*problem, "flash", direction, blocks) for blocks in FLASH_BLOCKS]
    return cells + [Cell(*problem, op, direction) for *problem, direction in problems for op in OURS]


def versions() -> str:
    """Versions that a count depends on."""

    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "missing"

    return ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu"))


def kernel_sources(cell: Cell) -> str:
    """Fingerprint of the kernels' source that a cell depends on, to tell counts of older kernels."""
    root = Path(__file__).parent.parent / "pallas_kernels" / "blockwise" / "tpu"
    digest = hashlib.sha256()
    for path in sorted(root.glob("*.py")):
        is_other_direction = cell.direction == "forward" and path.stem.endswith("backward")
        is_other_op = cell.op == "fox" and path.stem in _TREE_SOURCES
        if not (is_other_direction or is_other_op or path.stem == "decode"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def is_old(cell: Cell, record: dict | None) -> bool:
    """Whether a record is a count of older kernels of ours."""
    return "sources" in (record or {}) and record["sources"] != kernel_sources(cell)


def count_cell(cell: Cell) -> dict:
    """Counts a cell; a failure is a result too, with its reason."""
    case, arguments = cell.call
    try:
        count = analyze(case, cell.chip, arguments)
        of_ours = {}
        if cell.op in OURS:
            of_ours = {"sources": kernel_sources(cell)}
            if cell.length == LENGTHS[0]:  # a second compilation
                row_major = compile_case(case, cell.chip, arguments, None, layouts="default")
                outside = tpu_hlo.outside_traffic(row_major["hlo"]).outside
                of_ours["outside_default"] = outside / max(1, count.kernel_bytes)
    except (RuntimeError, ValueError) as error:
        return {"failure": _reason(str(error))}
    kernels = count.kernels
    if cell.op == "splash" and cell.direction == "backward":
        kernels = [kernel for kernel in kernels if "dkv" in kernel.name]
    names = ("name", "cycles", "hbm_cycles", "cost", "timeline", "core_cycles", "vmem", "spills", "fills")
    return {
        "kernels": [
            {name: getattr(kernel, name) for name in names} | {"unknown": sum(kernel.unknown_branches.values())}
            for kernel in kernels
        ],
        "temp_bytes": count.temp_bytes,
        "outside": count.outside_ratio,
        "outside_bytes": count.traffic.outside,
        "outside_largest": count.traffic.largest,
        "suspicious": count.traffic.suspicious,
    } | of_ours


def _reason(message) -> str:
    errors = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception)\b.*", message, flags=re.M)
    return (errors[-1] if errors else message.strip().splitlines()[-1])[:300]


def total(record: dict, quantity: str) -> int:
    """Sum of a quantity over the kernels of a record."""
    return sum(kernel[quantity] for kernel in record["kernels"])


def best_cells(results: dict[Cell, dict]) -> dict[tuple, Cell]:
    """(problem, op) -> the counted cell of least cost."""
    best = {}
    for cell, record in results.items():
        if "failure" not in record:
            key = (cell.problem, cell.op)
            if key not in best or total(record, "cost") < total(results[best[key]], "cost"):
                best[key] = cell
    return best


def is_superfluous(cell: Cell, results: dict[Cell, dict]) -> bool:
    """Whether a peer with grouped heads has block sizes that lost without them."""
    ungrouped = dataclasses.replace(cell, kv_heads=NUM_HEADS)
    best = best_cells(results).get((ungrouped.problem, cell.op))
    return cell.kv_heads != NUM_HEADS and best is not None and bool(cell.blocks) and best.blocks != cell.blocks


class Store:
    """Results in a JSON file, {"cell | versions": record}; written after every cell."""

    def __init__(self, path: Path):
        self.path, self._suffix = path, f" | {versions()}"
        self._records = json.loads(path.read_text()) if path.exists() else {}

    def of(self, cells) -> dict[Cell, dict]:
        """Records of those cells that have one for the current versions."""
        return {cell: self._records[cell.name + self._suffix] for cell in cells
                if cell.name + self._suffix in self._records}  # fmt: skip

    def put(self, cell: Cell, record: dict):
        """Adds or replaces a record."""
        self._records[cell.name + self._suffix] = record
        partial = self.path.with_suffix(".partial")
        lines = (f"{json.dumps(key)}: {json.dumps(self._records[key])}" for key in sorted(self._records))
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        partial.replace(self.path)


def _ratio(cell, record, results, best) -> str:
    """Cost over splash's; in brackets over splash's if it used all cores, where it leaves some idle."""
    peer = best.get((cell.problem, "splash"))
    if peer is None:
        return "-"
    cost = total(record, "cost")
    text = f"{cost / total(results[peer], 'cost'):.2f}"
    even = sum(sum(kernel["core_cycles"]) / len(kernel["core_cycles"]) for kernel in results[peer]["kernels"])
    return text + (f" ({cost / even:.2f})" if even < 0.8 * total(results[peer], "cycles") else "")


def _row(cell, results, best) -> list[str]:
    record = results[cell]
    cycles, cost = total(record, "cycles"), total(record, "cost")
    outside = f"{record['outside']:.2f}"
    if "outside_default" in record:
        outside += f" ({record['outside_default']:.2f})"
    if record["suspicious"]:
        outside += " with " + ", ".join(record["suspicious"])
    op = cell.op + (" (older kernels)" if is_old(cell, record) else "")
    split = ", ".join(f"{kernel['name'][:40]} {kernel['cost'] / 1e6:.3f}" for kernel in record["kernels"])
    return [
        f"{cell.length}", f"{cell.head_dim}", f"{cell.kv_heads}", op,
        "/".join(map(str, cell.blocks)) or "-", f"{cycles / 1e6:.3f}", f"{cost / 1e6:.3f}",
        f"{cost / chip_of(cell.chip).clock * 1e3:.3f}", _ratio(cell, record, results, best),
        f"{total(record, 'timeline') / cycles:.2f}", f"{total(record, 'unknown')}",
        f"{max(kernel['vmem'] for kernel in record['kernels']) / 2**20:.1f}", f"{record['temp_bytes'] / 2**20:.0f}",
        outside, split,
    ]  # fmt: skip


_HEAD = ("T", "H", "kv heads", "op", "blocks", "Mcycles", "cost", "ms", "/ splash", "timeline / cycles", "unknown",
         "VMEM MiB", "temp MiB", "outside / kernels", "kernels: cost")  # fmt: skip


_INTRODUCTION = """# Attention on TPUs, counted without one

Generated by `python -m benchmarks.tpu_static table`; `benchmarks/tpu_static.py` says what is counted. 8 query heads,
bf16, causal, batch 1. Nothing here ran on a TPU; differences below 3 % mean nothing.

* Mcycles, cost: millions, of the slowest core; cost sums max(cycles, HBM cycles) over the kernels. ms: cost at the
  chip's clock.
* / splash: over the cost of JAX's splash attention (backward: its fused kernel) with its best blocks; in brackets,
  where splash leaves a core idle, over what it would cost with all cores busy.
* timeline / cycles: what waiting for copies adds in a simple model.
* unknown: branches that the count had to guess; it should be 0.
* outside / kernels: HBM bytes of XLA's own operations over the kernels', the compiler choosing the layouts of inputs
  and results; in brackets (T = 8192) with row-major ones. For splash backward its forward pass is included, as it is
  in temp.

"""


def markdown(results: dict[Cell, dict]) -> str:
    """The table as Markdown, from whatever has been counted."""
    best = best_cells(results)
    lines = [_INTRODUCTION + versions()]
    for chip in CHIPS:
        for direction in ("forward", "backward"):
            cells = sorted(
                (cell for (problem, _), cell in best.items() if problem[0] == chip and problem[-1] == direction),
                key=lambda cell: (-cell.head_dim, cell.length, -cell.kv_heads, cell.op in OURS, cell.op),
            )
            if cells:
                lines += ["", f"## {chip} {direction}", "", _table_line(_HEAD), _table_line(["---"] * len(_HEAD))]
                lines += [_table_line(_row(cell, results, best)) for cell in cells]
    failures = [(cell.name, record["failure"]) for cell, record in results.items() if "failure" in record]
    if failures:
        lines += ["", "## Failures", ""] + [f"* {name}: {reason}" for name, reason in sorted(failures)]
    return "\n".join(lines) + "\n"


def _table_line(cells) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def run(args):
    """Counts what is missing of the selected cells, and writes the table."""
    grid = all_cells(list(CHIPS))
    selected = [cell for cell in grid if cell.chip in args.chips and re.search(args.only, cell.name)]
    if args.list:
        print("\n".join(cell.name for cell in selected))
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    store = Store(args.output.with_suffix(".json"))
    for index, cell in enumerate(selected):
        results = store.of(grid)
        record = results.get(cell)
        is_done = record is not None and not (args.retry and "failure" in record)
        is_done &= not (args.recount and is_old(cell, record))
        if is_done or is_superfluous(cell, results):
            continue
        start = time.perf_counter()
        record = count_cell(cell)
        store.put(cell, record)
        args.output.write_text(markdown(store.of(grid)))
        outcome = record.get("failure") or f"cost {total(record, 'cost') / 1e6:.3f} M"
        print(f"{index + 1}/{len(selected)} {cell.name}: {outcome} ({time.perf_counter() - start:.0f} s)", flush=True)
    args.output.write_text(markdown(store.of(grid)))
