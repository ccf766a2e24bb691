"""DecoderLM against logits of published implementations, from their own state dicts.

`fla_path_fox.npz`: PaTHAttentionForCausalLM of flash-linear-attention 0.5.2, with forget gate, grouped heads, a
full-rank w and tied embeddings. `fox_pro.npz`: the Pro model of the official Forgetting Transformer repository. Both
hold random float32 weights under the names of the publisher, tokens and the logits that its code computes for them.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.stacking import stack_layers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
MAX_ERROR = 2e-4  # of logits with standard deviation 2.6 (PaTH-FoX) and 1.6 (FoX Pro)
NOT_WEIGHTS = ("input_ids", "logits", "cu_seqlens", "logits_packed")

SHAPE = dict(vocab_size=256, num_layers=2, embed_dim=64, num_heads=4, mlp_dim=256)
CONFIGS = {
    "fla_path_fox": ModelConfig(
        **SHAPE,
        num_kv_heads=2,
        mixer="path_fox",
        mixer_options=dict(w_rank=None, gate_scale=None),
        tie_embeddings=True,
    ),
    "fox_pro": ModelConfig(
        **SHAPE,
        mixer="fox",
        mixer_options=dict(kv_shift=True, qk_norm="head", output_norm=True, output_gate=True),
    ),
}

# Our name -> theirs, outside the layers, in every layer, and by model.
OUTSIDE = {"embed/embedding": "model.embeddings.weight", "final_norm/scale": "model.norm.weight"}
LAYER = {
    "mixer_norm/scale": "attn_norm.weight",
    "mixer/q_proj/kernel": "attn.q_proj.weight",
    "mixer/o_proj/kernel": "attn.o_proj.weight",
    "mlp_norm/scale": "mlp_norm.weight",
    "mlp/gate_proj/kernel": "mlp.gate_proj.weight",
    "mlp/up_proj/kernel": "mlp.up_proj.weight",
    "mlp/down_proj/kernel": "mlp.down_proj.weight",
}
LAYER_OF = {
    "fla_path_fox": {
        "mixer/k_proj/kernel": "attn.k_proj.weight",
        "mixer/v_proj/kernel": "attn.v_proj.weight",
        "mixer/w_proj/kernel": "attn.w_proj.weight",
        "mixer/w_conv/kernel": "attn.w_conv1d.weight",
        "mixer/beta_proj/kernel": "attn.bt_proj.weight",
        "mixer/beta_proj/bias": "attn.bt_proj.bias",
        "mixer/forget_proj/kernel": "attn.g_proj.weight",
        "mixer/forget_proj/bias": "attn.g_proj.bias",
    },
    "fox_pro": {
        "mixer/k_proj/kernel": "attn.k_proj.linear.weight",
        "mixer/v_proj/kernel": "attn.v_proj.linear.weight",
        "mixer/k_shift_proj/kernel": "attn.k_proj.shift_proj.weight",
        "mixer/v_shift_proj/kernel": "attn.v_proj.shift_proj.weight",
        "mixer/forget_proj/kernel": "attn.fgate_proj.weight",
        "mixer/forget_proj/bias": "attn.fgate_proj.bias",
        "mixer/q_norm/scale": "attn.q_norm.weight",
        "mixer/k_norm/scale": "attn.k_norm.weight",
        "mixer/output_norm/scale": "attn.output_norm.weight",
        "mixer/output_gate_proj/kernel": "attn.ogate_proj.weight",
    },
}


def converted(name, weights):
    """Their weights as our unrolled tree; every one of them must find a place."""
    weights = {key: value for key, value in weights.items() if key not in NOT_WEIGHTS}
    for i in range(SHAPE["num_layers"]):  # the official FoX keeps gate and up projection in one matrix, gate first
        fused = f"model.layers.{i}.mlp.gate_proj.weight"
        if len(weights[fused]) == 2 * SHAPE["mlp_dim"]:
            weights[fused], weights[f"model.layers.{i}.mlp.up_proj.weight"] = np.split(weights[fused], 2)
    table = dict(OUTSIDE)
    if not CONFIGS[name].tie_embeddings:
        table["lm_head/kernel"] = "lm_head.weight"
    for i in range(SHAPE["num_layers"]):
        for ours, theirs in (LAYER | LAYER_OF[name]).items():
            table[f"layers_{i}/{ours}"] = f"model.layers.{i}.{theirs}"
    assert sorted(table.values()) == sorted(weights)

    params = {}
    for ours, theirs in table.items():
        value = weights[theirs]
        if ours.endswith("kernel"):  # [out, in] -> [in, out]; a convolution [C, 1, W] -> [W, C], taps oldest first
            value = value.reshape(value.shape[0], value.shape[-1]).T
        *folders, leaf = ours.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jnp.asarray(value)
    return params


def check(name, golden, params, expected, segment_ids=None):
    apply = jax.jit(DecoderLM(CONFIGS[name]).apply)
    logits = apply({"params": params}, golden["input_ids"], segment_ids=segment_ids).logits
    assert logits.shape == expected.shape
    assert np.abs(np.asarray(logits) - expected).max() <= MAX_ERROR


def load(name):
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    return golden, stack_layers(converted(name, golden))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name):
    golden, params = load(name)
    ours = jax.eval_shape(DecoderLM(CONFIGS[name]).init, jax.random.key(0), golden["input_ids"])["params"]
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert shapes(params) == shapes(ours)
    check(name, golden, params, golden["logits"])


def test_packed_logits():
    """Their cumulative lengths [0, a, b, ...] are our documents 1 (tokens 0 ... a - 1), 2 (a ... b - 1), ..."""
    golden, params = load("fla_path_fox")
    lengths = np.diff(golden["cu_seqlens"])
    segment_ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    check("fla_path_fox", golden, params, golden["logits_packed"], segment_ids)
    assert np.abs(golden["logits_packed"] - golden["logits"]).max() > 1  # the documents matter
