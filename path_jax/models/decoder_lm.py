"""Decoder language model: pre-norm blocks of a mixer and an MLP.

x = x + mixer(norm(x));  x = x + mlp(norm(x));   logits = head(norm(x))

A block may have no MLP, and layers may have different mixers.
"""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from path_jax.mixers.state import RecurrentState, State
from path_jax.models.config import ModelConfig
from path_jax.nn.layers import INIT_STD, GeluMLP, RMSNorm, SwiGLU, default_positions
from path_jax.nn.taps import Tap
from path_jax.parallel.sharding import constrain

LMCache = tuple[State | RecurrentState, ...]  # one state per layer


@flax.struct.dataclass
class LMOutput:
    """What a model returns; an unused field costs nothing under jit."""

    logits: Float[Array, "B T V"]  # float32
    hidden: Float[Array, "B T D"]  # after the final norm
    cache: LMCache | None = None


def make_norm(config: ModelConfig, name: str | None = None) -> nn.Module:
    """The norm before a mixer, an MLP or the output projection."""
    if config.norm == "layer":
        # The fast variance E[x^2] - E[x]^2 loses digits where the mean is large, as in GPT-2's residual stream.
        dtype = jnp.dtype(config.dtype)
        return nn.LayerNorm(epsilon=config.norm_eps, dtype=dtype, use_fast_variance=False, name=name)
    return RMSNorm(config.norm_eps, name=name)


class Block(nn.Module):
    """One layer of the model."""

    config: ModelConfig
    layer: int = 0  # for its mixer, where layers differ

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        cache: State | RecurrentState | None = None,
        lengths: Int[Array, "B"] | None = None,
        only_cache: bool = False,  # leave x as it is, and the rest to the compiler to drop
    ):
        config = self.config
        dtype = jnp.dtype(config.dtype)
        x = Tap(name="resid_pre")(constrain(x, "batch", "length", "embed"))
        y = Tap(name="mixer_in")(make_norm(config, "mixer_norm")(x))
        mixer = config.make_mixer(self.layer, "mixer")
        y, cache = mixer(y, positions=positions, segment_ids=segment_ids, cache=cache, lengths=lengths)
        if only_cache:
            return x, cache
        x = x + Tap(name="mixer_out")(y)
        if config.mlp != "none":
            y = Tap(name="mlp_in")(make_norm(config, "mlp_norm")(x))
            mlp = {"swiglu": SwiGLU, "gelu": GeluMLP}[config.mlp](config.mlp_dim, dtype, name="mlp")
            x = x + Tap(name="mlp_out")(mlp(y))
        return Tap(name="resid_post")(x), cache


class DecoderLM(nn.Module):
    """Decoder-only language model.

    Call it as `DecoderLM(config).apply({"params": params}, tokens, positions=None, segment_ids=None, cache=None,
    lengths=None)`.

    Args:
      tokens: int [B, T] in [0, V).
      positions: int [B, T], used by rotary mixers and learned positions; counted from the start of each document by
        default.
      segment_ids: int [B, T]: packed documents, 0 = padding.
      cache: from `models.cache.init_cache` or an earlier call, whose tokens precede these; needs scan_layers=False.
      lengths: int [B], with a cache: how many of a row's tokens are there, the others being padding behind them.

    Returns:
      LMOutput.

    Raises:
      ValueError: T exceeds the learned positions.
    """

    config: ModelConfig

    def setup(self):
        config = self.config
        dtype = jnp.dtype(config.dtype)
        block = Block
        if config.remat != "none":
            policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
            block = nn.remat(Block, policy=policies[config.remat], prevent_cse=not config.scan_layers)
        if config.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=config.num_layers,
            )
            self.layers = scanned(config)
        else:
            self.layers = [block(config, i) for i in range(config.num_layers)]
        table = functools.partial(
            nn.Embed, features=config.embed_dim, dtype=dtype, embedding_init=nn.initializers.normal(INIT_STD)
        )
        self.embed = table(config.vocab_size)
        if config.num_positions:
            self.position_embed = table(config.num_positions)
        self.final_norm = make_norm(config)
        if not config.tie_embeddings:
            self.lm_head = Unembed(config.vocab_size)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: LMCache | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> LMOutput:
        if positions is None:
            positions = default_positions(tokens, segment_ids) + (0 if cache is None else cache[0].length[:, None])
        x = self.embed_tokens(tokens, positions)
        if not self.config.scan_layers:
            states = []
            for i, layer in enumerate(self.layers):
                x, state = layer(x, positions, segment_ids, None if cache is None else cache[i], lengths)
                states.append(state)
            cache = None if cache is None else tuple(states)
        elif cache is None:
            x, _ = self.layers(x, positions, segment_ids)
        else:
            raise ValueError("a scan over layers would copy the cache in every step: decode with models.cache.unrolled")
        hidden = self.final_norm(x)
        return LMOutput(self.unembed(hidden), hidden, cache)

    def embed_tokens(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer reads."""
        x = self.embed(tokens)
        if num_positions := self.config.num_positions:
            if tokens.shape[1] > num_positions:
                raise ValueError(
                    f"{tokens.shape[1]} tokens are more than the model's {num_positions} learned positions"
                )
            x += self.position_embed(positions)
        return x

    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits of (normed) hidden states; a loss applies it chunk by chunk."""
        if self.config.tie_embeddings:
            kernel = self.embed.embedding.T.astype(hidden.dtype)
            return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        return self.lm_head(hidden)

    def lens(self, residual: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits of a residual stream as if no layer followed: `unembed(final_norm(x))`."""
        return self.unembed(self.final_norm(residual))


class Unembed(nn.Module):
    """Projection to float32 logits."""

    vocab_size: int

    @nn.compact
    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        kernel = self.param("kernel", nn.initializers.normal(INIT_STD), (hidden.shape[-1], self.vocab_size))
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def abstract_params(config: ModelConfig) -> dict:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`; allocates none."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(DecoderLM(config).init, jax.random.key(0), tokens)["params"]


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)))
