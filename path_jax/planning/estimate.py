"""How long a step takes at least: its arithmetic, HBM traffic and network traffic at the chip's public rates."""

import dataclasses

import jax

from path_jax.planning.collectives import UNKNOWN_AXES, Collective
from path_jax.planning.topology import Topology, axis_bandwidths


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step.

    Attributes:
      compute: all FLOPs of the program, recomputation included, at the peak; hbm: its traffic at the full bandwidth;
      network: what a device sends along each mesh axis, one axis after another.
    """

    compute: float
    hbm: float
    network: float

    @property
    def bound(self) -> str:
        """Which of the three is largest."""
        return max(dataclasses.asdict(self), key=lambda name: getattr(self, name))

    @property
    def overlapped(self) -> float:
        """Where all three run at once: no step is faster."""
        return max(self.compute, self.hbm, self.network)

    @property
    def in_turn(self) -> float:
        """Where they run one after another."""
        return self.compute + self.hbm + self.network


def step_time(
    topology: Topology,
    mesh: jax.sharding.Mesh,
    *,
    flops: float,
    hbm_bytes: float,
    collectives: list[Collective],
) -> StepTime | None:
    """Time of a step; None on fake CPU devices, whose speed is nobody's.

    A collective over several axes runs at the rate of the slowest of them.

    Args:
      flops: on all devices; hbm_bytes: of one device.
    """
    if topology.chip is None:
        return None
    rates = axis_bandwidths(topology, mesh)
    network = 0.0
    for collective in collectives:
        axes = rates if collective.axes == UNKNOWN_AXES else [axis for axis in collective.axes.split("+") if axis]
        if axes:
            network += collective.sent_bytes / min(rates[axis] for axis in axes)
    return StepTime(flops / topology.num_devices / topology.chip.peak, hbm_bytes / topology.chip.bandwidth, network)
