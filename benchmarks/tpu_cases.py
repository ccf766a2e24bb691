"""Cases for the static counter: JAX's attention kernels, our operations, and a matrix product to check the counter."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as jax_splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as jax_splash_mask

from benchmarks.tpu_compile import Case


def _bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def matmul(m: int = 8192, k: int = 8192, n: int = 8192, bm: int = 512, bk: int = 1024, bn: int = 1024) -> Case:
    """[m, k] x [k, n] in bf16 with blocks (bm, bk, bn), the kernel of JAX's guide to Pallas on TPU."""

    def kernel(x, y, out, total):
        @pl.when(pl.program_id(2) == 0)
        def clear():
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def write():
            out[...] = total[...].astype(out.dtype)

    function = pl.pallas_call(
        kernel,
        grid=(m // bm, n // bn, k // bk),
        in_specs=[pl.BlockSpec((bm, bk), lambda i, j, s: (i, s)), pl.BlockSpec((bk, bn), lambda i, j, s: (s, j))],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, s: (i, j)),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        out_shape=_bf16(m, n),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="matmul",
    )
    return Case(function, (_bf16(m, k), _bf16(k, n)), flops=2 * m * n * k)


def _causal_flops(num_heads, length, head_dim, products):
    """Useful FLOPs of causal attention with that many products: 2 forward, 5 backward."""
    return products * num_heads * length * length * head_dim


def _backward(function, inputs, cotangent, flops) -> Case:
    """The backward pass alone: its inputs are the residuals that the forward pass leaves."""
    _, pull_back = jax.eval_shape(lambda *xs: jax.vjp(function, *xs), *inputs)
    return Case(lambda pull_back, cotangent: pull_back(cotangent), (pull_back, cotangent), flops)


def flash(T: int, H: int = 128, N: int = 8, block: int = 1024, backward: bool = False) -> Case:
    """`jax.experimental.pallas.ops.tpu.flash_attention`, causal, all block sizes alike; [1, N, T, H]."""
    names = (
        "block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv", "block_k_dkv", "block_q_dkv",
        "block_k_major_dq", "block_k_dq", "block_q_dq",
    )  # fmt: skip
    sizes = jax_flash.BlockSizes(block_b=1, **dict.fromkeys(names, min(block, T)))
    function = functools.partial(jax_flash.flash_attention, causal=True, sm_scale=H**-0.5, block_sizes=sizes)
    x = _bf16(1, N, T, H)
    if backward:
        return _backward(function, (x, x, x), x, _causal_flops(N, T, H, 5))
    return Case(function, (x, x, x), _causal_flops(N, T, H, 2))


def splash(
    T: int, H: int = 128, N: int = 8, K: int = 8, block_q: int = 1024, block_kv: int = 1024,
    block_kv_compute: int = 512, backward: bool = False,
) -> Case:  # fmt: skip
    """JAX's splash attention with a causal mask, backward by its fused kernel; q [N, T, H], k and v [K, T, H].

    The backward case compiles the forward kernel too, whose mask tables are constants only there; its blocks are then
    1024, 1024, 512. Tell them apart by name: backward kernels contain "dkv".
    """
    mask = jax_splash_mask.MultiHeadMask([jax_splash_mask.CausalMask((T, T))] * N)
    blocks = {"block_q": block_q, "block_kv": block_kv, "block_kv_compute": block_kv_compute}
    if backward:
        blocks = {
            "block_q": 1024, "block_kv": 1024, "block_kv_compute": 512, "use_fused_bwd_kernel": True,
            "block_q_dkv": block_q, "block_kv_dkv": block_kv, "block_kv_dkv_compute": block_kv_compute,
        }  # fmt: skip
    kernel = jax_splash.make_splash_mha(
        mask, block_sizes=jax_splash.BlockSizes(**blocks), head_shards=1, q_seq_shards=1
    )
    inputs = (_bf16(N, T, H), _bf16(K, T, H), _bf16(K, T, H))
    if not backward:
        return Case(lambda q, k, v: kernel(q, k, v), inputs, _causal_flops(N, T, H, 2))

    def both(q, k, v, cotangent):
        _, pull_back = jax.vjp(lambda q, k, v: kernel(q, k, v), q, k, v)
        return pull_back(cotangent)

    return Case(both, (*inputs, inputs[0]), _causal_flops(N, T, H, 7))


def attention(
    op: str,
    T: int,
    H: int = 128,
    N: int = 8,
    K: int = 8,
    backward: bool = False,
    implementation: str = "tpu",
    w_dtype: str = "bfloat16",
) -> Case:
    """Our operations with bf16 q, k, v [1, T, N or K, H] and float32 beta and gates.

    Args:
      op: "path", "path_fox" or "fox".
      T: tokens.
      H: head dim of q, k, v and w.
      N: query heads.
      K: key/value heads.
      backward: the backward pass alone, given the residuals.
      implementation: as in the operation.
      w_dtype: of the directions w.
    """
    from pallas_kernels import forgetting_attention, path_attention  # the peers are counted even where this fails

    q, k, gates = _bf16(1, T, N, H), _bf16(1, T, K, H), _float32(1, T, N)
    w, beta = jax.ShapeDtypeStruct((1, T, K, H), w_dtype), _float32(1, T, K)
    inputs = {"path": (q, k, k, w, beta), "path_fox": (q, k, k, w, beta, gates), "fox": (q, k, k, gates)}[op]
    public = forgetting_attention if op == "fox" else path_attention
    function = functools.partial(public, implementation=implementation)
    if backward:
        return _backward(function, inputs, q, _causal_flops(N, T, H, 5))
    return Case(function, inputs, _causal_flops(N, T, H, 2))
