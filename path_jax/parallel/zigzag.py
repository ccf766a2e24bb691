"""The zig-zag layout of a sequence over R shards, for causal attention with equal work; inside `jax.shard_map`.

A sequence is cut into 2 R chunks. Consecutive tokens have shard r hold chunks 2 r and 2 r + 1; in the zig-zag layout it
holds chunks r and 2 R - 1 - r, an early one that few chunks precede and a late one that many do.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def to_zigzag(x: Shaped[Array, "B t *rest"], axis_name: str) -> Shaped[Array, "2 B L *rest"]:
    """This shard's t = 2 L consecutive tokens for its two chunks of the zig-zag layout, the earlier one first."""
    halves = jnp.split(x, 2, axis=1)
    arrived = [jax.lax.ppermute(half, axis_name, route) for half, route in zip(halves, _routes(axis_name))]
    return jnp.stack(_swap_if_odd(axis_name, *arrived))


def from_zigzag(x: Shaped[Array, "2 B L *rest"], axis_name: str) -> Shaped[Array, "B t *rest"]:
    """Inverse of `to_zigzag`."""
    halves = zip(_swap_if_odd(axis_name, x[0], x[1]), _routes(axis_name))
    back = [jax.lax.ppermute(half, axis_name, [(b, a) for a, b in route]) for half, route in halves]
    return jnp.concatenate(back, axis=1)


def gather_chunks(x: Shaped[Array, "2 *rest"], axis_name: str) -> Shaped[Array, "2R *rest"]:
    """What each shard has of its two chunks, of all chunks in the order of the sequence."""
    earlier, later = (jax.lax.all_gather(half, axis_name) for half in x)
    return jnp.concatenate([earlier, later[::-1]])


def _routes(axis_name):
    """(from, to) of the shards' first and second chunks on their way to the zig-zag layout."""
    num = jax.lax.axis_size(axis_name)
    to = [min(chunk, 2 * num - 1 - chunk) for chunk in range(2 * num)]
    return tuple([(shard, to[2 * shard + half]) for shard in range(num)] for half in (0, 1))


def _swap_if_odd(axis_name, first, second):
    """Chunks with even numbers are the earlier ones of even shards and the later ones of odd shards."""
    is_odd = jax.lax.axis_index(axis_name) % 2 == 1
    return jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)
