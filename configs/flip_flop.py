"""Flip-flop language modelling: whether a model reads what was written last.

    python train.py --config=configs/flip_flop.py:mixer=path --workdir=runs/flip_flop_path
    python -m path_jax.sweep --config=configs/flip_flop.py --select lr=1e-3,3e-3,1e-2 \
        --vary mixer=path,path_fox,fox,rope,stick_breaking --vary seed=0,1,2 --output=runs/flip_flop

Argument: size = cpu | paper | debug, mixer = one of common.TASK_MIXERS, lr, seed, steps.

One layer of 2 heads and width 64, as in Yang et al., "PaTH Attention" (arXiv 2505.16381), section 4.1; trained on 80 %
ignored instructions, tested there and on 98 % (sparse) and 10 % (dense). The paper's errors in percent, in that order:
RoPE 6.9, 40.3, 0.01; stick-breaking 9.6, 38.9, 0; FoX 8.3, 36.3, 0; PaTH 0, 0.0001, 0. It does not state its length,
steps and learning rates. `paper` takes 512 tokens and 16 rows from Liu et al. (arXiv 2306.00946) and 20,000 steps;
`cpu` is 256 tokens and 2,000 steps, minutes on a CPU.

The default fits on cpu:1 (`path_jax.plan`).
"""

from configs import common

_SIZES = {"cpu": (256, 2000, 350_000), "paper": (512, 20_000, 1_000_000), "debug": (32, 20, 500)}


def get_config(arg: str | None = None):
    """Configuration for `size=...,mixer=...,lr=...,seed=...,steps=...`."""
    values = common.parse_arg(arg, size="cpu", mixer="path", lr="3e-3", seed="0", steps="")
    length, num_steps, num_scored = common.choose("size", values["size"], _SIZES)
    return common.task_config(
        "flip_flop", dict(ignore=0.8), vocab_size=5, length=length, size=(1, 64, 2), mixer=values["mixer"],
        lr=float(values["lr"]), seed=int(values["seed"]), num_steps=int(values["steps"] or num_steps), batch_size=16,
        num_scored=num_scored,
    )  # fmt: skip
