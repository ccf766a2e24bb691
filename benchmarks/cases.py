"""Cases to compile ahead of time: our operations, JAX's attention kernels for TPUs, and a matrix product."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as jax_splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as jax_splash_mask

from benchmarks.ahead_of_time import Case


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
    Hv: int | None = None,
    queries: int | None = None,
    backward: bool = False,
    dtype: str = "bfloat16",
    w_dtype: str | None = None,
    segments: bool = False,
    keys: int | None = None,
    implementation: str | None = "tpu",
    options: dict | None = None,
) -> Case:
    """Our operations with q, k, v [1, T, N or K, H] and float32 beta and gates.

    Args:
      op: "path", "path_fox" or "fox".
      T: tokens.
      H: head dim of q, k and w.
      N: query heads.
      K: key/value heads.
      Hv: head dim of v, H by default.
      queries: number of queries, T by default.
      backward: the backward pass alone, given the residuals.
      dtype: of q, k, v.
      w_dtype: of the directions w, dtype by default.
      segments: with segment ids.
      keys: per inner step of the TPU kernels' quadratic stage; from their table by default.
      implementation: which kernels.
      options: further keyword arguments of the operation.
    """
    # Imported here: the peers are counted even where this fails.
    from pallas_kernels import forgetting_attention, path_attention
    from pallas_kernels.blockwise.tpu import tuning

    array = jax.ShapeDtypeStruct
    q, k, v = array((1, queries or T, N, H), dtype), array((1, T, K, H), dtype), array((1, T, K, Hv or H), dtype)
    gates = _float32(1, T, N)
    w, beta = array((1, T, K, H), w_dtype or dtype), _float32(1, T, K)
    inputs = {"path": (q, k, v, w, beta), "path_fox": (q, k, v, w, beta, gates), "fox": (q, k, v, gates)}[op]
    public = forgetting_attention if op == "fox" else path_attention
    function = functools.partial(public, implementation=implementation, **options or {})
    if segments:
        inputs, function = (array((1, T), "int32"), *inputs), _with_segments(function)
    if backward:
        out = array((*q.shape[:3], Hv or H), dtype)
        case = _backward(function, inputs, out, _causal_flops(N, T, H, 5))
    else:
        case = Case(function, inputs, _causal_flops(N, T, H, 2))
    if keys is None:
        return case

    def with_keys(*arguments):
        with tuning.force_keys(keys):
            return case.function(*arguments)

    return dataclasses.replace(case, function=with_keys)


def _with_segments(function):
    return lambda segment_ids, *arrays: function(*arrays, segment_ids=segment_ids)


def both_directions(op: str, T: int, **arguments) -> Case:
    """Forward and backward pass in one program; arguments as for `attention`."""
    forward = attention(op, T, **arguments)
    out = jax.eval_shape(forward.function, *forward.inputs)

    def function(dout, *inputs):
        out, pull_back = jax.vjp(forward.function, *inputs)
        return out, pull_back(dout)

    return Case(function, (out, *forward.inputs))


def decode(
    op: str, T: int, H: int = 128, N: int = 8, K: int = 8, B: int = 4, tokens: int = 1, dtype: str = "bfloat16",
    Hv: int | None = None, implementation: str | None = "tpu", options: dict | None = None,
) -> Case:  # fmt: skip
    """A decode step of B rows with room for T tokens each; arguments else as for `attention`."""
    from pallas_kernels import extend, init_cache

    path, forget = op != "fox", op != "path"
    cache = jax.eval_shape(
        lambda: init_cache(
            B, T, num_heads=N, num_kv_heads=K, head_dim=H, v_head_dim=Hv, dtype=dtype, path=path, forget=forget
        )
    )
    array = lambda *shape: jax.ShapeDtypeStruct((B, tokens, *shape), dtype)
    inputs = {"q": array(N, H), "k": array(K, H), "v": array(K, Hv or H)}
    if path:
        inputs |= {"w": array(K, H), "beta": _float32(B, tokens, K)}
    if forget:
        inputs["log_forget"] = _float32(B, tokens, N)
    step = functools.partial(extend, implementation=implementation, **options or {})
    return Case(lambda cache, inputs: step(cache, **inputs), (cache, inputs))


def pair(
    L: int, M: int, H: int = 128, N: int = 8, K: int = 8, dtype: str = "bfloat16", gates: bool = True,
    segments: bool = True,
) -> Case:  # fmt: skip
    """L queries attend to M keys that all come before them, forward and backward, as between chunks of a ring."""
    from pallas_kernels.blockwise.pairs import Pair, PairOptions
    from pallas_kernels.dispatch import backward_pair, forward_pair

    array = lambda *shape: jax.ShapeDtypeStruct((1, *shape), dtype)
    heads, options = (K, N // K), PairOptions(H**-0.5)
    gate = lambda length: _float32(1, *heads, length) if gates else None
    ids = lambda length: jax.ShapeDtypeStruct((1, length), "int32") if segments else None
    distance = jax.ShapeDtypeStruct((), "int32")
    query = array(*heads, L, H)
    pair = Pair(query, array(K, M, H), array(K, M, H), gate(L), gate(M), ids(L), ids(M), distance)

    def both(pair, dout):
        out, lse = forward_pair("tpu", options, pair)
        return out, lse, backward_pair("tpu", options, pair, lse, (out * dout).sum(-1), dout)

    return Case(both, (pair, query), flops=2 * 7 * N * L * M * H)
