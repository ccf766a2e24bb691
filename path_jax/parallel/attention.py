"""The attention operations of `pallas_kernels` on meshes: each device computes its own rows, heads and tokens.

Under `jax.set_mesh` with axes of `parallel.mesh`, a call runs inside `jax.shard_map`: the batch over `data` and `fsdp`,
heads over `tensor`, the length over `sequence` by `ring_attention`. Nothing of the size of q, k or v is gathered, which
the compiler would do around a kernel that it cannot look into. Axes that do not divide a call's sizes leave them whole;
so does everything outside of a mesh.
"""


import jax
from jax.sharding import PartitionSpec as P

import pallas_kernels
from path_jax.parallel.mesh import AXES
from path_jax.parallel.ring_attention import ring_attention
from path_jax.parallel.sharding import dividing_axes


def path_attention(q, k, v, w, beta, log_forget=None, *, segment_ids=None, **options):
    """`pallas_kernels.path_attention` without `return_lse`."""
    return _on_mesh(pallas_kernels.path_attention, (q, k, v, w, beta, log_forget), segment_ids, options)


def forgetting_attention(q, k, v, log_forget=None, *, segment_ids=None, **options):
    """`pallas_kernels.forgetting_attention` for as many queries as keys, without `return_lse`."""
    return _on_mesh(pallas_kernels.forgetting_attention, (q, k, v, log_forget), segment_ids, options)


def _on_mesh(operation, arrays, segment_ids, options):
    mesh = jax.sharding.get_abstract_mesh()
    is_inside = jax.sharding.AxisType.Manual in mesh.axis_types  # of a shard_map: these are a device's own arrays
    if mesh.size == 1 or is_inside or not set(mesh.shape) & set(AXES):
        return operation(*arrays, segment_ids=segment_ids, **options)
    q, k = arrays[:2]
    rows = dividing_axes(mesh, "batch", q.shape[0])
    heads = dividing_axes(mesh, "heads", k.shape[2])
    num_shards = mesh.shape.get("sequence", 1)
    length = dividing_axes(mesh, "length", q.shape[1]) if q.shape[1] % (2 * num_shards) == 0 else None

    def local(arrays, segment_ids):
        if length is None or num_shards == 1:
            return operation(*arrays, segment_ids=segment_ids, **options)
        q, k, v, *others = arrays
        w, beta, log_forget = others if operation is pallas_kernels.path_attention else (None, None, *others)
        return ring_attention(q, k, v, w, beta, log_forget, axis_name=length[0], segment_ids=segment_ids, **options)

    spec = lambda x: P(rows, length, heads)
    specs = jax.tree.map(spec, arrays)
    ids = None if segment_ids is None else P(rows, length)
    return jax.shard_map(local, in_specs=(specs, ids), out_specs=P(rows, length, heads), check_vma=False)(
        arrays, segment_ids
    )
