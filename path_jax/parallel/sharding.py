"""Where arrays live: parameters and optimizer state by a table of path patterns, activations by logical axes."""

import math
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
_ACTIVATION_AXES = {"batch": ("data", "fsdp"), "length": ("sequence",), "heads": ("tensor",), "mlp": ("tensor",)}


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
    """Of [B, T]: rows over the data axes, tokens over the sequence axis."""
    return NamedSharding(mesh, P(_ACTIVATION_AXES["batch"], _ACTIVATION_AXES["length"]))


def dividing_axes(mesh, axis: str | None, size: int) -> tuple[str, ...] | None:
    """Mesh axes that a logical axis ("batch", "length", "heads", "mlp") of this size is cut over, None for no cut.

    An axis that its mesh axes do not divide stays whole, and so does one that they do not belong to.
    """
    axes = tuple(name for name in _ACTIVATION_AXES.get(axis, ()) if name in mesh.shape)
    return axes if axes and size % math.prod(mesh.shape[name] for name in axes) == 0 else None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the mesh by logical axes ("batch", "length", ...); no effect outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(dividing_axes(mesh, axis, n) for axis, n in zip(axes, x.shape))))
