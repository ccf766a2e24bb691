"""DeltaNet: linear attention whose state is corrected towards each new value rather than added to.

The pure functions come first: the recurrence token by token, and chunk by chunk for whole sequences. Both are ordinary
differentiable array code in at least float32. Not here: expansion of keys and values by different factors, other
activations and norms of queries and keys than SiLU and L2, decay of the state.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.householder import from_tiles, to_tiles, unit_lower_inverse
from path_jax.mixers.path_attention import unit_directions
from path_jax.mixers.state import RecurrentState, init_recurrent_state, lengths_of
from path_jax.nn.layers import HeadRMSNorm, ShortConv, append, linear
from path_jax.nn.taps import Tap

CHUNK_SIZE = 64

# As in the linear stage of PaTH attention, rounding these products to bfloat16 would add up over the sequence.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def delta_step(
    state: Float[Array, "B N H P"],
    q: Float[Array, "B N H"],
    k: Float[Array, "B N H"],
    v: Float[Array, "B N P"],
    beta: Float[Array, "B N"],
    scale: float,
) -> tuple[Float[Array, "B N P"], Float[Array, "B N H P"]]:
    """One token of `delta_rule`, in the state's precision: its output and the next state."""
    q, k, v, beta = (x.astype(state.dtype) for x in (q, k, v, beta))
    update = beta[..., None] * (v - _einsum("bnh,bnhp->bnp", k, state))
    state = state + k[..., :, None] * update[..., None, :]
    return scale * _einsum("bnh,bnhp->bnp", q, state), state


def delta_rule(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N P"],
    beta: Float[Array, "B T N"],
    state: Float[Array, "B N H P"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    """Linear attention with the delta rule, chunk by chunk.

        S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = scale S_t^T q_t

    Inside a chunk that starts from S the updates u_t = beta_t (v_t - S_{t-1}^T k_t) solve a triangular system,
    `(I + diag(beta) tril(K K^T, -1)) U = diag(beta) (V - K S)`, and `S + K^T U` starts the next chunk. Memory is
    O(T (H + P + chunk_size) + T H P / chunk_size) per head, backward pass included.

    Args:
      q, k: queries and keys; k is used as given (unit norm is the caller's duty).
      v: values.
      beta: strengths of the updates in [0, 2]; 0 leaves the state as it is.
      state: before the first token, 0 by default; of the document that the first token belongs to.
      segment_ids: contiguous packed documents, each of which starts from 0; 0 is padding.
      scale: of the outputs, H ** -0.5 by default.
      chunk_size: tokens per chunk, a power of two.

    Returns:
      o, 0 in padding, and the state after the last token, of its document; float32, or float64 for float64 inputs.

    Raises:
      ValueError: if chunk_size is not a power of two.

    Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", section 3.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{chunk_size=} must be a power of two")
    (batch, length, num_heads, head_dim), value_dim = q.shape, v.shape[-1]
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    chunk_size = min(chunk_size, 1 << (length - 1).bit_length())
    q, k, v, beta = (x.astype(dtype) for x in (q, k, v, beta))
    q = q * (head_dim**-0.5 if scale is None else scale)
    state = jnp.zeros((batch, num_heads, head_dim, value_dim), dtype) if state is None else state.astype(dtype)
    tiles = functools.partial(to_tiles, size=chunk_size)  # [chunks, B, N, C, ...]; added tokens have beta = 0

    if segment_ids is None:
        together = continues = ends = True
    else:
        beta = beta * (segment_ids > 0)[..., None]
        document = tiles(_documents(segment_ids, chunk_size)[..., None])  # [chunks, B, 1, C]
        before = jnp.pad(document[:-1, ..., -1:], [(1, 0), (0, 0), (0, 0), (0, 0)])
        together = document[..., :, None] == document[..., None, :]
        continues = document == before  # tokens whose document began before the chunk
        ends = document == document[..., -1:]  # tokens whose document lasts until its end
    q, k, v, beta = tiles(q), tiles(k), tiles(v), tiles(beta)
    gram = jnp.where(together, jnp.tril(_einsum("cbnih,cbnjh->cbnij", k, k), -1), 0)
    logits = jnp.where(together, jnp.tril(_einsum("cbnih,cbnjh->cbnij", q, k)), 0)
    solve = unit_lower_inverse(beta[..., :, None] * gram) * beta[..., None, :]
    mask = lambda x, where: jnp.where(jnp.expand_dims(where, -1), x, 0) if segment_ids is not None else x
    chunks = (
        mask(q, continues),
        _einsum("cbnij,cbnjh->cbnih", solve, mask(k, continues)),
        _einsum("cbnij,cbnjp->cbnip", solve, v),
        logits,
        mask(k, ends),
        jnp.ones(len(q), bool) if segment_ids is None else continues[..., -1:, None],
    )

    def take_chunk(state, chunk):
        q, correction, update, logits, k, is_kept = chunk
        update = update - _einsum("bnih,bnhp->bnip", correction, state)
        out = _einsum("bnih,bnhp->bnip", q, state) + _einsum("bnij,bnjp->bnip", logits, update)
        return jnp.where(is_kept, state, 0) + _einsum("bnih,bnip->bnhp", k, update), out

    state, out = jax.lax.scan(take_chunk, state, chunks)
    return from_tiles(out, length), state


def _documents(segment_ids: Int[Array, "B T"], chunk_size: int) -> Int[Array, "B S"]:
    """Numbers documents 0, 1, ... in each row and extends the last one to whole chunks."""
    number = jnp.cumsum(jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)]), axis=1)
    return jnp.pad(number, [(0, 0), (0, -number.shape[1] % chunk_size)], mode="edge")


class DeltaNet(nn.Module):
    """Delta-rule mixer.

        q, k = unit(silu(conv(proj x))),  v = silu(conv(v_proj x)),  beta = sigmoid(beta_proj x),
        y = o_proj(norm(delta_rule(q, k, v, beta)))

    Args:
      num_heads: N; head_dim: of queries and keys H, D // N by default; value_head_dim: H by default.
      conv_size: tokens of the short convolutions, or 0 for none (SiLU stays).
      allow_neg_eigval: beta = 2 sigmoid(beta_proj x), so that an update can reflect the state along its key.
      output_gate: multiplies the normed output by silu(output_gate_proj x).
      norm_eps: of the output norm, whose scale the heads share.
      dtype: compute dtype, the input's by default; unit vectors, beta and the recurrence are float32 always.

    Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", section 3.3, as
    published in flash-linear-attention, but for the initialisation, which is that of all our mixers.
    """

    num_heads: int
    head_dim: int | None = None
    value_head_dim: int | None = None
    conv_size: int = 4
    allow_neg_eigval: bool = False
    output_gate: bool = False
    norm_eps: float = 1e-5
    dtype: jnp.dtype | None = None

    def __post_init__(self):
        if self.conv_size < 0:
            raise ValueError(f"conv_size={self.conv_size} must be >= 0")
        super().__post_init__()

    def _sizes(self, embed_dim: int) -> tuple[int, int]:
        head_dim = self.head_dim or embed_dim // self.num_heads
        return head_dim, self.value_head_dim or head_dim

    def init_state(self, batch: int, max_length: int, embed_dim: int, **cache_options) -> RecurrentState:
        """State before the first token, of a size that does not depend on `max_length`."""
        del max_length
        head_dim, value_dim = self._sizes(embed_dim)
        widths = {"q": head_dim, "k": head_dim, "v": value_dim} if self.conv_size else {}
        return init_recurrent_state(
            batch,
            histories={name: (self.conv_size - 1, self.num_heads * width) for name, width in widths.items()},
            memories={"state": (self.num_heads, head_dim, value_dim)},
            **{"dtype": self.dtype} | cache_options,
        )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: RecurrentState | None = None,
        lengths: Int[Array, "B"] | None = None,
    ):
        del positions  # the recurrence knows the order
        lengths = lengths_of(x, cache, segment_ids, lengths)
        dtype = x.dtype if self.dtype is None else self.dtype
        length, (head_dim, value_dim) = x.shape[1], self._sizes(x.shape[-1])
        history, convolved = {}, []
        for name, width in (("q", head_dim), ("k", head_dim), ("v", value_dim)):
            y = linear(self.num_heads * width, f"{name}_proj", dtype=dtype)(x)
            if self.conv_size:
                if cache is not None:
                    y, history[name] = append(cache.history[name], y, lengths)
                y = ShortConv(self.conv_size, name=f"{name}_conv")(y, segment_ids)[:, -length:]
            else:
                y = nn.silu(y)
            convolved.append(y)
        if self.conv_size:
            splits = (self.num_heads * head_dim, 2 * self.num_heads * head_dim)
            convolved = jnp.split(Tap(name="conv_out")(jnp.concatenate(convolved, axis=-1)), splits, axis=-1)
        q, k, v = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in convolved)
        q, k, v = Tap(name="q")(unit_directions(q)), Tap(name="k")(unit_directions(k)), Tap(name="v")(v)
        beta = nn.sigmoid(linear(self.num_heads, "beta_proj", dtype=dtype)(x).astype(jnp.float32))
        beta = Tap(name="beta")(2 * beta if self.allow_neg_eigval else beta)

        if cache is None:
            out, _ = delta_rule(q, k, v, beta, segment_ids=segment_ids)
        else:
            state = cache.memory["state"]
            beta = jnp.where(jnp.arange(length)[:, None] < lengths[:, None, None], beta, 0)
            if length == 1:
                out, state = delta_step(state, q[:, 0], k[:, 0], v[:, 0], beta[:, 0], head_dim**-0.5)
                out = out[:, None]
            else:
                out, state = delta_rule(q, k, v, beta, state)
            cache = RecurrentState(cache.length + lengths, history, {"state": state})
        out = HeadRMSNorm(is_shared=True, eps=self.norm_eps, name="output_norm")(Tap(name="recurrence")(out))
        out = out.astype(dtype).reshape(*x.shape[:2], -1)
        if self.output_gate:
            out *= Tap(name="gate")(nn.silu(linear(out.shape[-1], "output_gate_proj", dtype=dtype)(x)))
        return linear(x.shape[-1], "o_proj", dtype=dtype)(out), cache
