"""Device meshes. Axis names: `data` (replicated parameters), `fsdp` (sharded parameters), `sequence`, `tensor`."""

import math
from collections.abc import Mapping

import jax

AXES = ("data", "fsdp", "sequence", "tensor")


def make_mesh(shape: Mapping[str, int], devices=None) -> jax.sharding.Mesh:
    """Mesh with the given number of devices on each axis.

    Args:
      shape: {axis: size}; at most one size may be -1, "the rest". Missing axes have size 1.
      devices: all devices by default.

    Raises:
      ValueError: for unknown axes, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = set(shape) - set(AXES)
    if unknown:
        raise ValueError(f"unknown mesh axes {sorted(unknown)}; choose from {AXES}")
    sizes = [shape.get(axis, 1) for axis in AXES]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh sizes must be positive, with at most one -1: {dict(shape)}")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes or math.prod(sizes) != len(devices):
        count = len({device.process_index for device in devices})
        among = f" of {count} processes" if count > 1 else ""
        raise ValueError(f"mesh {dict(shape)} does not fit {len(devices)} devices{among}")
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)


def local_mesh() -> jax.sharding.Mesh:
    """Mesh of this process's own devices, parameters sharded over all of them."""
    return make_mesh({"fsdp": -1}, jax.local_devices())
