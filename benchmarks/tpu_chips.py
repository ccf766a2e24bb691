"""The TPUs that kernels are counted for: units, clock and memory bandwidth, all per TensorCore.

Peak, bandwidth and cores are those of `jax._src.pallas.mosaic.tpu_info`. libtpu does not print the clock; it follows
from the peak and from what one MXU does per cycle in the compiler's issue model:

    clock = peak / (2 * mxus * mxu_dim**2 * rows_per_cycle)

which gives the publicly quoted 1.05, 1.5, 1.75 and 1.75 GHz.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation.

    Attributes:
      topology: smallest topology that libtpu compiles for.
      cores: TensorCores behind one JAX device; the grid's parallel axes are split over them.
      mxus: matrix units of a core, each mxu_dim x mxu_dim.
      mxu_dim: side of a matrix unit.
      rows_per_cycle: bf16 rows that a matrix unit takes in one cycle.
      peak: bf16 FLOP/s of a core.
      hbm: HBM bytes/s of a core, an even share of the device's.
    """

    topology: str
    cores: int
    mxus: int
    mxu_dim: int
    rows_per_cycle: int
    peak: float
    hbm: float

    @property
    def flops_per_cycle(self) -> float:
        """bf16 FLOPs of one core with all its matrix units full."""
        return 2.0 * self.mxus * self.mxu_dim**2 * self.rows_per_cycle

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.peak / self.flops_per_cycle

    @property
    def hbm_bytes_per_cycle(self) -> float:
        """HBM bytes of one core per cycle."""
        return self.hbm / self.clock


CHIPS = {
    "v4": Chip("v4:2x2x1", 2, 4, 128, 1, 2.75e14 / 2, 1.23e12 / 2),
    "v5e": Chip("v5e:2x2", 1, 4, 128, 1, 1.97e14, 8.20e11),
    "v5p": Chip("v5p:2x2x1", 2, 4, 128, 1, 4.59e14 / 2, 2.46e12 / 2),
    "v6e": Chip("v6e:2x2", 1, 2, 256, 2, 9.20e14, 1.64e12),
}

# Latency in seconds of one copy between HBM and VMEM; enters `timeline` only. Fitted to one published time (matmul
# 8192^3 with 128^3 blocks on v5e: 91.8 ms); predicts the 4096^3 case of that table within 2 %. Blocks >= 512 hide it.
COPY_LATENCY = 0.45e-6


def chip_of(topology: str) -> Chip:
    """Chip of a topology name, "v5e:2x2", or of a bare chip name, "v5e".

    Raises:
      ValueError: for a generation that is not in the table.
    """
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise ValueError(f"unknown TPU {name!r}; choose from {', '.join(CHIPS)}")
    return CHIPS[name]


def full_topology(topology: str) -> str:
    """The topology itself, or a chip's default one: "v5e" becomes "v5e:2x2"."""
    return topology if ":" in topology else chip_of(topology).topology
