"""What config.json of a published checkpoint says about the model, and the reverse.

A key whose value would change the model into one that we do not have is refused by name. Execution options (fused
kernels, dropout, cache) are not read.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from path_jax.models import ModelConfig

FORMATS = ("fla", "fox", "hf")
# Fields that say how a model runs rather than which it is.
_EXECUTION = ("scan_layers", "remat", "dtype", "implementation", "prune", "round_directions", "name", "parent")
_MAX_INTEGER = 2**31 - 1
_MAX_FLOAT = 1e30  # products with integers stay finite


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The configuration of one foreign model class.

    Attributes:
      format: A value of save_pretrained's `format`.
      architecture: The class, written into config.json.
      mixers: Values of ModelConfig.mixer that it can hold.
      table: Model -> key of `names.TABLES`.
      fields: {field of ModelConfig: key}.
      read: config.json, with defaults filled in -> further fields of ModelConfig.
      write: Model and its mixer -> further keys.
      defaults: Values of the keys that may be left out.
      fixed: {key: values under which the model is ours}; the first is written.
      constants: Further fields of ModelConfig, the same in every model of the class.
    """

    format: str
    architecture: str
    mixers: tuple[str, ...]
    table: Callable[[ModelConfig], str]
    fields: Mapping[str, str]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig, Any], dict[str, Any]]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _get(raw: Mapping[str, Any], key: str, kind: type, optional: bool = False) -> Any:
    """raw[key] of the type `kind`; integers are positive.

    Raises:
      ValueError: if it is missing or something else.
    """
    value = raw.get(key)
    if optional and value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and 0 < value <= _MAX_FLOAT:
        return float(value)
    if kind is int and is_number and 0 < value <= _MAX_INTEGER and value == int(value):
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    expected = {int: "a positive integer", float: "a positive number", bool: "true or false"}[kind]
    raise ValueError(f"config.json: {key} is {repr(value)[:100]}; it must be {expected}")


def _gated_width(raw: Mapping[str, Any]) -> int:
    """FLA's width of a gated MLP: two thirds of hidden_ratio times the model width, rounded up to 256."""
    if raw["intermediate_size"] is not None:
        return _get(raw, "intermediate_size", int)
    width = int(_get(raw, "hidden_size", int) * _get(raw, "hidden_ratio", float) * 2 / 3)
    return 256 * -(-width // 256)


def _read_path(raw):
    has_gate = _get(raw, "use_forget_gate", bool)
    options = dict(
        w_rank=32 if _get(raw, "use_low_rank_w", bool) else None,
        conv_size=_get(raw, "conv_size", int) if _get(raw, "use_w_shortconv", bool) else 0,
        qk_norm=_get(raw, "use_qk_norm", bool),
    )
    if has_gate:
        options["gate_scale"] = None  # FLA scales gate and logits alike
    return dict(mixer="path_fox" if has_gate else "path", mixer_options=options, mlp_dim=_gated_width(raw))


def _write_path(config, mixer):
    keys = dict(
        use_forget_gate=mixer.forget_gate,
        use_low_rank_w=mixer.w_rank is not None,
        use_w_shortconv=mixer.conv_size > 0,
        intermediate_size=config.mlp_dim,
    )
    # FLA's layer has these arguments, its configuration does not: written only where they matter.
    keys |= dict(use_qk_norm=True) if mixer.qk_norm else {}
    return keys | (dict(conv_size=mixer.conv_size) if mixer.conv_size not in (0, 3) else {})


def _read_fla_fox(raw):
    options = dict(
        qkv_bias=_get(raw, "qkv_bias", bool),
        qk_norm="head" if _get(raw, "qk_norm", bool) else "none",
        output_gate=_get(raw, "use_output_gate", bool),
    )
    return dict(mixer="fox", mixer_options=options, mlp_dim=_gated_width(raw))


def _write_fla_fox(config, mixer):
    keys = dict(qkv_bias=mixer.qkv_bias, qk_norm=mixer.qk_norm != "none", use_output_gate=mixer.output_gate)
    return keys | dict(intermediate_size=config.mlp_dim)


def _read_fox(raw):
    is_shared, has_shift = (_get(raw, key, bool) for key in ("qk_norm_share_param_across_head", "use_k_shift"))
    if _get(raw, "use_v_shift", bool) != has_shift:
        raise ValueError("config.json: use_k_shift and use_v_shift differ; they are supported together only")
    options = dict(
        gate=raw["fgate_type"],
        kv_shift=has_shift,
        qk_norm=("shared" if is_shared else "head") if _get(raw, "qk_norm", bool) else "none",
        output_norm=_get(raw, "use_output_norm", bool),
        output_gate=_get(raw, "use_output_gate", bool),
        rope_theta=_get(raw, "rope_base", float) if _get(raw, "use_rope", bool) else None,
        norm_eps=_get(raw, "norm_eps", float),
    )
    return dict(mixer="fox", mixer_options=options, mlp_dim=_gated_width(raw))


def _write_fox(config, mixer):
    return dict(
        fgate_type=mixer.gate,
        use_k_shift=mixer.kv_shift,
        use_v_shift=mixer.kv_shift,
        qk_norm=mixer.qk_norm != "none",
        qk_norm_share_param_across_head=mixer.qk_norm == "shared",
        use_output_norm=mixer.output_norm,
        use_output_gate=mixer.output_gate,
        use_rope=mixer.rope_theta is not None,
        rope_base=mixer.rope_theta or 500000.0,
        intermediate_size=config.mlp_dim,
    )


def _read_llama(raw):
    """The base of the rotary embedding is `rope_theta`, or inside `rope_parameters` from transformers 5 on."""
    thetas = {_get(raw, "rope_theta", float)} if raw.get("rope_theta") is not None else set()
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"config.json: {key} must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(
                f"config.json: {key} {str(dict(rope))[:200]} is not supported; only rope_type 'default' is"
            )
        thetas |= {_get(rope, "rope_theta", float)} if "rope_theta" in rope else set()
    if len(thetas) > 1:
        raise ValueError(f"config.json: rope_theta is given as {sorted(thetas)}; it must be one number")
    has_bias = _get(raw, "attention_bias", bool)
    options = dict(rope_theta=(thetas or {10000.0}).pop(), qkv_bias=has_bias, o_bias=has_bias)
    return dict(mixer="rope", mixer_options=options, mlp_dim=_get(raw, "intermediate_size", int))


def _write_llama(config, mixer):
    return dict(
        intermediate_size=config.mlp_dim,
        attention_bias=mixer.qkv_bias,
        # transformers 4 reads the first, transformers 5 the second.
        rope_theta=mixer.rope_theta,
        rope_parameters=dict(rope_theta=mixer.rope_theta, rope_type="default"),
    )


def _read_gpt2(raw):
    width = _get(raw, "n_inner", int, optional=True) or 4 * _get(raw, "n_embd", int)
    return dict(mixer="nope", mixer_options=dict(qkv_bias=True, o_bias=True), mlp_dim=width)


_FLA_FIELDS = dict(
    vocab_size="vocab_size",
    num_layers="num_hidden_layers",
    embed_dim="hidden_size",
    num_heads="num_heads",
    num_kv_heads="num_kv_heads",
    tie_embeddings="tie_word_embeddings",
    norm_eps="norm_eps",
)
_FLA_DEFAULTS = dict(
    num_kv_heads=None, tie_word_embeddings=False, norm_eps=1e-6, intermediate_size=None, hidden_ratio=4
)
_FLA_FIXED = dict(hidden_act=("swish", "silu"), elementwise_affine=(True,), quantization_config=(None,))

# By `model_type` of config.json.
DIALECTS = {
    "path_attn": Dialect(
        format="fla",
        architecture="PaTHAttentionForCausalLM",
        mixers=("path", "path_fox"),
        table=lambda _: "fla_path",
        fields=_FLA_FIELDS,
        read=_read_path,
        write=_write_path,
        defaults=_FLA_DEFAULTS
        | dict(use_forget_gate=False, use_w_shortconv=True, use_low_rank_w=True, use_qk_norm=False, conv_size=3),
        fixed=_FLA_FIXED | dict(attnres_block_size=(None,)),
    ),
    "forgetting_transformer": Dialect(
        format="fla",
        architecture="ForgettingTransformerForCausalLM",
        mixers=("fox",),
        table=lambda _: "fla_fox",
        fields=_FLA_FIELDS,
        read=_read_fla_fox,
        write=_write_fla_fox,
        defaults=_FLA_DEFAULTS | dict(qkv_bias=False, qk_norm=False, use_output_gate=False),
        # FLA passes the window to its cache but not to its attention, so such a model is not one function.
        fixed=_FLA_FIXED | dict(attnres_block_size=(None,), window_size=(None,)),
    ),
    "forgetting_transformer-project_fox": Dialect(
        format="fox",
        architecture="ForgettingTransformerForCausalLM",
        mixers=("fox", "rope", "nope"),
        table=lambda config: "fox_shift" if config.mixer_options.get("kv_shift") else "fox",
        fields={key: value for key, value in _FLA_FIELDS.items() if key != "num_kv_heads"},
        read=_read_fox,
        write=_write_fox,
        defaults={key: value for key, value in _FLA_DEFAULTS.items() if key != "num_kv_heads"}
        | dict.fromkeys(
            ("use_k_shift", "use_v_shift", "qk_norm", "qk_norm_share_param_across_head", "use_output_norm",
             "use_output_gate", "use_rope"), False,
        )
        | dict(fgate_type="full", rope_base=500000.0),
        fixed=_FLA_FIXED
        | dict(
            fgate_type=("full", "bias_only", "none"), num_kv_heads=(None,), window_size=(None,),
            attention_bias=(False,), ogate_act=("sigmoid",),
        ),
    ),
    "llama": Dialect(
        format="hf",
        architecture="LlamaForCausalLM",
        mixers=("rope",),
        table=lambda _: "llama",
        fields=dict(
            vocab_size="vocab_size",
            num_layers="num_hidden_layers",
            embed_dim="hidden_size",
            num_heads="num_attention_heads",
            num_kv_heads="num_key_value_heads",
            head_dim="head_dim",
            tie_embeddings="tie_word_embeddings",
            norm_eps="rms_norm_eps",
        ),
        read=_read_llama,
        write=_write_llama,
        defaults=dict(
            num_key_value_heads=None, head_dim=None, tie_word_embeddings=False, rms_norm_eps=1e-6, attention_bias=False
        ),
        fixed=dict(
            hidden_act=("silu", "swish"), mlp_bias=(False,), partial_rotary_factor=(None, 1),
            quantization_config=(None,),
        ),
    ),
    "gpt2": Dialect(
        format="hf",
        architecture="GPT2LMHeadModel",
        mixers=("nope",),
        table=lambda _: "gpt2",
        fields=dict(
            vocab_size="vocab_size",
            num_layers="n_layer",
            embed_dim="n_embd",
            num_heads="n_head",
            num_positions="n_positions",
            tie_embeddings="tie_word_embeddings",
            norm_eps="layer_norm_epsilon",
        ),
        read=_read_gpt2,
        write=lambda config, mixer: dict(n_inner=config.mlp_dim),
        defaults=dict(n_inner=None, tie_word_embeddings=True, layer_norm_epsilon=1e-5),
        fixed=dict(
            activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,), quantization_config=(None,),
        ),
        constants=dict(norm="layer", mlp="gelu"),
    ),
}  # fmt: skip
_KINDS = {"tie_embeddings": bool, "norm_eps": float}


def find_dialect(raw: Mapping[str, Any]) -> Dialect:
    """Returns the dialect of a config.json.

    Raises:
      ValueError: listing what is supported.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in DIALECTS:
        raise ValueError(f"config.json: model_type {repr(model_type)[:100]} is not one of {', '.join(DIALECTS)}")
    return DIALECTS[model_type]


def read_dialect(raw: Mapping[str, Any]) -> ModelConfig:
    """Returns the model that a config.json describes, unrolled and in float32.

    Raises:
      ValueError: for a model that we do not have, or a malformed value, naming the key.
    """
    dialect = find_dialect(raw)
    raw = {**dialect.defaults, **raw}
    for key, allowed in dialect.fixed.items():
        if key in raw and raw[key] not in allowed:
            raise ValueError(
                f"config.json: {key}={repr(raw[key])[:100]} is not supported; it must be "
                f"{' or '.join(repr(value) for value in allowed)}"
            )
    optional = {key for key, value in dialect.defaults.items() if value is None}
    fields = {
        ours: _get(raw, theirs, _KINDS.get(ours, int), theirs in optional) for ours, theirs in dialect.fields.items()
    }
    return ModelConfig(**fields, **dialect.read(raw), **dialect.constants, scan_layers=False)


def write_dialect(config: ModelConfig, format: str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns a config.json for the model.

    Args:
      config: The model.
      format: One of FORMATS.
      extra: Further keys; those that describe the model win over them.

    Raises:
      ValueError: if the format has no such model, naming what it cannot hold.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose from {', '.join(FORMATS)}, native")
    candidates = {key: x for key, x in DIALECTS.items() if x.format == format and config.mixer in x.mixers}
    if not candidates:
        held = sorted({mixer for x in DIALECTS.values() if x.format == format for mixer in x.mixers})
        raise ValueError(f"format {format!r} holds the mixers {', '.join(held)}; this model has {config.mixer!r}")
    (model_type, dialect), *_ = candidates.items()
    raw = dict(extra or {})
    raw |= dict(model_type=model_type, architectures=[dialect.architecture])
    raw |= {key: allowed[0] for key, allowed in dialect.fixed.items() if allowed[0] is not None or key in raw}
    raw |= {theirs: getattr(config, ours) for ours, theirs in dialect.fields.items()}
    raw |= dialect.write(config, config.make_mixer())
    there, here = _essentials(read_dialect(raw)), _essentials(config)
    if there != here:
        differences = [
            f"{key}={here.get(key)!r} (there {there.get(key)!r})"
            for key in sorted(here.keys() | there.keys())
            if here.get(key) != there.get(key)
        ]
        raise ValueError(f"format {format!r} cannot hold this model: {', '.join(differences)}")
    return raw


def _essentials(config: ModelConfig) -> dict[str, Any]:
    """What determines the function of the parameters, with defaults filled in and what has no effect left out."""
    mixer = config.make_mixer()
    fields = lambda x, prefix: {
        f"{prefix}{field.name}": getattr(x, field.name)
        for field in dataclasses.fields(x)
        if field.name not in _EXECUTION and not field.name.startswith("mixer")
    }
    result = fields(config, "") | fields(mixer, "mixer.") | {"mixer": type(mixer).__name__}
    if result["mixer.gate_scale"] is None:
        result["mixer.gate_scale"] = config.head_dim**-0.5
    if result.get("mixer.gate") == "none" or result.get("mixer.forget_gate") is False:
        del result["mixer.gate_scale"]
    if result.get("mixer.gate") != "fixed":  # "bias_only" starts from the time scales, then learns
        result.pop("mixer.gate_timescales", None)
    if result.get("mixer.output_norm") is False:
        del result["mixer.norm_eps"]
    return result
