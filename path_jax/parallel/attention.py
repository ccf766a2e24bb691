"""The attention operations of `pallas_kernels` on meshes: each device computes its own rows, heads and tokens.

Under `jax.set_mesh` with axes of `parallel.mesh`, a call runs inside `jax.shard_map`: the batch over `data` and `fsdp`,
heads over `tensor`, the length over `sequence` by `ring_attention`. Nothing of the size of q, k or v is gathered,
whatever the compiler would choose by itself. Axes that do not divide a call's sizes leave them whole.
"""

import jax
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels.cache import Cache
from path_jax.parallel.mesh import AXES
from path_jax.parallel.ring_attention import ring_attention
from path_jax.parallel.sharding import dividing_axes


def path_attention(q, k, v, w, beta, log_forget=None, *, segment_ids=None, **options):
    """`pallas_kernels.path_attention` without `return_lse`."""
    return _on_mesh(pallas_kernels.path_attention, (q, k, v, w, beta, log_forget), segment_ids, options)


def forgetting_attention(q, k, v, log_forget=None, *, segment_ids=None, **options):
    """`pallas_kernels.forgetting_attention` for as many queries as keys, without `return_lse`."""
    return _on_mesh(pallas_kernels.forgetting_attention, (q, k, v, log_forget), segment_ids, options)


def init_cache(batch: int, max_length: int, **options) -> Cache:
    """`pallas_kernels.init_cache`, its heads over `tensor`."""
    cache = pallas_kernels.init_cache(batch, max_length, **options)
    mesh = _mesh()
    if mesh is None:
        return cache
    place = lambda x, spec: jax.lax.with_sharding_constraint(x, spec)
    return jax.tree.map(place, cache, _cache_specs(cache, dividing_axes(mesh, "heads", cache.k.shape[1])))


def extend(cache: Cache, q, k, v, w=None, beta=None, log_forget=None, *, lengths=None, **options):
    """`pallas_kernels.extend`; each device has its own heads. Rows stay whole, since they may share pages."""
    mesh = _mesh()
    heads = None if mesh is None else dividing_axes(mesh, "heads", k.shape[2])
    if heads is None:
        return pallas_kernels.extend(cache, q, k, v, w, beta, log_forget, lengths=lengths, **options)

    def local(cache, arrays, lengths):
        return pallas_kernels.extend(cache, *arrays, lengths=lengths, **options)

    arrays, specs = (q, k, v, w, beta, log_forget), _cache_specs(cache, heads)
    spec = P(None, None, heads)
    in_specs = (specs, jax.tree.map(lambda x: spec, arrays), None if lengths is None else P())
    return jax.shard_map(local, in_specs=in_specs, out_specs=(spec, specs), check_vma=False)(cache, arrays, lengths)


def _cache_specs(cache: Cache, heads) -> Cache:
    """The second axis of all but lengths and the table of pages is one of heads."""
    return jax.tree.map(lambda x: P(None, heads), cache)._replace(length=P(), table=P())


def _mesh():
    """The mesh in use, or None where arrays are a single device's, or the mesh is not one of ours."""
    mesh = jax.sharding.get_abstract_mesh()
    is_inside = jax.sharding.AxisType.Manual in mesh.axis_types  # of a shard_map
    return None if mesh.size == 1 or is_inside or not set(mesh.shape) & set(AXES) else mesh


def _on_mesh(operation, arrays, segment_ids, options):
    mesh = _mesh()
    if mesh is None:
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
