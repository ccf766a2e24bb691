"""Which rows a process loads."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from path_jax.data import DataConfig, make_corpus, make_iterator
from path_jax.parallel.mesh import make_mesh
from path_jax.parallel.sharding import batch_sharding
from path_jax.training.placement import GlobalBatches, RowShard, row_shard

SHAPE = (16, 32)


class Device(NamedTuple):
    process_index: int
    id: int


class FakeSharding:
    """A real sharding whose devices belong to invented processes."""

    def __init__(self, mesh, owners):
        self._map = batch_sharding(mesh).devices_indices_map(SHAPE)
        self._owners = owners

    def devices_indices_map(self, shape):
        assert shape == SHAPE
        return {Device(self._owners[device.id], device.id): index for device, index in self._map.items()}


@pytest.mark.parametrize(
    "mesh, owners, size",
    [
        (dict(data=8), [0, 0, 0, 0, 1, 1, 1, 1], 8),
        (dict(data=2, fsdp=4), [0, 0, 1, 1, 2, 2, 3, 3], 4),
        (dict(data=2, sequence=4), [0, 0, 1, 1, 2, 2, 3, 3], 8),  # columns of the same rows in two processes
        (dict(data=1, tensor=8), [0, 0, 0, 0, 1, 1, 1, 1], 16),  # everyone needs every row
        (dict(data=8), [0, 0, 1, 1, 1, 1, 2, 2], 16),  # rows 4 ... 11 lie across the middle
        (dict(data=8), [0, 1, 0, 1, 0, 1, 0, 1], 16),  # rows that are not neighbours
        (dict(data=8), [0, 0, 0, 0, 0, 0, 0, 0], 16),
    ],
)
def test_a_shard_holds_the_rows_of_its_devices(monkeypatch, mesh, owners, size):
    mesh = make_mesh(mesh)
    fake = FakeSharding(mesh, owners)
    monkeypatch.setattr("path_jax.training.placement.batch_sharding", lambda mesh: fake)
    for process in set(owners):
        shard = row_shard(mesh, SHAPE, process)
        assert shard.size == size and shard.count * size == SHAPE[0]
        for device, index in fake.devices_indices_map(SHAPE).items():
            if device.process_index == process:
                start, stop, _ = index[0].indices(SHAPE[0])
                assert shard.first_row <= start < stop <= shard.first_row + size


@pytest.mark.parametrize("mesh", [dict(data=4, fsdp=2), dict(data=2, sequence=4), dict(fsdp=2, tensor=4)], ids=str)
def test_global_batches_are_the_iterators(tmp_path, mesh):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 20)
    config = DataConfig(source="files", path=str(tmp_path / "text"), sequence_length=16, batch_size=8)
    documents = make_corpus(config).train
    batches, expected = GlobalBatches(config, documents, make_mesh(mesh)), make_iterator(config, documents)
    assert batches.shard == RowShard(0, 1, 8)
    for _ in range(3):
        batch = next(batches)
        jax.tree.map(np.testing.assert_array_equal, batch, next(expected))
        assert batch.tokens.sharding.is_equivalent_to(batch_sharding(make_mesh(mesh)), 2)
