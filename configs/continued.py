"""Trains a checkpoint further, made here or elsewhere, in any format that loads.

    python -m path_jax.data prepare texts --tokenizer=smollm2.gguf --output=tokens
    python train.py --config=configs/continued.py:checkpoint=smollm2.gguf --config.data.source=prepared \
        --config.data.path=tokens --workdir=runs/more

Argument: checkpoint = a directory or a .gguf file. The model is the checkpoint's, computing in bfloat16. Byte-level
models read the standard library unless told otherwise; others tokens of the checkpoint's own vocabulary.

The recipe is lm_path.py's with a tenth of its peak learning rate: a thousand steps of 32 sequences of 1024 tokens.
SmolLM2-135M fits on cpu:1 with 24 GiB (`path_jax.plan`).
"""

import dataclasses

import ml_collections

from configs import common, lm_path
from path_jax.checkpoints import load_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Configuration for `checkpoint=...`."""
    checkpoint = common.parse_arg(arg, checkpoint="")["checkpoint"]
    if not checkpoint:
        raise ValueError("name the checkpoint: --config=configs/continued.py:checkpoint=...")
    model = dataclasses.replace(load_config(checkpoint, "bfloat16"), scan_layers=True, remat="full")
    config = lm_path.get_config("size=125m")
    config.model = ml_collections.ConfigDict(dataclasses.asdict(model) | dict(mixer_options=dict(model.mixer_options)))
    config.conversion = ml_collections.ConfigDict(dict(teacher=checkpoint, stage="lm", start=checkpoint))
    config.data.update(sequence_length=min(1024, model.num_positions or 1024), batch_size=32, bos_id=0)
    config.data.vocab_size = model.vocab_size
    if model.vocab_size == 257:
        common.byte_corpus(config)
    config.optim.update(lr=1e-4, init_lr=0.0, end_lr=1e-5, warmup_steps=50)
    config.train.update(num_steps=1000, save_every=200)
    return config
