"""Where arrays live: parameters and optimizer state by a table of path patterns, activations by logical axes."""

import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# First match wins. The spec covers the trailing axes; axes in front (the layer axis of a scanned stack) are replicated.
_PARAMETER_RULES = (
    (r"embed/embedding$", ("tensor", "fsdp")),
    (r"(o_proj|out_proj|down_proj)/kernel$", ("tensor", "fsdp")),
    (r"(w_proj_up|dt_proj)/kernel$", (None, "tensor")),
    (r"conv/kernel$", (None, "tensor")),
    (r"/kernel$", ("fsdp", "tensor")),
)
_ACTIVATION_AXES = {"batch": ("data", "fsdp"), "length": "sequence", "heads": "tensor", "mlp": "tensor", "embed": None}


def path_name(path) -> str:
    """'layers/mixer/q_proj/kernel' from a key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_spec(name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """Partition of the array called `name`; an axis that its mesh axis does not divide stays whole."""
    for pattern, axes in _PARAMETER_RULES:
        if re.search(pattern, name) and len(shape) >= len(axes):
            padded = (None,) * (len(shape) - len(axes)) + axes
            return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(padded, shape)))
    return P()


def tree_shardings(tree, mesh: jax.sharding.Mesh):
    """NamedShardings for a tree of arrays or shapes that holds parameters under their own names anywhere in the paths
    (so it serves optimizer state too)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, parameter_spec(path_name(path), x.shape, mesh)), tree
    )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows of a batch over the data axes."""
    return NamedSharding(mesh, P(_ACTIVATION_AXES["batch"]))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the mesh by logical axes ("batch", "length", ...); no effect outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(_ACTIVATION_AXES.get(axis) for axis in axes)))
