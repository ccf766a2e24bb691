"""Whisper of Hugging Face (config.json beside safetensors files) and of CTranslate2 (config.json, model.bin).

Read only. Not supported: pickles, what ctranslate2.py does not read.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from path_jax.checkpoints.ctranslate2 import HEADS, CTranslate2File
from path_jax.checkpoints.folders import member, read_json
from path_jax.checkpoints.name_table import Row, check_layers, check_model, copied, dense, norm, number, read_params
from path_jax.checkpoints.names import OPS
from path_jax.checkpoints.shards import TensorFiles
from path_jax.models.whisper import WhisperConfig, abstract_params

_EMBEDDING = {"hf": "model.decoder.embed_tokens.weight", "ctranslate2": "decoder/embeddings/weight"}
_HEAD = {"hf": "proj_out.weight", "ctranslate2": "decoder/projection/weight"}
_SPECIAL = ("endoftext", "startoftranscript", "transcribe", "notimestamps")
_ENGLISH_EOS = 50256  # the vocabularies of multilingual models have one token more before it


class Decoding(NamedTuple):
    """What `path_jax.models.whisper.transcribe` takes besides model and speech."""

    prompt_ids: tuple[int, ...]
    eos_id: int
    suppress_ids: tuple[int, ...]
    begin_suppress_ids: tuple[int, ...]


def load_whisper(path: str | Path, dtype: str | None = None) -> tuple[WhisperConfig, dict[str, Any]]:
    """Loads a Whisper model.

    Args:
      path: A directory with config.json and safetensors files (Hugging Face) or model.bin (CTranslate2).
      dtype: Of the parameters and of the computation: "float32" (the default), "bfloat16" or "float16".

    Returns:
      The configuration and the parameters of `path_jax.models.whisper.Whisper`.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: for a model or a file that is not supported or damaged, or tensors that do not fit the configuration;
        the message lists them all.
    """
    path = Path(path)
    raw = read_json(member(path, "config.json"))
    if "model_type" not in raw and (path / "model.bin").exists():
        return _load("ctranslate2", path, CTranslate2File(member(path, "model.bin")), None, dtype)
    check_model(raw, "whisper", dict(activation_function="gelu", scale_embedding=False, tie_word_embeddings=True))
    with TensorFiles(path) as files:
        return _load("hf", path, files, raw, dtype)


def load_decoding(path: str | Path, language: str = "en") -> Decoding:
    """The special tokens of a model's directory: transcription without time stamps.

    Args:
      path: As for `load_whisper`, with a tokenizer.json beside it.
      language: Of the speech, by its code; models for English know no other.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is malformed, or the model does not know the language.
    """
    path = Path(path)
    added = read_json(member(path, "tokenizer.json")).get("added_tokens")
    try:
        ids = {entry["content"]: int(entry["id"]) for entry in added}
        eos_id, start, task, plain = (ids[f"<|{name}|>"] for name in _SPECIAL)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: tokenizer.json does not have the added_tokens of Whisper: {error!r:.100}") from None
    is_english = eos_id == _ENGLISH_EOS
    known = {"en"} if is_english else {name[2:-2] for name in ids if re.fullmatch(r"<\|[a-z]{2,3}\|>", name)}
    if language not in known:
        raise ValueError(f"{path}: the model does not know the language {language[:100]!r}")
    prompt_ids = (start, plain) if is_english else (start, ids[f"<|{language}|>"], task, plain)
    raw = read_json(member(path, "config.json"))
    if (path / "generation_config.json").exists():
        raw |= read_json(member(path, "generation_config.json"))
    lists = []
    for keys in (("suppress_ids", "suppress_tokens"), ("suppress_ids_begin", "begin_suppress_tokens")):
        values = next((raw[key] for key in keys if raw.get(key) is not None), [])
        if not isinstance(values, list) or not all(type(x) is int and x >= 0 for x in values):
            raise ValueError(f"{path}: {' or '.join(keys)} must be a list of token ids")
        lists.append(tuple(values))
    return Decoding(prompt_ids, eos_id, *lists)


def _load(kind: str, path: Path, files: Any, raw: dict[str, Any] | None, dtype: str | None):
    dtype = dtype or "float32"
    config = _ct2_config(files, dtype) if raw is None else _hf_config(raw, dtype)
    stored = dict(files.stored)
    check_layers(path, config.encoder_layers + config.decoder_layers, stored)
    # Some writers store the output projection although it is the embedding.
    is_tied = stored.pop(_HEAD[kind], None) is None or (
        _EMBEDDING[kind] in stored and np.array_equal(files.read(_HEAD[kind]), files.read(_EMBEDDING[kind]))
    )
    if not is_tied:
        raise ValueError(f"{path}: {_HEAD[kind]} differs from the embedding, to which Whisper ties it")
    rows = _ct2_rows(config) if raw is None else _hf_rows(config)
    return config, read_params(path, abstract_params(config), rows, stored, files.read, dtype)


def _hf_config(raw: dict[str, Any], dtype: str) -> WhisperConfig:
    sizes = ("vocab_size", "num_mel_bins", "max_source_positions", "max_target_positions")
    fields = {key: number(raw, key) for key in sizes}
    for side in ("encoder", "decoder"):
        theirs = (f"{side}_layers", f"{side}_attention_heads", f"{side}_ffn_dim")
        fields |= zip((f"{side}_layers", f"{side}_heads", f"{side}_mlp_dim"), [number(raw, key) for key in theirs])
    return WhisperConfig(**fields, embed_dim=number(raw, "d_model"), dtype=dtype)


def _hf_rows(config: WhisperConfig) -> list[Row]:
    rows = [
        *dense("conv1", "model.encoder.conv1"),  # [D, M, 3]; ours is [3, M, D]
        *dense("conv2", "model.encoder.conv2"),
        copied("source_positions", "model.encoder.embed_positions.weight"),
        *norm("encoder_norm", "model.encoder.layer_norm"),
        copied("embed/embedding", _EMBEDDING["hf"]),
        copied("position_embed/embedding", "model.decoder.embed_positions.weight"),
        *norm("final_norm", "model.decoder.layer_norm"),
    ]
    for side, i in _layers(config):
        ours, theirs = f"{side}_layers_{i}", f"model.{side}.layers.{i}"
        attentions = {"mixer": "self_attn"} | ({"cross": "encoder_attn"} if side == "decoder" else {})
        for name, attention in attentions.items():
            rows += norm(f"{ours}/{name}_norm", f"{theirs}.{attention}_layer_norm")
            rows += dense(f"{ours}/{name}/q_proj", f"{theirs}.{attention}.q_proj")
            rows.append(Row((f"{ours}/{name}/k_proj/kernel",), f"{theirs}.{attention}.k_proj.weight", OPS["transpose"]))
            rows += dense(f"{ours}/{name}/v_proj", f"{theirs}.{attention}.v_proj")
            rows += dense(f"{ours}/{name}/o_proj", f"{theirs}.{attention}.out_proj")
        rows += norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm")
        rows += dense(f"{ours}/mlp/up_proj", f"{theirs}.fc1") + dense(f"{ours}/mlp/down_proj", f"{theirs}.fc2")
    return rows


def _layers(config: WhisperConfig) -> list[tuple[str, int]]:
    sides = (("encoder", config.encoder_layers), ("decoder", config.decoder_layers))
    return [(side, i) for side, num_layers in sides for i in range(num_layers)]


def _ct2_config(file: CTranslate2File, dtype: str) -> WhisperConfig:
    vocab_size, embed_dim = file.shape(_EMBEDDING["ctranslate2"], 2)
    fields = {}
    for side, heads in zip(("encoder", "decoder"), HEADS):
        layers = {match[1] for name in file.stored if (match := re.match(rf"{side}/layer_(\d+)/", name))}
        mlp_dim, _ = file.shape(f"{side}/layer_0/ffn/linear_0/weight", 2)
        fields |= {f"{side}_layers": len(layers), f"{side}_heads": file.scalar(heads), f"{side}_mlp_dim": mlp_dim}
    return WhisperConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_mel_bins=file.shape("encoder/conv1/weight", 3)[1],
        max_source_positions=file.shape("encoder/position_encodings/encodings", 2)[0],
        max_target_positions=file.shape("decoder/position_encodings/encodings", 2)[0],
        dtype=dtype,
        **fields,
    )


def _ct2_rows(config: WhisperConfig) -> list[Row]:
    def projections(ours, theirs, letters):
        """One matrix of several projections, whose bias has zeros where keys have none."""
        kernels = tuple(f"{ours}/{x}_proj/kernel" for x in letters)
        biases = tuple(None if x == "k" else f"{ours}/{x}_proj/bias" for x in letters)
        return [Row(kernels, f"{theirs}/weight", OPS["transpose"]), Row(biases, f"{theirs}/bias", OPS["copy"])]

    def layer_norm(ours, theirs):
        return norm(ours, f"{theirs}/layer_norm", ("/gamma", "/beta"))

    rows = [
        Row(("conv1/kernel",), "encoder/conv1/weight", OPS["transpose"]),
        Row(("conv2/kernel",), "encoder/conv2/weight", OPS["transpose"]),
        *(copied(f"{name}/bias", f"encoder/{name}/bias") for name in ("conv1", "conv2")),
        copied("source_positions", "encoder/position_encodings/encodings"),
        *layer_norm("encoder_norm", "encoder"),
        copied("embed/embedding", _EMBEDDING["ctranslate2"]),
        copied("position_embed/embedding", "decoder/position_encodings/encodings"),
        *layer_norm("final_norm", "decoder"),
    ]
    for side, i in _layers(config):
        ours, theirs = f"{side}_layers_{i}", f"{side}/layer_{i}"
        attentions = {"mixer": ("self_attention", ("qkv", "o"))}
        attentions |= {"cross": ("attention", ("q", "kv", "o"))} if side == "decoder" else {}
        for name, (attention, parts) in attentions.items():
            rows += layer_norm(f"{ours}/{name}_norm", f"{theirs}/{attention}")
            for index, letters in enumerate(parts):
                rows += projections(f"{ours}/{name}", f"{theirs}/{attention}/linear_{index}", letters)
        rows += layer_norm(f"{ours}/mlp_norm", f"{theirs}/ffn")
        rows += projections(f"{ours}/mlp", f"{theirs}/ffn/linear_0", ("up",))
        rows += projections(f"{ours}/mlp", f"{theirs}/ffn/linear_1", ("down",))
    return rows
