"""Word problems of S5, A5 and other groups: the fewest layers that multiply a series of permutations.

    python train.py --config=configs/group_words.py:mixer=path,layers=1 --workdir=runs/s5_path_1
    python -m path_jax.sweep --config=configs/group_words.py --vary mixer=rope --vary layers=1,2,3,4 \
        --vary seed=0,1,2 --select lr=1e-3,3e-3 --output=runs/s5_swaps
    python -m path_jax.sweep --config=configs/group_words.py:size=paper,group=a5 \
        --vary mixer=path,rope,fox --vary layers=1,2,3,4 --select lr=3e-4,1e-3 --output=runs/a5

Argument: size = cpu | paper | debug, group = s5 | a5 | s3 | z2 ..., generators = all | swaps | involutions | a number
(swaps for S_n, else all), length (factors), mixer = one of common.TASK_MIXERS, layers, lr, seed, steps.

Yang et al., "PaTH Attention" (arXiv 2505.16381), section 4.1, after Merrill et al. (arXiv 2404.08819): a model of few
layers that is right at more than 90 % of the positions at the trained length, on A5 with any element as factor. Neither
states width and learning rate for these models; 4 heads of 32 (`paper`) and of 16 (`cpu`) are ours. `paper` takes 20
factors. `cpu` takes minutes and multiplies swaps of five things, which is the case of the paper's theorem: one swap is
one reflection, and after two of them the product is in A5, whatever they are. `group=a5,generators=involutions` has
words of A5 whose factors are the 15 elements of order 2, half turns of an icosahedron: reflections but for a sign. Each
row begins with a token of its own. Evaluated at one, two and four times the length.

The default fits on cpu:1 (`path_jax.plan`).
"""

from configs import common

# factors, width, steps, batch, scored positions
_SIZES = {
    "cpu": (16, 64, 1500, 128, 50_000),
    "paper": (20, 128, 50_000, 512, 500_000),
    "debug": (8, 32, 20, 16, 500),
}
_ORDERS = {"a4": 12, "a5": 60, "s3": 6, "s4": 24, "s5": 120}


def get_config(arg: str | None = None):
    """Configuration for `size=...,group=...,generators=...,length=...,mixer=...,layers=...`, lr, seed and steps."""
    values = common.parse_arg(
        arg, size="cpu", group="s5", generators="", length="", mixer="path", layers="1", lr="3e-3", seed="0",
        steps="",
    )  # fmt: skip
    length, width, num_steps, batch_size, num_scored = common.choose("size", values["size"], _SIZES)
    group = values["group"]
    order = int(group[1:]) if group.startswith("z") else common.choose("group", group, _ORDERS)
    generators = values["generators"] or ("swaps" if group.startswith("s") else "all")
    generators = int(generators) if generators.isdigit() else generators
    return common.task_config(
        "group_words", dict(group=group, generators=generators, start=True), vocab_size=order + 1,
        length=int(values["length"] or length) + 1, size=(int(values["layers"]), width, 4), mixer=values["mixer"],
        lr=float(values["lr"]), seed=int(values["seed"]), num_steps=int(values["steps"] or num_steps),
        batch_size=batch_size, num_scored=num_scored,
    )  # fmt: skip
