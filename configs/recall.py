"""Associative recall in three forms.

    python train.py --config=configs/recall.py:mixer=path,back=2 --workdir=runs/recall_path_2
    python -m path_jax.sweep --config=configs/recall.py --vary mixer=path,rope,fox --vary back=1,2,3 --vary seed=0,1,2 \
        --select lr=1e-3,3e-3 --output=runs/recall
    python -m path_jax.sweep --config=configs/recall.py:task=ar --vary mixer=path,nope,mamba --vary seed=0,1,2 \
        --select lr=1e-3,3e-3 --output=runs/ar
    python -m path_jax.interpretability recall --checkpoint='runs/ar/runs/*' --output=runs/ar/analysis

Argument: task = mqrar | ar | atr, size = cpu | paper | debug (ar, atr: small too), mixer = one of common.TASK_MIXERS,
lr, seed, steps; mqrar: back = N; ar, atr: width, layers, conv_size = tokens of the short convolution in mamba,
deltanet, path and path_fox, mixer = attention too, with learned positions, or several mixers joined by +.

mqrar: the value that a key had N writes ago, while values keep changing. `paper` is 2 layers of width 256 with 2 heads,
32 keys and 768 tokens, as Yang et al., "PaTH Attention" (arXiv 2505.16381), section 4.1, describe it; they state
neither vocabulary, steps nor learning rate: 128 key tokens and 32 values are ours. `cpu` has 8 keys in 128 tokens and
two layers of width 64.

ar, atr: one question after pairs, or after a sentence of a random grammar. `paper` has the sizes of Arora et al.,
"Mechanistic evaluation of Transformers and state space models" (arXiv 2505.15105): 2 layers with one head, 8192 keys
and values, 16 pairs (their 32 tokens), 100,032 documents read 16 times (ar) or 32 times (atr) in batches of 32; they
take learning rates from 3e-5 to 3e-2 and widths from 16 to 256. `cpu` has 500 keys and values and new documents always;
`small` has 60 of them and 2 to 8 pairs, or sentences of up to 28 terminals. Its warm-up, half of its steps, is long
(5000 steps in the paper): attention stays at a plateau where a rate of 3e-3 comes before it has found the token before.
As in their code, attention, based, base_conv, h3, hyena, mamba and deltanet have learned positions, mamba has no MLPs,
and based is a gated short convolution in the first layer and linear attention in the second; base_conv is long filters.

The default fits on cpu:1 (`path_jax.plan`).
"""

from configs import common

# length, keys, key tokens, values, (layers, width, heads), steps, batch, scored positions
_MQRAR = {
    "cpu": (128, 8, 16, 16, (2, 64, 2), 1500, 32, 100_000),
    "paper": (768, 32, 128, 32, (2, 256, 2), 20_000, 64, 500_000),
    "debug": (32, 4, 8, 4, (1, 32, 2), 20, 16, 500),
}
# options, vocabulary, length, (width, steps, batch, scored positions)
_AR = {
    "small": (dict(num_kv=60, min_length=4, max_length=16), 64, 20, (64, 4000, 32, 2_000)),
    "cpu": (dict(num_kv=500), 504, 36, (64, 4000, 64, 5_000)),
    "paper": (dict(train_set_size=100_032), 8196, 36, (64, 50_016, 32, 5_000)),
    "debug": (dict(num_kv=20, min_length=4, max_length=8), 24, 12, (32, 20, 16, 200)),
}
_ATR = {
    "small": ({}, 26, 32, (64, 4000, 32, 2_000)),
    "cpu": ({}, 26, 64, (64, 4000, 64, 5_000)),
    "paper": (dict(num_terminals=8192, train_set_size=100_032), 8198, 1028, (64, 100_032, 32, 5_000)),
    "debug": (dict(num_nonterminals=10, max_depth=5), 26, 40, (32, 20, 16, 200)),
}

# Mixers whose published models differ from the mixer alone: the model's settings, and options.
_PUBLISHED = {
    "attention": (dict(mixer="nope"), {}),
    "based": (dict(mixer="base_conv+based"), {"based": {"feature_dim": 8}}),
    "base_conv": ({}, {"filter": "implicit"}),
    "h3": ({}, {"head_dim": 2}),
    "hyena": ({}, {}),
    "mamba": (dict(mlp="none"), {}),
    "deltanet": ({}, {}),
}


def _architecture(mixer: str, length: int, conv_size: str) -> dict:
    """Settings of the model; learned positions and long filters reach twice the length, for longer documents."""
    if mixer not in _PUBLISHED:
        if "+" not in mixer:
            common.choose("mixer", mixer, dict.fromkeys((*common.TASK_MIXERS, *_PUBLISHED)))
        settings, options = {}, {}
    else:
        settings, options = _PUBLISHED[mixer]
        settings = settings | dict(num_positions=2 * length)
    if mixer in ("hyena", "base_conv"):
        options = options | dict(filter_length=2 * length)
    if conv_size:
        options = options | dict(conv_size=int(conv_size))
    return dict(mixer=mixer) | settings | dict(mixer_options=options)


def get_config(arg: str | None = None):
    """Configuration for `task=...,size=...,mixer=...,lr=...,seed=...,steps=...` and the task's own arguments."""
    values = common.parse_arg(
        arg, task="mqrar", size="cpu", back="1", mixer="path", lr="3e-3", seed="0", steps="", width="", layers="2",
        conv_size="",
    )  # fmt: skip
    task, sizes = values["task"], {"mqrar": _MQRAR, "ar": _AR, "atr": _ATR}
    settings = common.choose("size", values["size"], common.choose("task", task, sizes))
    if task == "mqrar":
        length, keys, key_tokens, num_values, size, num_steps, batch_size, num_scored = settings
        options = dict(num_keys=keys, num_key_tokens=key_tokens, num_values=num_values, back=int(values["back"]))
        vocab_size, model = key_tokens + num_values, dict(mixer=values["mixer"])
    else:
        options, vocab_size, length, (width, num_steps, batch_size, num_scored) = settings
        size = (int(values["layers"]), int(values["width"] or width), 1)
        model = _architecture(values["mixer"], length, values["conv_size"])
    config = common.task_config(
        task, options, vocab_size=vocab_size, length=length, size=size, mixer=model["mixer"],
        lr=float(values["lr"]), seed=int(values["seed"]), num_steps=int(values["steps"] or num_steps),
        batch_size=batch_size, num_scored=num_scored,
    )  # fmt: skip
    config.model.update(model)
    if task != "mqrar":
        steps = config.train.num_steps
        share = 2 if values["size"] == "small" else 10
        config.optim.update(end_lr=0.0, warmup_steps=max(1, steps // share), b2=0.999, weight_decay=0.0)
        config.train.update(save_every=max(1, steps // 10), keep_checkpoints=10)  # for curves over training
    return config
