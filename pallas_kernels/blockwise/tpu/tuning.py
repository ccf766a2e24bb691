"""Block sizes per TPU generation, head dim and length.

`keys.json` holds the keys per inner step of the quadratic stage, as `python -m pallas_kernels.benchmark tune` found
them; a call takes the row of its chip whose head dim and then length are nearest to its own.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.call import Inputs

TABLE = Path(__file__).with_name("keys.json")
_KEYS = json.loads(TABLE.read_text())
# A row that is tried instead of the table's, while tuning.
_forced = jax.make_user_context(default_value=None)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the kernels adapt to."""

    name: str
    cores: int  # TensorCores that one device drives
    vmem: int  # MiB a kernel may use
    superchunk: int = 1024  # most tokens per superchunk


_CHIPS = {
    chip.name: chip for chip in (Chip("v4", 2, 15, 512), Chip("v5e", 1, 100), Chip("v5p", 2, 56), Chip("v6e", 1, 100))
}
_KINDS = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}  # as devices call them
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
    return _CHIPS.get(_KINDS.get(name, name), _CHIPS[_DEFAULT])


def largest_superchunk(dtype) -> int:
    """Most tokens per superchunk. float32 products take six passes over the MXU, and twice the VMEM: 256."""
    return chip().superchunk if dtype.itemsize == 2 else 256


def superchunk(inputs: Inputs) -> int:
    """Tokens per superchunk: as many as VMEM has room for and padding the sequence by at most 15 % allows."""
    largest = largest_superchunk(inputs.q.dtype)
    length = inputs.k.shape[1]
    smallest = -(-length // 128) * 128
    sizes = [size for size in (1024, 512, 256, 128) if size <= largest and _has_room(inputs, size)] or [128]
    return next(size for size in sizes if -(-length // size) * size <= 1.15 * smallest)


def _has_room(inputs, size):
    """Whether the superchunk kernels of PaTH fit; their backward pass holds each query head of a group.

    They take 15 MiB and 4 per query head for 1024 tokens, heads of 128 and bfloat16, which the compiler reports to
    within a tenth.
    """
    if inputs.w is None:
        return True
    group = inputs.q.shape[2] // inputs.k.shape[2]
    width = -(-max(inputs.q.shape[3], inputs.v.shape[3]) // 128)
    itemsize = jnp.promote_types(inputs.q.dtype, inputs.w.dtype).itemsize
    return 1.1 * (15 + 4 * group) * (size / 1024) * width * (itemsize / 2) <= chip().vmem


def keys(length: int, head_dim: int, direction: str) -> int:
    """Keys per inner step for the direction "forward" or "backward"."""
    if _forced.value is not None:
        return _forced.value

    def distance(row):
        return abs(math.log(row["head_dim"] / head_dim)), abs(math.log(row["length"] / length))

    return min((row for row in _KEYS if row["chip"] == chip().name), key=distance)[direction]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Block sizes of one call, and the chip they are for."""

    chip: Chip
    superchunk: int
    keys: int


def sizes(inputs: Inputs, direction: str) -> Sizes:
    """Sizes of a call in the direction "forward" or "backward"."""
    chunk = superchunk(inputs)
    return Sizes(chip(), chunk, min(keys(inputs.k.shape[1], inputs.q.shape[3], direction), chunk))


def force_keys(count: int):
    """Context manager under which every call takes `count` keys per inner step."""
    return _forced(count)
