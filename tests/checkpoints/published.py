"""Llama and GPT-2 written out in numpy float64 from their published descriptions, on the tensors of a checkpoint."""

import numpy as np


def softmax_attention(q, k, v):
    """Causal attention of [T, N, H] queries over [T, K, H] keys, K dividing N; returns [T, N * H]."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, repeats, axis=1) for x in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v).reshape(len(q), -1)


def rotate(x, theta):
    """Turns the pair (x_i, x_{i + H/2}) of the token at position t by t * theta^(-2 i / H)."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
    )


def llama(raw, weights, tokens):
    """Logits [T, V] of LlamaForCausalLM."""
    weights = {name: x.astype(np.float64) for name, x in weights.items()}
    head_dim = raw["head_dim"]
    norm = lambda x, name: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + raw["rms_norm_eps"]) * weights[name]
    linear = lambda x, name: x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0)
    heads = lambda x: x.reshape(len(x), -1, head_dim)
    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(raw["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        y = norm(x, layer + "input_layernorm.weight")
        q, k, v = (heads(linear(y, f"{layer}self_attn.{name}_proj")) for name in "qkv")
        out = softmax_attention(rotate(q, raw["rope_theta"]), rotate(k, raw["rope_theta"]), v)
        x = x + linear(out, layer + "self_attn.o_proj")
        y = norm(x, layer + "post_attention_layernorm.weight")
        gate = linear(y, layer + "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, layer + "mlp.up_proj"), layer + "mlp.down_proj")
    head = "model.embed_tokens" if raw["tie_word_embeddings"] else "lm_head"
    return linear(norm(x, "model.norm.weight"), head)


def gpt2(raw, weights, tokens):
    """Logits [T, V] of GPT2LMHeadModel; its projections are stored [in, out]."""
    weights = {name.removeprefix("transformer."): x.astype(np.float64) for name, x in weights.items()}
    linear = lambda x, name: x @ weights[name + ".weight"] + weights[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + raw["layer_norm_epsilon"])
        return x * weights[name + ".weight"] + weights[name + ".bias"]

    x = weights["wte.weight"][tokens] + weights["wpe.weight"][: len(tokens)]
    for i in range(raw["n_layer"]):
        q, k, v = np.split(linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
        out = softmax_attention(*(y.reshape(len(y), raw["n_head"], -1) for y in (q, k, v)))
        x = x + linear(out, f"h.{i}.attn.c_proj")
        y = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T
