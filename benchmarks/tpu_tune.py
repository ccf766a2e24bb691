"""Chooses the block sizes of the TPU kernels by counting their cycles; writes the table that they read.

    python -m pallas_kernels.benchmark tune --chips v5e v6e

Superchunks are as long as the sequence allows; what is left to choose is the number of keys per inner step of the
quadratic stage, for each chip, head dim, length and direction. FoX stands for all operations: they share the kernel.
"""

import argparse
import json

from benchmarks.tpu_chips import CHIPS
from benchmarks.tpu_count import analyze
from pallas_kernels.blockwise.tpu import tuning

CANDIDATES = (256, 512, 1024)


def best_keys(chip: str, head_dim: int, length: int, direction: str) -> int:
    """The candidate whose kernel costs least."""
    costs = {}
    for keys in CANDIDATES:
        arguments = {"op": "fox", "T": length, "H": head_dim, "backward": direction == "backward", "keys": keys}
        try:
            costs[keys] = analyze("benchmarks.cases:attention", chip, arguments).cost
        except RuntimeError as error:  # does not fit
            print(f"  {keys} keys: {str(error).strip().splitlines()[-1]}", flush=True)
    if not costs:
        raise RuntimeError(f"no candidate compiles for {chip}, head dim {head_dim}, length {length}, {direction}")
    shown = ", ".join(f"{keys}: {cost / 1e6:.3f} M" for keys, cost in costs.items())
    print(f"{chip} H={head_dim} T={length} {direction}: {shown}", flush=True)
    return min(costs, key=costs.get)


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.benchmark tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192])
    args = parser.parse_args(argv)
    table = {(row["chip"], row["head_dim"], row["length"]): row for row in json.loads(tuning.TABLE.read_text())}
    for chip in args.chips:
        for head_dim in args.head_dims:
            for length in args.lengths:
                row = {"chip": chip, "head_dim": head_dim, "length": length}
                for direction in ("forward", "backward"):
                    row[direction] = best_keys(chip, head_dim, length, direction)
                table[chip, head_dim, length] = row
                rows = ",\n".join("  " + json.dumps(table[key]) for key in sorted(table))
                tuning.TABLE.write_text(f"[\n{rows}\n]\n")
