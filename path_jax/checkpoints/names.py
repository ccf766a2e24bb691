"""Parameter names of published checkpoints, as one table per format that import and export both read.

A row is `(ours, theirs, op)`. `{}` stands for the layer in both names. Several of ours are stored as one array, joined
along their last axis, which is the output axis of a kernel. A row applies where the model has the parameter, so
optional parts (gates, norms, biases, an untied output projection) need no conditions.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from path_jax.models import ModelConfig
from path_jax.models.decoder_lm import abstract_params
from path_jax.parallel.sharding import path_name

_MAX_LISTED = 20  # names in an error message, per kind


class Op(NamedTuple):
    """How one array is stored: functions of (array, head dim) in both directions."""

    to_ours: Callable
    to_theirs: Callable


OPS = {
    "copy": Op(lambda x, _: x, lambda x, _: x),
    "transpose": Op(lambda x, _: x.T, lambda x, _: x.T),  # [out, in] of torch.nn.Linear; ours is [in, out]
    "conv": Op(lambda x, _: x[:, 0].T, lambda x, _: x.T[:, None]),  # [C, 1, W], taps oldest first; ours is [W, C]
    # GGUF turns neighbouring pairs of a head's rows, we turn its halves: [heads, H/2, 2, in] and [heads, 2, H/2, in].
    "rotary_rows": Op(
        lambda x, h: x.reshape(-1, h // 2, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape).T,
        lambda x, h: x.T.reshape(-1, 2, h // 2, x.shape[0]).swapaxes(1, 2).reshape(x.shape[::-1]),
    ),
}

_FLA = (
    ("embed/embedding", "model.embeddings.weight", "copy"),
    ("final_norm/scale", "model.norm.weight", "copy"),
    ("lm_head/kernel", "lm_head.weight", "transpose"),
    ("layers_{}/mixer_norm/scale", "model.layers.{}.attn_norm.weight", "copy"),
    ("layers_{}/mixer/q_proj/kernel", "model.layers.{}.attn.q_proj.weight", "transpose"),
    ("layers_{}/mixer/o_proj/kernel", "model.layers.{}.attn.o_proj.weight", "transpose"),
    ("layers_{}/mlp_norm/scale", "model.layers.{}.mlp_norm.weight", "copy"),
    ("layers_{}/mlp/down_proj/kernel", "model.layers.{}.mlp.down_proj.weight", "transpose"),
)
_FLA_KV = (
    ("layers_{}/mixer/k_proj/kernel", "model.layers.{}.attn.k_proj.weight", "transpose"),
    ("layers_{}/mixer/v_proj/kernel", "model.layers.{}.attn.v_proj.weight", "transpose"),
)
_FLA_MLP = (
    ("layers_{}/mlp/gate_proj/kernel", "model.layers.{}.mlp.gate_proj.weight", "transpose"),
    ("layers_{}/mlp/up_proj/kernel", "model.layers.{}.mlp.up_proj.weight", "transpose"),
)
_FOX = _FLA + (
    (
        ("layers_{}/mlp/gate_proj/kernel", "layers_{}/mlp/up_proj/kernel"),
        "model.layers.{}.mlp.gate_proj.weight",
        "transpose",
    ),
    ("layers_{}/mixer/forget_proj/kernel", "model.layers.{}.attn.fgate_proj.weight", "transpose"),
    ("layers_{}/mixer/forget_proj/bias", "model.layers.{}.attn.fgate_proj.bias", "copy"),
    ("layers_{}/mixer/forget_bias", "model.layers.{}.attn.fgate_bias", "copy"),
    ("layers_{}/mixer/q_norm/scale", "model.layers.{}.attn.q_norm.weight", "copy"),
    ("layers_{}/mixer/k_norm/scale", "model.layers.{}.attn.k_norm.weight", "copy"),
    ("layers_{}/mixer/output_norm/scale", "model.layers.{}.attn.output_norm.weight", "copy"),
    ("layers_{}/mixer/output_gate_proj/kernel", "model.layers.{}.attn.ogate_proj.weight", "transpose"),
)
_GPT2_QKV = tuple(f"layers_{{}}/mixer/{x}_proj/" for x in "qkv")

# Of a `Dialect` (dialects.py), by its `table`.
TABLES = {
    "fla_path": _FLA + _FLA_KV + _FLA_MLP + (
        ("layers_{}/mixer/w_proj/kernel", "model.layers.{}.attn.w_proj.weight", "transpose"),
        ("layers_{}/mixer/w_proj_down/kernel", "model.layers.{}.attn.w_proj.0.weight", "transpose"),
        ("layers_{}/mixer/w_proj_up/kernel", "model.layers.{}.attn.w_proj.1.weight", "transpose"),
        ("layers_{}/mixer/w_conv/kernel", "model.layers.{}.attn.w_conv1d.weight", "conv"),
        ("layers_{}/mixer/beta_proj/kernel", "model.layers.{}.attn.bt_proj.weight", "transpose"),
        ("layers_{}/mixer/beta_proj/bias", "model.layers.{}.attn.bt_proj.bias", "copy"),
        ("layers_{}/mixer/forget_proj/kernel", "model.layers.{}.attn.g_proj.weight", "transpose"),
        ("layers_{}/mixer/forget_proj/bias", "model.layers.{}.attn.g_proj.bias", "copy"),
        ("layers_{}/mixer/q_norm/scale", "model.layers.{}.attn.maybe_q_norm.weight", "copy"),
        ("layers_{}/mixer/k_norm/scale", "model.layers.{}.attn.maybe_k_norm.weight", "copy"),
    ),
    "fla_fox": _FLA + _FLA_KV + _FLA_MLP + (
        ("layers_{}/mixer/q_proj/bias", "model.layers.{}.attn.q_proj.bias", "copy"),
        ("layers_{}/mixer/k_proj/bias", "model.layers.{}.attn.k_proj.bias", "copy"),
        ("layers_{}/mixer/v_proj/bias", "model.layers.{}.attn.v_proj.bias", "copy"),
        ("layers_{}/mixer/forget_proj/kernel", "model.layers.{}.attn.f_proj.weight", "transpose"),
        ("layers_{}/mixer/forget_proj/bias", "model.layers.{}.attn.f_proj.bias", "copy"),
        ("layers_{}/mixer/output_gate_proj/kernel", "model.layers.{}.attn.g_proj.weight", "transpose"),
        ("layers_{}/mixer/q_norm/scale", "model.layers.{}.attn.q_norm.weight", "copy"),
        ("layers_{}/mixer/k_norm/scale", "model.layers.{}.attn.k_norm.weight", "copy"),
    ),
    "fox": _FOX + _FLA_KV,
    "fox_shift": _FOX + (
        ("layers_{}/mixer/k_proj/kernel", "model.layers.{}.attn.k_proj.linear.weight", "transpose"),
        ("layers_{}/mixer/v_proj/kernel", "model.layers.{}.attn.v_proj.linear.weight", "transpose"),
        ("layers_{}/mixer/k_shift_proj/kernel", "model.layers.{}.attn.k_proj.shift_proj.weight", "transpose"),
        ("layers_{}/mixer/v_shift_proj/kernel", "model.layers.{}.attn.v_proj.shift_proj.weight", "transpose"),
    ),
    "llama": (
        ("embed/embedding", "model.embed_tokens.weight", "copy"),
        ("final_norm/scale", "model.norm.weight", "copy"),
        ("lm_head/kernel", "lm_head.weight", "transpose"),
        ("layers_{}/mixer_norm/scale", "model.layers.{}.input_layernorm.weight", "copy"),
        ("layers_{}/mixer/q_proj/kernel", "model.layers.{}.self_attn.q_proj.weight", "transpose"),
        ("layers_{}/mixer/k_proj/kernel", "model.layers.{}.self_attn.k_proj.weight", "transpose"),
        ("layers_{}/mixer/v_proj/kernel", "model.layers.{}.self_attn.v_proj.weight", "transpose"),
        ("layers_{}/mixer/o_proj/kernel", "model.layers.{}.self_attn.o_proj.weight", "transpose"),
        ("layers_{}/mixer/q_proj/bias", "model.layers.{}.self_attn.q_proj.bias", "copy"),
        ("layers_{}/mixer/k_proj/bias", "model.layers.{}.self_attn.k_proj.bias", "copy"),
        ("layers_{}/mixer/v_proj/bias", "model.layers.{}.self_attn.v_proj.bias", "copy"),
        ("layers_{}/mixer/o_proj/bias", "model.layers.{}.self_attn.o_proj.bias", "copy"),
        ("layers_{}/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight", "copy"),
        ("layers_{}/mlp/gate_proj/kernel", "model.layers.{}.mlp.gate_proj.weight", "transpose"),
        ("layers_{}/mlp/up_proj/kernel", "model.layers.{}.mlp.up_proj.weight", "transpose"),
        ("layers_{}/mlp/down_proj/kernel", "model.layers.{}.mlp.down_proj.weight", "transpose"),
    ),
    "gpt2": (
        ("embed/embedding", "transformer.wte.weight", "copy"),
        ("position_embed/embedding", "transformer.wpe.weight", "copy"),
        ("final_norm/scale", "transformer.ln_f.weight", "copy"),
        ("final_norm/bias", "transformer.ln_f.bias", "copy"),
        ("lm_head/kernel", "lm_head.weight", "transpose"),
        ("layers_{}/mixer_norm/scale", "transformer.h.{}.ln_1.weight", "copy"),
        ("layers_{}/mixer_norm/bias", "transformer.h.{}.ln_1.bias", "copy"),
        (tuple(x + "kernel" for x in _GPT2_QKV), "transformer.h.{}.attn.c_attn.weight", "copy"),
        (tuple(x + "bias" for x in _GPT2_QKV), "transformer.h.{}.attn.c_attn.bias", "copy"),
        ("layers_{}/mixer/o_proj/kernel", "transformer.h.{}.attn.c_proj.weight", "copy"),
        ("layers_{}/mixer/o_proj/bias", "transformer.h.{}.attn.c_proj.bias", "copy"),
        ("layers_{}/mlp_norm/scale", "transformer.h.{}.ln_2.weight", "copy"),
        ("layers_{}/mlp_norm/bias", "transformer.h.{}.ln_2.bias", "copy"),
        ("layers_{}/mlp/up_proj/kernel", "transformer.h.{}.mlp.c_fc.weight", "copy"),
        ("layers_{}/mlp/up_proj/bias", "transformer.h.{}.mlp.c_fc.bias", "copy"),
        ("layers_{}/mlp/down_proj/kernel", "transformer.h.{}.mlp.c_proj.weight", "copy"),
        ("layers_{}/mlp/down_proj/bias", "transformer.h.{}.mlp.c_proj.bias", "copy"),
    ),
    "gguf": (
        ("embed/embedding", "token_embd.weight", "copy"),
        ("final_norm/scale", "output_norm.weight", "copy"),
        ("lm_head/kernel", "output.weight", "transpose"),
        ("layers_{}/mixer_norm/scale", "blk.{}.attn_norm.weight", "copy"),
        ("layers_{}/mixer/q_proj/kernel", "blk.{}.attn_q.weight", "rotary_rows"),
        ("layers_{}/mixer/k_proj/kernel", "blk.{}.attn_k.weight", "rotary_rows"),
        ("layers_{}/mixer/v_proj/kernel", "blk.{}.attn_v.weight", "transpose"),
        ("layers_{}/mixer/o_proj/kernel", "blk.{}.attn_output.weight", "transpose"),
        ("layers_{}/mlp_norm/scale", "blk.{}.ffn_norm.weight", "copy"),
        ("layers_{}/mlp/gate_proj/kernel", "blk.{}.ffn_gate.weight", "transpose"),
        ("layers_{}/mlp/up_proj/kernel", "blk.{}.ffn_up.weight", "transpose"),
        ("layers_{}/mlp/down_proj/kernel", "blk.{}.ffn_down.weight", "transpose"),
    ),
}  # fmt: skip
# Tensors that some writers add and that hold no parameters: causal masks, frequencies.
BUFFERS = {"gpt2": r"transformer\.h\.\d+\.attn\.(masked_)?bias", "llama": r".*\.rotary_emb\.inv_freq"}
# Part of every name that some writers leave out.
PREFIXES = {"gpt2": "transformer."}


class Tensor(NamedTuple):
    """One foreign tensor: its name and shape, and the parameters that it holds."""

    theirs: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    op: Op


def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape} of the unrolled tree. One layer is traced, however many there are."""
    tree = abstract_params(dataclasses.replace(config, num_layers=1, scan_layers=False))
    shapes = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    layer = {name.removeprefix("layers_0"): x for name, x in shapes.items() if name.startswith("layers_0/")}
    rest = {name: x for name, x in shapes.items() if not name.startswith("layers_0/")}
    return rest | {f"layers_{i}{name}": x for i in range(config.num_layers) for name, x in layer.items()}


def tensors_of(config: ModelConfig, table: str) -> list[Tensor]:
    """Returns the foreign tensors that a model consists of.

    Raises:
      ValueError: for a parameter that the format has no name for.
    """
    shapes = parameter_shapes(config)
    tensors, placed = [], set()
    for ours, theirs, op in TABLES[table]:
        ours = (ours,) if isinstance(ours, str) else ours
        parts = [shapes.get(name.format(0)) for name in ours]  # all layers are alike
        if None in parts:
            continue
        joined = jax.ShapeDtypeStruct((*parts[0].shape[:-1], sum(x.shape[-1] for x in parts)), jnp.float32)
        shape = jax.eval_shape(lambda x: OPS[op].to_theirs(x, config.head_dim), joined).shape
        for i in range(config.num_layers if "{}" in theirs else 1):
            names = tuple(name.format(i) for name in ours)
            tensors.append(Tensor(theirs.format(i), shape, names, OPS[op]))
            placed.update(names)
    if missing := sorted(set(shapes) - placed):
        raise ValueError(f"the names of {table} have no place for {_listed(missing)}")
    return tensors


def check_stored(
    where: Any, tensors: Iterable[Tensor], stored: Mapping[str, tuple[tuple[int, ...], str | None]]
) -> None:
    """Compares what a checkpoint holds with what a model needs.

    Args:
      where: Named in the error.
      tensors: Of the model.
      stored: {foreign name: (shape, None or why its type cannot be read)}.

    Raises:
      ValueError: listing every tensor that is missing, superfluous, or of another shape or type.
    """
    expected = {tensor.theirs: tensor.shape for tensor in tensors}
    wrong = [
        f"{name} {stored[name][0]}" + (f" {stored[name][1]}" if stored[name][1] else f" (the model's is {shape})")
        for name, shape in expected.items()
        if name in stored and (stored[name][0] != shape or stored[name][1])
    ]
    problems = {
        "missing there": [f"{name} {shape}" for name, shape in expected.items() if name not in stored],
        "unknown to the model": [f"{name} {shape}" for name, (shape, _) in stored.items() if name not in expected],
        "of another shape or type": wrong,
    }
    if any(problems.values()):
        raise ValueError(
            f"{where} does not fit the model of its configuration; "
            + "; ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items())
        )


def import_params(
    config: ModelConfig,
    tensors: Iterable[Tensor],
    read: Callable[[str], np.ndarray],
    place: Callable[[str, np.ndarray], jax.Array],
) -> dict[str, Any]:
    """Builds the unrolled parameter tree, one foreign tensor in memory at a time.

    Args:
      config: The model.
      tensors: Its foreign tensors.
      read: Returns a foreign tensor by name.
      place: Turns one of our parameters (name, host array) into an array on devices.
    """
    params: dict[str, Any] = {}
    shapes = parameter_shapes(config)
    for tensor in tensors:
        value = tensor.op.to_ours(read(tensor.theirs), config.head_dim)
        edges = np.cumsum([shapes[name].shape[-1] for name in tensor.ours])[:-1]
        for name, part in zip(tensor.ours, np.split(value, edges, axis=-1), strict=True):
            *folders, leaf = name.split("/")
            node = params
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = place(name, part)
    return params


def export_params(
    config: ModelConfig, tensors: Iterable[Tensor], params: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (foreign name, host array) of every tensor, in the parameters' own dtypes.

    Raises:
      ValueError: listing parameters that are missing, superfluous or of another shape.
    """
    flat = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    ours, expected = (
        {f"{name} {tuple(x.shape)}" for name, x in tree.items()} for tree in (flat, parameter_shapes(config))
    )
    if ours != expected:
        raise ValueError(
            f"the parameters are not those of the configuration; only given: {_listed(sorted(ours - expected))}; "
            f"only in the model: {_listed(sorted(expected - ours))}"
        )
    for tensor in tensors:
        parts = [np.asarray(jax.device_get(flat[name])) for name in tensor.ours]
        value = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        yield tensor.theirs, np.ascontiguousarray(tensor.op.to_theirs(value, config.head_dim))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(re.sub(r"[^\x20-\x7e]", "?", name)[:200] for name in names[:_MAX_LISTED]) + more or "none"
