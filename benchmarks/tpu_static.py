"""Cycles of TPU kernels without a TPU, from the schedule that the TPU compiler itself makes; deterministic.

    python -m benchmarks.tpu_static count benchmarks.cases:matmul -t v5e v6e -a m=1024 -a k=1024 -a n=1024 --regions
    python -m benchmarks.tpu_static table --output results/tpu_static.md --only 'path.*T8192' --chips v5e

`count` compiles one case (a function returning a `tpu_compile.Case`) and prints a line per kernel:

  cycles    bundles x executions on the slowest core, waits for copies not included
  hbm       bytes that its copies move over the core's HBM bandwidth, in cycles
  cost      the larger of the two: what a kernel costs that hides its copies, or its arithmetic
  timeline  cycles with the waits of a simple model of the copy queue
  MXU ...   share of a unit's capacity in use during `cycles`
  unknown   branches on values that the count could not know; a count with any is not to be trusted

and what XLA's own operations around the kernels read and write. `table` counts the attention operations against those
of JAX, see `tpu_table`. Needs libtpu, which installs on any host; differences below 3 % mean nothing.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from benchmarks import tpu_table
from benchmarks.ahead_of_time import argument
from benchmarks.tpu_chips import COPY_LATENCY, chip_of
from benchmarks.tpu_compile import LAYOUTS
from benchmarks.tpu_count import Count, analyze

UNITS = {"MXU": "MATMUL", "VALU": "VALU", "XLU": "XLU", "EUP": "EUP", "load": "VLOAD", "store": "VSTORE"}


def format_count(count: Count, regions: bool = False, num_regions: int = 12) -> str:
    """Text of a count: a line per kernel, totals, and with `regions` the dearest stretches of each kernel."""
    chip = chip_of(count.topology)
    heads = ["cycles", "us", "hbm", "cost", "timeline", *UNITS, "spills", "fills", "bundles", "VMEM MiB"]
    lines = [f"{count.topology:34s}" + "".join(f"{head:>11s}" for head in heads)]
    for kernel in count.kernels:
        cells = [kernel.cycles, f"{kernel.cycles / chip.clock * 1e6:.1f}", kernel.hbm_cycles, kernel.cost]
        cells += [kernel.timeline, *(f"{kernel.busy.get(unit, 0):.1%}" for unit in UNITS.values())]
        cells += [kernel.spills, kernel.fills, kernel.num_bundles, f"{kernel.vmem / 2**20:.2f}"]
        remarks = ""
        if kernel.unknown_branches:
            remarks += f"  unknown branches {kernel.unknown_branches}, operations {kernel.unknown_operations}"
        if len(set(kernel.core_cycles)) > 1:
            remarks += f"  cycles per core {kernel.core_cycles}"
        lines.append(f"{kernel.name[:33]:34s}" + "".join(f"{cell:>11}" for cell in cells) + remarks)
        for span in kernel.spans[:num_regions] if regions else ():
            lines.append(
                f"    [{span['start']:6d}, {span['end']:6d}) x {span['runs']:8d} = {span['cycles']:11d} cycles"
                f" {span['cycles'] / max(1, kernel.cycles):6.1%}  MXU {span['matmul']:6.1%}"
                f"  region {span['region']} {span['remark']}"
            )
    cost = count.cost
    peak = count.share_of_peak()
    lines.append(
        f"cost {cost}, {cost / chip.clock * 1e6:.1f} us"
        + (f", {peak:.1%} of the peak" if peak else "")
        + f"; temporary {count.temp_bytes / 2**20:.1f} MiB"
    )
    traffic = count.traffic
    largest = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in traffic.largest)
    lines.append(
        f"outside the kernels {traffic.outside / 2**20:.1f} MiB = {count.outside_ratio:.3f} of theirs"
        f" (staged {traffic.staged / 2**20:.1f} MiB)"
        + (f"; MiB of the largest: {largest}" if largest else "")
        + (f"; SUSPICIOUS: {', '.join(traffic.suspicious)}" if traffic.suspicious else "")
    )
    return "\n".join(lines)


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    count = commands.add_parser("count", help="count one case")
    count.add_argument("case", help="module:function, importable from here")
    count.add_argument("-t", "--topology", nargs="+", default=["v5e", "v5p", "v6e"], help="chips or topologies")
    count.add_argument("-a", "--argument", action="append", default=[], help="key=json for the function")
    count.add_argument("--layouts", choices=LAYOUTS, default="auto", help="of inputs and results")
    count.add_argument("--regions", action="store_true", help="list the dearest stretches of each kernel")
    count.add_argument("--skip-unknown", action="store_true", help="jump over code behind unknown branches")
    count.add_argument("--copy-latency-us", type=float, default=COPY_LATENCY * 1e6)
    count.add_argument("--keep", type=Path, help="keep the compiler's dump in this folder, one subfolder per chip")
    count.add_argument("--json", type=Path, help="write the counts here")
    table = commands.add_parser("table", help="count the attention operations and their peers")
    table.add_argument("--output", type=Path, required=True, help="Markdown file; results are kept next to it as JSON")
    table.add_argument("--only", default="", help="regular expression on cell names; others are only printed")
    table.add_argument("--chips", nargs="+", default=["v4", "v5e", "v5p", "v6e"])
    table.add_argument("--recount", action="store_true", help="count again what was counted with older kernels")
    table.add_argument("--retry", action="store_true", help="count failed cells of the selection again")
    table.add_argument("--list", action="store_true", help="print the names of the selected cells and stop")
    return parser


def main(argv=None):
    """Runs a command line."""
    args = _parser().parse_args(argv)
    if args.command == "table":
        return tpu_table.run(args)
    results = []
    for topology in args.topology:
        count = analyze(
            args.case, topology, dict(map(argument, args.argument)), layouts=args.layouts,
            keep=args.keep and args.keep / topology.split(":")[0], skip_unknown=args.skip_unknown,
            latency=args.copy_latency_us * 1e-6,
        )  # fmt: skip
        print(format_count(count, args.regions), flush=True)
        results.append(dataclasses.asdict(count))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
