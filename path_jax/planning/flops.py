"""Floating-point operations of a training step: of the model, and of the program with what it recomputes."""

import math

from pallas_kernels.dispatch import PAIR_SCOPE
from path_jax.models import ModelConfig

_KERNELS = ("pallas_call", "mosaic_gpu_kernel_call", "triton_call")


def attention_flops(config: ModelConfig, batch_size: int, length: int, num_shards: int = 1) -> float:
    """FLOPs of causal attention in one step: comparing queries with keys and summing values.

    Twelve per head dimension, head and visible key, forward and backward; sixteen where a layer is recomputed. Over
    `num_shards` of a ring, of the two chunks of each shard by themselves: what passes between chunks, `product_flops`
    counts.
    """
    chunk = length / (2 * num_shards) if num_shards > 1 else length
    per_token = config.train_flops_per_token(0, chunk) - config.train_flops_per_token(0, -1)
    return batch_size * length * per_token * (16 / 12 if config.remat == "full" else 1)


def product_flops(jaxpr, num_devices: int) -> float:
    """FLOPs of the matrix products and convolutions of a traced program, on all devices together.

    Loops multiply, the most expensive branch of a conditional counts. Kernels do not, nor does what is chosen by the
    platform, which is attention: see `attention_flops`. But of that between chunks all choices have the same products.

    Args:
      jaxpr: of the step; num_devices: that run what is inside of a `shard_map`.
    """
    total = 0.0
    for equation in live_equations(jaxpr):
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            kernel, dimensions = equation.invars[1].aval.shape, params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * math.prod(kernel) / kernel[dimensions.rhs_spec[0]]
        elif (platforms := params.get("branches_platforms")) is not None:
            if PAIR_SCOPE in str(equation.source_info.name_stack):
                total += product_flops(params["branches"][platforms.index(None)].jaxpr, num_devices)
        elif name == "cond":
            total += max(product_flops(branch.jaxpr, num_devices) for branch in params["branches"])
        elif name not in _KERNELS:
            times = {"scan": params.get("length"), "shard_map": num_devices}.get(name, 1)
            total += times * sum(product_flops(inner, num_devices) for inner in inner_programs(params))
    return total


def live_equations(jaxpr):
    """Equations on whose results those of the program depend."""
    needed = {id(variable) for variable in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(variable) in needed for variable in equation.outvars):
            needed.update(id(variable) for variable in equation.invars)
            yield equation


def inner_programs(params):
    """Programs among the parameters of an equation: of a loop, a call, a recomputed layer."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def _dot(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)
