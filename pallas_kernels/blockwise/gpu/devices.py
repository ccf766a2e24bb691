"""The NVIDIA GPU that the program being traced is for, as far as can be known."""

import re

import jax

# What ahead-of-time compilation knows is a name.
_CAPABILITIES = {
    "A100": (8, 0), "A30": (8, 0), "A10": (8, 6), "RTX 30": (8, 6), "L4": (8, 9), "RTX 40": (8, 9), "H100": (9, 0),
    "H200": (9, 0), "H800": (9, 0), "H20": (9, 0), "GH200": (9, 0), "B200": (10, 0), "B100": (10, 0), "GB200": (10, 0),
}  # fmt: skip


def compute_capability() -> tuple[int, int] | None:
    """(major, minor), or None where no NVIDIA GPU is to be expected."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.devices()[0], "compute_capability", "")))
        return found and (int(found[1]), int(found[2]))
    return next((capability for name, capability in _CAPABILITIES.items() if name in device.device_kind), None)
