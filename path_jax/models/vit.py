"""Vision transformer that classifies images, with the residual stream of every layer.

x = [cls; patches(image)] + positions;  x = x + attention(norm(x));  x = x + mlp(norm(x));  logits = head(norm(x_cls))

Arithmetic and shapes are those of Hugging Face's `ViTForImageClassification`. The blocks also serve whisper.py.
Not supported: images of another size (positions are not interpolated), masked patches, dropout, a scan over layers.
"""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from path_jax.models.config import DTYPES
from path_jax.nn.layers import INIT_STD, linear
from path_jax.nn.taps import Tap


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Vision transformer.

    Args:
      image_size: height and width of an image; patch_size: of a patch; num_channels: C.
      num_classes: K; num_layers: L; embed_dim: D; num_heads: N; mlp_dim: F.
      norm_eps: of every norm.
      dtype: compute dtype; parameters and logits are float32 always.
    """

    image_size: int
    patch_size: int
    num_channels: int
    num_classes: int
    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    norm_eps: float = 1e-12
    dtype: str = "float32"

    def __post_init__(self):
        check_fields(self, heads=("num_heads",))
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


def check_fields(config, heads: tuple[str, ...]) -> None:
    """Checks the integers, `norm_eps` and `dtype` of a configuration, and that `embed_dim` splits into heads.

    Raises:
      ValueError: for a field out of range.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int and value < 1:
            raise ValueError(f"{field.name}={value} must be positive")
    if not config.norm_eps > 0:
        raise ValueError(f"norm_eps={config.norm_eps} must be positive")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    for name in heads:
        if config.embed_dim % getattr(config, name):
            raise ValueError(f"embed_dim={config.embed_dim} is not a multiple of {name}={getattr(config, name)}")


@flax.struct.dataclass
class ViTOutput:
    """What a vision transformer returns; an unused field costs nothing under jit."""

    logits: Float[Array, "B K"]  # float32
    streams: Float[Array, "L B D"]  # residual stream of the class token after every block, before the final norm


def layer_norm(eps: float, dtype: jnp.dtype, name: str | None = None) -> nn.LayerNorm:
    """Layer norm with scale and bias; the fast variance E[x^2] - E[x]^2 would lose digits where the mean is large."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Softmax attention: `o_proj(softmax(q k^T / sqrt(H)) v)`, q of x, k and v of `source`, which is x by default.

    Logits and weights are float32, computed densely [B, N, T, S]. Projections have biases, but for keys as `key_bias`
    says. Taps: q, k, v, attn_probs, head_out.
    """

    num_heads: int
    key_bias: bool = True
    is_causal: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], source: Float[Array, "B S D"] | None = None) -> Float[Array, "B T D"]:
        source = x if source is None else source
        project = functools.partial(linear, x.shape[-1], dtype=self.dtype)
        heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)
        q = Tap(name="q")(heads(project("q_proj", use_bias=True)(x)))
        k = Tap(name="k")(heads(project("k_proj", use_bias=self.key_bias)(source)))
        v = Tap(name="v")(heads(project("v_proj", use_bias=True)(source)))
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        if self.is_causal:
            logits = jnp.where(jnp.tri(*logits.shape[2:], dtype=bool), logits, -jnp.inf)
        weights = Tap(name="attn_probs")(nn.softmax(logits))
        out = Tap(name="head_out")(jnp.einsum("BNTS,BSNH->BTNH", weights.astype(v.dtype), v))
        return project("o_proj", use_bias=True)(out.reshape(x.shape))


class MLP(nn.Module):
    """`down(gelu(up(x)))` with biases and the exact gelu, `x Phi(x)`."""

    mlp_dim: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        up = linear(self.mlp_dim, "up_proj", dtype=self.dtype, use_bias=True)(x)
        return linear(x.shape[-1], "down_proj", dtype=self.dtype, use_bias=True)(nn.gelu(up, approximate=False))


class Block(nn.Module):
    """Pre-norm block: attention to itself (`mixer`), to `source` where there is one (`cross`, without taps), MLP."""

    num_heads: int
    mlp_dim: int
    norm_eps: float
    key_bias: bool = True
    is_causal: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], source: Float[Array, "B S D"] | None = None) -> Float[Array, "B T D"]:
        norm = functools.partial(layer_norm, self.norm_eps, self.dtype)
        attention = functools.partial(Attention, self.num_heads, self.key_bias, dtype=self.dtype)
        x = Tap(name="resid_pre")(x)
        y = Tap(name="mixer_in")(norm("mixer_norm")(x))
        x = x + Tap(name="mixer_out")(attention(self.is_causal, name="mixer")(y))
        if source is not None:
            x = x + attention(name="cross")(norm("cross_norm")(x), source)
        y = Tap(name="mlp_in")(norm("mlp_norm")(x))
        x = x + Tap(name="mlp_out")(MLP(self.mlp_dim, self.dtype, name="mlp")(y))
        return Tap(name="resid_post")(x)


class ViT(nn.Module):
    """Vision transformer.

    Call it as `ViT(config).apply({"params": params}, images)`.

    Args:
      images: float [B, image_size, image_size, C], normalised as the model was trained (often to [-1, 1]).

    Returns:
      ViTOutput.

    Raises:
      ValueError: for images of another shape.

    Source: Dosovitskiy et al., "An image is worth 16x16 words", 2021.
    """

    config: ViTConfig

    def setup(self):
        config = self.config
        dtype = jnp.dtype(config.dtype)
        init = nn.initializers.normal(INIT_STD)
        patch = (config.patch_size, config.patch_size)
        self.patch_conv = nn.Conv(config.embed_dim, patch, patch, "VALID", dtype=dtype, kernel_init=init)
        self.cls_token = self.param("cls_token", init, (1, 1, config.embed_dim))
        self.position_embed = self.param("position_embed", init, (1, 1 + config.num_patches, config.embed_dim))
        block = functools.partial(Block, config.num_heads, config.mlp_dim, config.norm_eps, dtype=dtype)
        self.layers = [block() for _ in range(config.num_layers)]
        self.final_norm = layer_norm(config.norm_eps, dtype)
        self.classifier = nn.Dense(config.num_classes, dtype=jnp.float32, kernel_init=init)

    def __call__(self, images: Float[Array, "B height width C"]) -> ViTOutput:
        config = self.config
        if images.ndim != 4 or images.shape[1:] != (config.image_size, config.image_size, config.num_channels):
            raise ValueError(
                f"images are {images.shape}; the model takes [B, {config.image_size}, {config.image_size}, "
                f"{config.num_channels}]: resize them"
            )
        x = self.patch_conv(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls_token = jnp.broadcast_to(self.cls_token, (x.shape[0], 1, x.shape[-1])).astype(x.dtype)
        x = jnp.concatenate([cls_token, x], axis=1) + self.position_embed.astype(x.dtype)
        streams = []
        for layer in self.layers:
            x = layer(x)
            streams.append(x[:, 0])
        return ViTOutput(self.lens(streams[-1]), jnp.stack(streams))

    def lens(self, residual: Float[Array, "*batch D"]) -> Float[Array, "*batch K"]:
        """Float32 logits of a class token's residual stream as if no layer followed: `classifier(final_norm(x))`."""
        return self.classifier(self.final_norm(residual))


def abstract_params(config: ViTConfig) -> dict:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`; allocates none."""
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.num_channels), jnp.float32)
    return jax.eval_shape(ViT(config).init, jax.random.key(0), images)["params"]
