"""Tiny models of every foreign format, with random parameters."""

import gguf
import jax.numpy as jnp
import numpy as np

from path_jax.checkpoints.names import export_params, parameter_shapes, tensors_of
from path_jax.models import ModelConfig

SHAPE = dict(vocab_size=40, num_layers=2, embed_dim=16, num_heads=4, mlp_dim=24, scan_layers=False)
GPT2 = dict(norm="layer", mlp="gelu", mixer="nope", mixer_options=dict(qkv_bias=True, o_bias=True))
# name: (format, model)
MODELS = {
    "fla-path": ("fla", ModelConfig(**SHAPE, mixer="path")),
    "fla-path-fox": (
        "fla",
        ModelConfig(
            **SHAPE, mixer="path_fox", num_kv_heads=2, mixer_options=dict(w_rank=None, conv_size=0, gate_scale=None)
        ),
    ),
    "fla-path-own-layer": ("fla", ModelConfig(**SHAPE, mixer="path", mixer_options=dict(qk_norm=True, conv_size=4))),
    "fla-fox": ("fla", ModelConfig(**SHAPE, mixer="fox", tie_embeddings=True)),
    "fla-fox-all": (
        "fla",
        ModelConfig(
            **SHAPE,
            mixer="fox",
            num_kv_heads=2,
            mixer_options=dict(qkv_bias=True, qk_norm="head", output_gate=True),
        ),
    ),
    "fox-llama": ("fox", ModelConfig(**SHAPE, mixer="fox")),
    "fox-rope": ("fox", ModelConfig(**SHAPE, mixer="fox", mixer_options=dict(gate="none", rope_theta=5e5))),
    "fox-bias": ("fox", ModelConfig(**SHAPE, mixer="fox", mixer_options=dict(gate="bias_only"))),
    "fox-pro": (
        "fox",
        ModelConfig(
            **SHAPE,
            mixer="fox",
            mixer_options=dict(kv_shift=True, qk_norm="shared", output_norm=True, output_gate=True),
        ),
    ),
    "llama": ("hf", ModelConfig(**SHAPE, mixer="rope", num_kv_heads=2, head_dim=8)),
    "llama-biases": (
        "hf",
        ModelConfig(
            **SHAPE,
            mixer="rope",
            mixer_options=dict(rope_theta=5e5, qkv_bias=True, o_bias=True),
            tie_embeddings=True,
        ),
    ),
    "gpt2": ("hf", ModelConfig(**SHAPE, **GPT2, num_positions=32, tie_embeddings=True, norm_eps=1e-5)),
    "gpt2-untied": ("hf", ModelConfig(**SHAPE, **GPT2, num_positions=32)),
}

# Quantised rows are multiples of 32.
GGUF = ModelConfig(
    **SHAPE | dict(embed_dim=64, mlp_dim=96), num_kv_heads=2, mixer="rope", mixer_options=dict(rope_theta=5e4),
    norm_eps=2.0**-17,
)  # fmt: skip


def random_params(config, dtype=jnp.float32):
    """N(0, 0.3), norm scales around 1, as an unrolled tree."""
    rng = np.random.default_rng(0)
    params = {}
    for name, leaf in parameter_shapes(config).items():
        *folders, last = name.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = jnp.asarray((last == "scale") + 0.3 * rng.standard_normal(leaf.shape), dtype)
    return params


def write_gguf(path, params, kind="F32", config=GGUF, change=lambda writer: None, architecture="llama"):
    """Writes matrices in the type `kind`, vectors in float32, a vocabulary of three tokens, and `change`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.mixer_options["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", "<|end|>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    change(writer)
    for name, value in export_params(config, tensors_of(config, "gguf"), params):
        quantization = gguf.GGMLQuantizationType[kind if value.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(value, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
