"""PaTH and PaTH-FoX language models.

    python train.py --config=configs/lm_path.py:size=quickstart --workdir=runs/quickstart
    python train.py --config=configs/lm_path.py:size=760m,mixer=path --workdir=runs/path_760m \
        --config.data.path=/data/fineweb_edu_tokens

Argument: size = debug | quickstart | 125m | 360m | 760m | 1b | 7b, mixer = path_fox | path.

quickstart is a byte-level PaTH-FoX model of the Python standard library: about a million tokens, minutes on two CPU
cores, at most 3.2 bits per byte on held-out modules.

Measured with `path_jax.plan` (results/plans.md): quickstart fits on cpu:1, 760m on v5e:16x16 with
--config.mesh.data=16 --config.mesh.fsdp=16, 7b with sequences of 32768 tokens on v5p:8x8x8 with 8 devices on each of
the axes fsdp, sequence and tensor and --config.data.batch_size=64.

The sizes from 125m on follow Yang et al., "PaTH Attention" (arXiv 2505.16381), section 4: sequences of 4096 tokens,
batches of 2 million, 50 billion tokens (760m), AdamW with peak learning rate 1e-3 from and to 3e-5, warm-up over 1
billion tokens, cosine, weight decay 0.01, clipping at 1, initialisation N(0, 0.02), Mistral's vocabulary of 32000. The
paper does not state AdamW's betas, nor layers and widths; (0.9, 0.95) and the shapes in common.py are ours. The other
sizes keep the recipe with 20 tokens per parameter (125m, 360m) or 50 billion (1b, 7b). Their data is a directory of
`.npy` token files, documents opened by token 1 (Mistral's <s>).
"""

import ml_collections

from configs import common

_TOKENS = {"125m": 2.5e9, "360m": 7.2e9, "760m": 50e9, "1b": 50e9, "7b": 50e9}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Configuration for `size=...,mixer=...`."""
    values = common.parse_arg(arg, size="quickstart", mixer="path_fox")
    size, mixer = values["size"], values["mixer"]
    common.choose("mixer", mixer, {"path": None, "path_fox": None})
    config = ml_collections.ConfigDict()
    config.model = common.model_section(size, mixer, 32000)
    config.data = ml_collections.ConfigDict(
        dict(
            source="tokens", path="", sequence_length=4096, batch_size=512, packing="concat", heldout_fraction=0.001,
            seed=0, tfds_split="train", text_key="text", bos_id=1, vocab_size=32000,
        )
    )  # fmt: skip
    config.optim = ml_collections.ConfigDict(
        dict(
            lr=1e-3, init_lr=3e-5, end_lr=3e-5, warmup_steps=1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01,
            clip_norm=1.0,
        )
    )  # fmt: skip
    config.mesh = ml_collections.ConfigDict(dict(data=1, fsdp=-1, sequence=1, tensor=1))
    config.train = ml_collections.ConfigDict(
        dict(
            num_steps=1, seed=0, save_every=1000, keep_checkpoints=2, eval_every=0, accumulate=1, loss_chunk=1024,
            z_loss=0.0, tensorboard=False, profile_start=10, profile_steps=0, keep_every=0, hang_seconds=1800.0,
            hang_exit=True, log_batches=False,
        )
    )  # fmt: skip
    config.evals = ml_collections.ConfigDict(dict(perplexity=dict(max_tokens=1_000_000), length=dict(), gates=dict()))
    if size == "debug":
        common.shrink_for_debug(config)
    elif size == "quickstart":
        _quickstart(config)
    else:
        common.token_budget(config, _TOKENS[size], 1e9)
    return config


def _quickstart(config):
    common.byte_corpus(config)
    config.data.update(sequence_length=256, batch_size=8, heldout_fraction=0.02)
    config.optim.update(lr=4e-3, init_lr=0.0, end_lr=4e-4, weight_decay=0.1)
    config.train.update(save_every=200, loss_chunk=0)
    common.token_budget(config, 1.05e6, 0.1e6)
    config.model.scan_layers = False  # three layers compile about as fast and run a tenth faster on a CPU
    config.evals = ml_collections.ConfigDict(
        dict(perplexity=dict(max_tokens=200_000), byte_baselines=dict(), length=dict(), gates=dict())
    )
