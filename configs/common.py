"""What configurations share: argument parsing, model sizes, shrinking for debugging. Loads without jax."""

import ml_collections

# name: (layers, embed_dim, heads). 125m, 360m and 760m are the shapes of the FoX paper; the PaTH paper gives only its
# parameter counts. 1b has the default shape of flash-linear-attention's PaTH model; 7b that of common 7B models.
SIZES = {
    "debug": (2, 64, 2),
    "quickstart": (3, 192, 3),
    "125m": (12, 768, 12),
    "360m": (24, 1024, 16),
    "760m": (24, 1536, 24),
    "1b": (24, 2048, 32),
    "7b": (32, 4096, 32),
}


def parse_arg(arg: str | None, **defaults: str) -> dict[str, str]:
    """'size=debug,mixer=fox' -> {"size": "debug", "mixer": "fox"}, on top of the defaults.

    Raises:
      ValueError: for a key without a default or a part without '='.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, separator, value = part.partition("=")
        if not separator or key not in defaults:
            raise ValueError(f"config argument {part!r} is not one of {', '.join(f'{k}=...' for k in defaults)}")
        values[key] = value
    return values


def choose(name: str, value: str, choices):
    """choices[value], or a ValueError that lists them."""
    if value not in choices:
        raise ValueError(f"{name}={value} is unknown; choose from {', '.join(choices)}")
    return choices[value]


def model_section(size: str, mixer: str, vocab_size: int, **mixer_options) -> ml_collections.ConfigDict:
    """The model section for a size."""
    num_layers, embed_dim, num_heads = choose("size", size, SIZES)
    section = ml_collections.ConfigDict(
        dict(
            vocab_size=vocab_size,
            num_layers=num_layers,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mixer=mixer,
            mixer_options=mixer_options,
            tie_embeddings=False,
            scan_layers=True,
            remat="none" if size in ("debug", "quickstart") else "full",
            dtype="float32" if size == "debug" else "bfloat16",
        )
    )
    section.num_kv_heads = ml_collections.config_dict.placeholder(int)
    section.head_dim = ml_collections.config_dict.placeholder(int)
    section.mlp_dim = ml_collections.config_dict.placeholder(int)
    section.implementation = ml_collections.config_dict.placeholder(str)
    return section


def token_budget(config: ml_collections.ConfigDict, tokens: float, warmup_tokens: float) -> None:
    """Sets the number of steps and of warm-up steps from numbers of tokens."""
    per_step = config.data.batch_size * config.data.sequence_length
    config.train.num_steps = max(1, round(tokens / per_step))
    config.optim.warmup_steps = max(1, round(warmup_tokens / per_step))


def byte_corpus(config: ml_collections.ConfigDict) -> None:
    """Bytes of this Python's standard library."""
    config.model.vocab_size = 257
    config.data.update(source="stdlib", path="", bos_id=256, vocab_size=257)


def shrink_for_debug(config: ml_collections.ConfigDict) -> None:
    """A run of seconds on a CPU: 20 steps of 8 x 64 bytes of the standard library."""
    byte_corpus(config)
    config.data.update(sequence_length=64, batch_size=8)
    config.train.update(num_steps=20, save_every=10, loss_chunk=0)
    config.optim.warmup_steps = 2
    config.evals = ml_collections.ConfigDict(dict(perplexity=dict(max_tokens=2000)))


# Mixers that the synthetic tasks compare.
TASK_MIXERS = (
    "path", "path_fox", "fox", "rope", "nope", "stick_breaking", "deltanet", "mamba", "based", "h3", "hyena",
    "base_conv",
)  # fmt: skip


def task_config(
    task: str, options: dict, *, vocab_size: int, length: int, size: tuple[int, int, int], mixer: str,
    lr: float, seed: int, num_steps: int, batch_size: int, num_scored: int,
) -> ml_collections.ConfigDict:  # fmt: skip
    """A run on a synthetic task, with the evaluator "task" alone; size = (layers, embed_dim, heads).

    mixer: one of TASK_MIXERS, or several joined by +.
    """
    for name in mixer.split("+"):
        choose("mixer", name, dict.fromkeys(TASK_MIXERS))
    num_layers, embed_dim, num_heads = size
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict(
        dict(
            vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, mixer=mixer,
            mixer_options={}, scan_layers=False, dtype="float32",
        )
    )  # fmt: skip
    config.data = ml_collections.ConfigDict(
        dict(source="task", task=task, task_options=options, sequence_length=length, batch_size=batch_size, seed=seed)
    )
    config.optim = ml_collections.ConfigDict(
        dict(lr=lr, init_lr=0.0, end_lr=lr / 30, warmup_steps=max(num_steps // 20, 1), b1=0.9, b2=0.95, eps=1e-8,
             weight_decay=0.01, clip_norm=1.0)
    )  # fmt: skip
    config.mesh = ml_collections.ConfigDict(dict(data=1, fsdp=-1, sequence=1, tensor=1))
    config.train = ml_collections.ConfigDict(dict(num_steps=num_steps, seed=seed, save_every=1000, keep_checkpoints=1))
    config.evals = ml_collections.ConfigDict(dict(task=dict(num_scored=num_scored)))
    return config
