"""Multi-query repeated associative recall, N back: the value a key had N writes ago, while values keep changing.

    python train.py --config=configs/recall.py:mixer=path,back=2 --workdir=runs/recall_path_2
    python -m path_jax.sweep --config=configs/recall.py --vary mixer=path,rope,fox --vary back=1,2,3 --vary seed=0,1,2 \
        --select lr=1e-3,3e-3 --output=runs/recall

Argument: size = cpu | paper | debug, back = N, mixer = one of common.TASK_MIXERS, lr, seed, steps.

`paper` is 2 layers of width 256 with 2 heads, 32 keys and 768 tokens, as Yang et al., "PaTH Attention" (arXiv
2505.16381), section 4.1, describe it; they state neither vocabulary, steps nor learning rate: 128 key tokens and
32 values are ours.
`cpu` is the same task with 8 keys in 128 tokens, two layers of width 64. Evaluated there and at twice the length.
"""

from configs import common

# length, keys, key tokens, values, (layers, width, heads), steps, batch, scored positions
_SIZES = {
    "cpu": (128, 8, 16, 16, (2, 64, 2), 1500, 32, 100_000),
    "paper": (768, 32, 128, 32, (2, 256, 2), 20_000, 64, 500_000),
    "debug": (32, 4, 8, 4, (1, 32, 2), 20, 16, 500),
}


def get_config(arg: str | None = None):
    """Configuration for `size=...,back=...,mixer=...,lr=...,seed=...,steps=...`."""
    values = common.parse_arg(arg, size="cpu", back="1", mixer="path", lr="3e-3", seed="0", steps="")
    length, keys, key_tokens, num_values, size, num_steps, batch_size, num_scored = common.choose(
        "size", values["size"], _SIZES
    )
    options = dict(num_keys=keys, num_key_tokens=key_tokens, num_values=num_values, back=int(values["back"]))
    return common.task_config(
        "mqrar", options, vocab_size=key_tokens + num_values, length=length, size=size, mixer=values["mixer"],
        lr=float(values["lr"]), seed=int(values["seed"]), num_steps=int(values["steps"] or num_steps),
        batch_size=batch_size, num_scored=num_scored,
    )  # fmt: skip
