"""Matrix products and special numbers of all kernels. Logits are base 2."""

import math

import jax
import jax.numpy as jnp

LOG2E, LN2 = math.log2(math.e), math.log(2)
# Log-sum-exp of a row that sees no key, and below it the logit of an invisible key: its weight is 0 even there.
EMPTY, MASKED = -1e30, -2e30
# Which operand of a product is transposed: none, the right one, the left one.
NN, NT, TN = ((((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ())))


def dot(a, b, dimension_numbers=NN):
    """Product with float32 result: one pass for bfloat16 operands, full precision for float32 operands."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dimension_numbers, precision=precision, preferred_element_type=jnp.float32)
