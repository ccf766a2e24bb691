"""The two shapes of a parameter tree: scanned (`layers`, leading axis L) and unrolled (`layers_0` ... `layers_{L-1}`).

Nothing else knows both. Exchange formats and interpretability use the unrolled tree.
"""

import re

import jax
import jax.numpy as jnp

_UNROLLED = re.compile(r"layers_(\d+)")


def stack_layers(params: dict) -> dict:
    """Unrolled tree -> scanned tree.

    Raises:
      ValueError: if the layers are not numbered 0 ... L - 1.
    """
    numbered = {int(match[1]): name for name in params if (match := _UNROLLED.fullmatch(name))}
    if not numbered or sorted(numbered) != list(range(len(numbered))):
        raise ValueError(f"expected layers_0 ... layers_N without gaps, got {sorted(params)}")
    layers = [params[numbered[i]] for i in range(len(numbered))]
    rest = {name: value for name, value in params.items() if name not in numbered.values()}
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def unstack_layers(params: dict) -> dict:
    """Scanned tree -> unrolled tree.

    Raises:
      ValueError: if there is no scanned stack.
    """
    if "layers" not in params:
        raise ValueError(f"expected a scanned tree with `layers`, got {sorted(params)}")
    num_layers = len(jax.tree.leaves(params["layers"])[0])
    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(num_layers)}
