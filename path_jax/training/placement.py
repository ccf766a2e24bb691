"""Which part of every batch a process loads, and global arrays made of the parts."""

import dataclasses

import grain
import jax
import numpy as np

from path_jax.data import Batch, DataConfig, make_iterator
from path_jax.parallel.sharding import batch_sharding


@dataclasses.dataclass(frozen=True)
class RowShard:
    """Rows [index * size, (index + 1) * size) of a global batch of count * size rows."""

    index: int
    count: int
    size: int

    @property
    def first_row(self) -> int:
        return self.index * self.size


def row_shard(mesh: jax.sharding.Mesh, shape: tuple[int, int], process: int | None = None) -> RowShard:
    """The rows that a process loads: all that its devices hold, in shards of one size for all processes.

    Processes that hold different columns of the same rows load the same shard. Devices are counted as the mesh orders
    them, so where a process's rows are not neighbours, the shards grow until each lies inside one.

    Args:
      mesh: of all processes.
      shape: [B, T] of the global batch.
      process: this one by default.
    """
    process = jax.process_index() if process is None else process
    hulls: dict[int, tuple[int, int]] = {}
    for device, (rows, *_) in batch_sharding(mesh).devices_indices_map(shape).items():
        first, stop, _ = rows.indices(shape[0])
        low, high = hulls.get(device.process_index, (first, stop))
        hulls[device.process_index] = min(low, first), max(high, stop)
    sizes = (size for size in range(1, shape[0] + 1) if shape[0] % size == 0)
    fits = lambda size: all(low // size == (high - 1) // size for low, high in hulls.values())
    size = next(filter(fits, sizes))
    # Equal shards only: a size that fits holds every hull, so no process needs two of them.
    return RowShard(hulls[process][0] // size, shape[0] // size, size)


class GlobalBatches:
    """Endless batches as arrays over the mesh; each process reads the rows that its devices hold.

    Raises:
      ValueError: of `make_iterator`.
    """

    def __init__(self, config: DataConfig, documents, mesh: jax.sharding.Mesh):
        self._shape = (config.batch_size, config.sequence_length)
        self._sharding = batch_sharding(mesh)
        self.shard = row_shard(mesh, self._shape)
        self.iterator: grain.DatasetIterator = make_iterator(
            config, documents, process_index=self.shard.index, process_count=self.shard.count
        )

    def __next__(self) -> Batch:
        """The next batch; arrays [B, T]."""
        return jax.tree.map(self._place, next(self.iterator))

    def _place(self, part: np.ndarray) -> jax.Array:
        first = self.shard.first_row

        def block(index):
            rows, columns = index
            start, stop, _ = rows.indices(self._shape[0])
            return part[start - first : stop - first, columns]

        return jax.make_array_from_callback(self._shape, self._sharding, block)
