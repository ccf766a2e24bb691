"""Block sizes per TPU generation."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the kernels adapt to."""

    cores: int  # TensorCores that one device drives
    keys: int  # keys per inner step of the quadratic stage
    vmem: int  # MiB a kernel may use


_CHIPS = {
    "v4": Chip(cores=2, keys=512, vmem=15),
    "v5e": Chip(cores=1, keys=512, vmem=100),
    "v5p": Chip(cores=2, keys=512, vmem=56),
    "v6e": Chip(cores=1, keys=512, vmem=100),
}
_KINDS = {"v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e"}
_DEFAULT = "v5e"


def chip() -> Chip:
    """The TPU that is being compiled for: that of the mesh in use, else of the default backend, else v5e."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    name = kind.lower().removeprefix("tpu").strip()
    return _CHIPS[_KINDS.get(name, _DEFAULT)]


def superchunk(length: int, dtype) -> int:
    """Tokens per superchunk: as many as padding the sequence by at most 15 % allows.

    float32 products take six passes over the MXU, and twice the VMEM: at most 256 tokens.
    """
    sizes = (1024, 512, 256, 128) if dtype.itemsize == 2 else (256, 128)
    smallest = -(-length // 128) * 128
    return next(size for size in sizes if -(-length // size) * size <= 1.15 * smallest)
