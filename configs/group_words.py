"""Word problems of A5 and S5: the fewest layers that multiply a series of permutations.

    python train.py --config=configs/group_words.py:mixer=path,layers=1 --workdir=runs/a5_path_1
    python -m path_jax.sweep --config=configs/group_words.py --vary mixer=path,rope --vary layers=1,2,3,4 \
        --vary seed=0,1,2 --select lr=1e-3,3e-3 --output=runs/a5

Argument: size = cpu | paper | debug, group = a5 | s5 | s3 | z2 ..., length, mixer = one of common.TASK_MIXERS, layers,
lr, seed, steps.

Yang et al., "PaTH Attention" (arXiv 2505.16381), section 4.1, after Merrill et al. (arXiv 2404.08819): a model of few
layers that is right at more than 90 % of the positions at the trained length. Neither states width and learning rate
for these models; 4 heads of 32 are ours. `paper` sweeps lengths to 20; `cpu` takes minutes.
Evaluated at one, two and four times the length.
"""

from configs import common

# length, steps, batch, scored positions
_SIZES = {"cpu": (12, 4000, 64, 50_000), "paper": (20, 50_000, 512, 500_000), "debug": (8, 20, 16, 500)}
_ORDERS = {"a4": 12, "a5": 60, "s3": 6, "s4": 24, "s5": 120}


def get_config(arg: str | None = None):
    """Configuration for `size=...,group=...,length=...,mixer=...,layers=...,lr=...,seed=...,steps=...`."""
    values = common.parse_arg(
        arg, size="cpu", group="a5", length="", mixer="path", layers="1", lr="1e-3", seed="0", steps=""
    )
    length, num_steps, batch_size, num_scored = common.choose("size", values["size"], _SIZES)
    group = values["group"]
    order = int(group[1:]) if group.startswith("z") else common.choose("group", group, _ORDERS)
    return common.task_config(
        "group_words", dict(group=group), vocab_size=order, length=int(values["length"] or length),
        size=(int(values["layers"]), 128, 4), mixer=values["mixer"], lr=float(values["lr"]), seed=int(values["seed"]),
        num_steps=int(values["steps"] or num_steps), batch_size=batch_size, num_scored=num_scored,
    )  # fmt: skip
