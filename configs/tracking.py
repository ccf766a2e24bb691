"""State tracking in text: variables of a program, or objects in boxes.

    python train.py --config=configs/tracking.py:mixer=path_fox --workdir=runs/code_path_fox
    python -m path_jax.sweep --config=configs/tracking.py --vary mixer=path_fox,rope --vary seed=0,1,2 \
        --select lr=1e-3,3e-3 --output=runs/code

Argument: size = cpu | debug, task = code_variables | boxes, mixer = one of common.TASK_MIXERS, lr, seed, steps.

A row is a program of assignments, copies, conditions and prints, in tokens such as `a = ` and `print(a) # `, or an
English text of moves and questions; only the answers are learned and scored. Trained at one length, evaluated there and
at two and four times it. Attention mixers have the same number of parameters: those without reflections and gates have
a wider MLP. The settings are ours; the question is the one that opens the PaTH paper.

The default fits on cpu:1 (`path_jax.plan`).
"""

from configs import common

# model, steps, batch, scored positions
_SIZES = {"cpu": ((2, 64, 2), 1500, 32, 50_000), "debug": ((1, 32, 2), 20, 16, 300)}
_MLP_DIMS = {"path_fox": 256, "path": 257, "fox": 279, "rope": 280, "nope": 280, "stick_breaking": 280}  # at width 64
# options, vocabulary, length
_TASKS = {"code_variables": (dict(pieces=True), 40, 64), "boxes": ({}, 23, 128)}


def get_config(arg: str | None = None):
    """Configuration for `size=...,task=...,mixer=...,lr=...,seed=...,steps=...`."""
    values = common.parse_arg(arg, size="cpu", task="code_variables", mixer="path_fox", lr="3e-3", seed="0", steps="")
    size, num_steps, batch_size, num_scored = common.choose("size", values["size"], _SIZES)
    options, vocab_size, length = common.choose("task", values["task"], _TASKS)
    config = common.task_config(
        values["task"], options, vocab_size=vocab_size, length=length, size=size, mixer=values["mixer"],
        lr=float(values["lr"]), seed=int(values["seed"]), num_steps=int(values["steps"] or num_steps),
        batch_size=batch_size, num_scored=num_scored,
    )  # fmt: skip
    if config.model.embed_dim == 64:
        config.model.mlp_dim = _MLP_DIMS.get(values["mixer"], 256)
    return config
