"""A rotary transformer in float64 NumPy, from its equations, with a hook at every value."""

import numpy as np


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def rotate(x, theta=10000.0):
    """Pairs (x_i, x_{i + H/2}) turn by t theta^(-2i/H)."""
    length, _, head_dim = x.shape
    out = np.empty_like(x)
    for t in range(length):
        for i in range(head_dim // 2):
            angle = t * theta ** (-2 * i / head_dim)
            a, b = x[t, :, i], x[t, :, i + head_dim // 2]
            out[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, :, i + head_dim // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def attention(params, x, hook):
    length, head_dim = len(x), params["o_proj"]["kernel"].shape[0] // 2  # two heads
    q, k, v = (
        (x @ params[f"{name}_proj"]["kernel"]).reshape(length, -1, head_dim) for name in "qkv"
    )  # fmt: skip
    q, k, v = hook("q", rotate(q)), hook("k", rotate(k)), hook("v", v)
    out = np.zeros((length, 2, head_dim))
    for head in range(2):
        key_head = head * k.shape[1] // 2
        for t in range(length):
            weights = softmax(k[: t + 1, key_head] @ q[t, head] / np.sqrt(head_dim))
            out[t, head] = weights @ v[: t + 1, key_head]
    return hook("head_out", out).reshape(length, -1) @ params["o_proj"]["kernel"]


def transformer(params, tokens, hook=lambda layer, tap, value: value):
    """Logits [T, V] of one row of tokens; `hook(layer, tap, value)` gives what the rest sees."""
    x = params["embed"]["embedding"][tokens]
    for i in range(sum(name.startswith("layers_") for name in params)):
        layer, at = params[f"layers_{i}"], lambda tap, value, i=i: hook(i, tap, value)
        x = at("resid_pre", x)
        y = at("mixer_in", rms_norm(x, layer["mixer_norm"]["scale"]))
        x = x + at("mixer_out", attention(layer["mixer"], y, at))
        y = at("mlp_in", rms_norm(x, layer["mlp_norm"]["scale"]))
        gate, up = (y @ layer["mlp"][f"{name}_proj"]["kernel"] for name in ("gate", "up"))
        y = gate / (1 + np.exp(-gate)) * up @ layer["mlp"]["down_proj"]["kernel"]
        x = at("resid_post", x + at("mlp_out", y))
    return rms_norm(x, params["final_norm"]["scale"]) @ params["lm_head"]["kernel"]
