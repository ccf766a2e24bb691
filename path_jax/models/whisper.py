"""Whisper: an encoder of speech and a decoder of text that attends to it, with the decoder's residual streams.

encoder: x = gelu(conv(gelu(conv(mel)))) + sinusoids, blocks, norm
decoder: y = embed(tokens) + positions, blocks that also attend to the encoder's output;  logits = embed^T norm(y)

Arithmetic and shapes are those of Hugging Face's `WhisperForConditionalGeneration`. Not supported: a decode cache,
timestamps by rule, beam search, speech longer than the positions (cut it into pieces), a scan over layers.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from path_jax.models.vit import Block, check_fields, layer_norm
from path_jax.nn.layers import INIT_STD


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """Whisper.

    Args:
      vocab_size: V; num_mel_bins: M; embed_dim: D, the same in encoder and decoder.
      encoder_layers, encoder_heads, encoder_mlp_dim: of the encoder.
      decoder_layers, decoder_heads, decoder_mlp_dim: of the decoder, L layers.
      max_source_positions: S of 30 s of speech, two frames each; max_target_positions: the longest text.
      norm_eps: of every norm.
      dtype: compute dtype; parameters and logits are float32 always.
    """

    vocab_size: int
    num_mel_bins: int
    embed_dim: int
    encoder_layers: int
    encoder_heads: int
    encoder_mlp_dim: int
    decoder_layers: int
    decoder_heads: int
    decoder_mlp_dim: int
    max_source_positions: int = 1500
    max_target_positions: int = 448
    norm_eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self):
        check_fields(self, heads=("encoder_heads", "decoder_heads"))
        if self.embed_dim % 2 or self.embed_dim < 4:
            raise ValueError(f"embed_dim={self.embed_dim} must be even and at least 4: half of it are sines")


@flax.struct.dataclass
class WhisperOutput:
    """What the decoder returns; an unused field costs nothing under jit."""

    logits: Float[Array, "B T V"]  # float32
    streams: Float[Array, "L B T D"]  # residual streams after every block, before the final norm


def sinusoids(length: int, embed_dim: int) -> Float[Array, "S D"]:
    """sin(t w_i) in the first half, cos(t w_i) in the second, w_i = 10000^(-i / (D/2 - 1)), i = 0 ... D/2 - 1."""
    half = embed_dim // 2
    angles = jnp.arange(length)[:, None] * jnp.exp(-jnp.log(1e4) / (half - 1) * jnp.arange(half))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class Whisper(nn.Module):
    """Speech to text; the methods `encode`, `decode` and `lens` are for `apply({"params": params}, ..., method=...)`.

    Called as a whole it is `decode(tokens, encode(mel))`. Blocks are `encoder_layers_0` ... and `decoder_layers_0` ...,
    with taps as in any model. The sinusoids are a parameter, as in published checkpoints, which were not trained on it.

    Source: Radford et al., "Robust speech recognition via large-scale weak supervision", 2022.
    """

    config: WhisperConfig

    def setup(self):
        config = self.config
        dtype = jnp.dtype(config.dtype)
        init = nn.initializers.normal(INIT_STD)
        conv = functools.partial(nn.Conv, config.embed_dim, (3,), padding=1, dtype=dtype, kernel_init=init)
        self.conv1 = conv()
        self.conv2 = conv(strides=2)
        source = (config.max_source_positions, config.embed_dim)
        self.source_positions = self.param("source_positions", lambda _: sinusoids(*source))
        block = functools.partial(Block, norm_eps=config.norm_eps, key_bias=False, dtype=dtype)
        encoder = functools.partial(block, config.encoder_heads, config.encoder_mlp_dim)
        decoder = functools.partial(block, config.decoder_heads, config.decoder_mlp_dim, is_causal=True)
        self.encoder_layers = [encoder() for _ in range(config.encoder_layers)]
        self.encoder_norm = layer_norm(config.norm_eps, dtype)
        table = functools.partial(nn.Embed, features=config.embed_dim, dtype=dtype, embedding_init=init)
        self.embed = table(config.vocab_size)
        self.position_embed = table(config.max_target_positions)
        self.decoder_layers = [decoder() for _ in range(config.decoder_layers)]
        self.final_norm = layer_norm(config.norm_eps, dtype)

    def __call__(self, mel: Float[Array, "B M frames"], tokens: Int[Array, "B T"]) -> WhisperOutput:
        return self.decode(tokens, self.encode(mel))

    def encode(self, mel: Float[Array, "B M frames"]) -> Float[Array, "B S D"]:
        """What the decoder attends to.

        Args:
          mel: log-mel features of `path_jax.data.speech.log_mel`, 2 S frames. Whisper was trained on full 30 s, silence
            filling the rest; with fewer frames it computes on fewer positions, which is faster and less accurate.

        Raises:
          ValueError: for another number of bins, an odd number of frames or more than the positions.
        """
        config = self.config
        if mel.ndim != 3 or mel.shape[1] != config.num_mel_bins:
            raise ValueError(f"mel is {mel.shape}; the model takes [B, {config.num_mel_bins}, frames]")
        if mel.shape[2] % 2 or not 0 < mel.shape[2] <= 2 * config.max_source_positions:
            raise ValueError(
                f"{mel.shape[2]} frames must be an even number of at most {2 * config.max_source_positions}: cut or pad"
            )
        x = nn.gelu(self.conv1(mel.swapaxes(1, 2)), approximate=False)
        x = nn.gelu(self.conv2(x), approximate=False)
        x += self.source_positions[: x.shape[1]].astype(x.dtype)
        for layer in self.encoder_layers:
            x = layer(x)
        return self.encoder_norm(x)

    def decode(self, tokens: Int[Array, "B T"], encoded: Float[Array, "B S D"]) -> WhisperOutput:
        """Logits of what follows every token, and the residual streams.

        Raises:
          ValueError: if T exceeds the learned positions.
        """
        if tokens.shape[1] > self.config.max_target_positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens are more than the model's {self.config.max_target_positions} positions"
            )
        x = self.embed(tokens) + self.position_embed(jnp.arange(tokens.shape[1]))
        streams = []
        for layer in self.decoder_layers:
            x = layer(x, encoded)
            streams.append(x)
        return WhisperOutput(self.lens(x), jnp.stack(streams))

    def lens(self, residual: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits of a decoder's residual stream as if no layer followed: `embed^T final_norm(x)`."""
        hidden = self.final_norm(residual)
        kernel = self.embed.embedding.T.astype(hidden.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def abstract_params(config: WhisperConfig) -> dict:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`; allocates none."""
    mel = jax.ShapeDtypeStruct((1, config.num_mel_bins, 2), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Whisper(config).init, jax.random.key(0), mel, tokens)["params"]


def transcribe(
    model: Whisper,
    params,
    mel: Float[Array, "B M frames"],
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    eos_id: int,
    suppress_ids: Sequence[int] = (),
    begin_suppress_ids: Sequence[int] = (),
) -> Int[np.ndarray, "B max_new_tokens"]:
    """The likeliest next token, again and again, after the prompt.

    There is no cache: every step runs the decoder over all P + max_new_tokens positions (the logits of one alone are
    computed), so a text of n tokens costs n such runs, and the weights of self attention grow with the square.
    Compiled once for each model, max_new_tokens and shape; the steps end when every row has.

    Args:
      model: Whisper; params: its parameters.
      mel: see `Whisper.encode`.
      prompt_ids: The P tokens that open every row: start of transcript, language and task, no timestamps.
      max_new_tokens: At least 1.
      eos_id: Ends a row.
      suppress_ids: Never taken.
      begin_suppress_ids: Not taken as the first token.

    Returns:
      int32 ids after the prompt, filled with `eos_id` behind a row's end.

    Raises:
      ValueError: for ids that are not in the vocabulary, or more tokens than positions.
    """
    config = model.config
    prompt = np.asarray(prompt_ids, np.int32).reshape(-1)
    if max_new_tokens < 1 or not prompt.size:
        raise ValueError(f"{max_new_tokens=} and the prompt's {prompt.size} tokens must be at least 1")
    if prompt.size + max_new_tokens > config.max_target_positions:
        raise ValueError(
            f"a prompt of {prompt.size} and {max_new_tokens=} are more than {config.max_target_positions} positions"
        )
    forbidden = np.zeros((2, config.vocab_size), bool)  # always, and at first
    for ids, rows in ((prompt, ()), ([eos_id], ()), (suppress_ids, (0, 1)), (begin_suppress_ids, (1,))):
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ((ids < 0) | (ids >= config.vocab_size)).any():
            raise ValueError(f"ids {ids.tolist()} must be in [0, vocab_size={config.vocab_size})")
        for row in rows:
            forbidden[row, ids] = True
    return np.asarray(_transcribe(model, params, jnp.asarray(mel), prompt, eos_id, forbidden, max_new_tokens))


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _transcribe(model, params, mel, prompt, eos_id, forbidden, max_new_tokens):
    apply = functools.partial(model.apply, {"params": params})
    encoded = apply(mel, method="encode")
    start, stop = len(prompt), len(prompt) + max_new_tokens
    tokens = jnp.full((len(mel), stop), eos_id, jnp.int32).at[:, :start].set(prompt)

    def is_running(state):
        _, length, has_ended = state
        return (length < stop) & ~has_ended.all()

    def step(state):
        tokens, length, has_ended = state
        # What is filled in behind `length` does not reach the positions before: attention is causal.
        streams = apply(tokens, encoded, method="decode").streams
        residual = jax.lax.dynamic_index_in_dim(streams[-1], length - 1, axis=1, keepdims=False)
        logits = jnp.where(forbidden[(length == start).astype(int)], -jnp.inf, apply(residual, method="lens"))
        best = jnp.where(has_ended, eos_id, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        return tokens.at[:, length].set(best), length + 1, has_ended | (best == eos_id)

    return jax.lax.while_loop(is_running, step, (tokens, start, jnp.zeros(len(mel), bool)))[0][:, start:]
