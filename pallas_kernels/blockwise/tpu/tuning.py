"""Block sizes per TPU generation."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the kernels adapt to."""

    cores: int  # TensorCores that one device drives
    forward_keys: int  # keys per inner step of the quadratic stage
    backward_keys: int
    vmem: int  # MiB a kernel may use


_CHIPS = {
    "v4": Chip(cores=2, forward_keys=512, backward_keys=512, vmem=15),
    "v5e": Chip(cores=1, forward_keys=512, backward_keys=512, vmem=100),
    "v5p": Chip(cores=2, forward_keys=512, backward_keys=512, vmem=56),
    "v6e": Chip(cores=1, forward_keys=256, backward_keys=512, vmem=100),
}
_KINDS = {"v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e"}
_DEFAULT = "v5e"


def _device_kind():
    """Of the mesh in use, which is how a program is compiled ahead of time, else of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.device_kind if device is not None else jax.devices()[0].device_kind).lower()


def is_tpu_expected() -> bool:
    """Whether the program being traced will, as far as can be known, run on a TPU."""
    return _device_kind().startswith("tpu")


def chip() -> Chip:
    """The TPU that is being compiled for; v5e where that is unknown."""
    name = _device_kind().removeprefix("tpu").strip()
    return _CHIPS[_KINDS.get(name, _DEFAULT)]


def superchunk(length: int, dtype) -> int:
    """Tokens per superchunk: as many as padding the sequence by at most 15 % allows.

    float32 products take six passes over the MXU, and twice the VMEM: at most 256 tokens.
    """
    sizes = (1024, 512, 256, 128) if dtype.itemsize == 2 else (256, 128)
    smallest = -(-length // 128) * 128
    return next(size for size in sizes if -(-length // size) * size <= 1.15 * smallest)
