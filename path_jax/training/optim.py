"""AdamW with warm-up and cosine decay, a decay mask by path pattern, and gradient clipping."""

import dataclasses
import re

import jax
import optax

from path_jax.parallel.sharding import path_name

# Weight decay is for matrices: embeddings, projections and convolutions, but not norms and biases.
_DECAYED = re.compile(r"(kernel|embedding)$")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer settings.

    Args:
      lr: peak learning rate; init_lr and end_lr: where warm-up starts and the cosine ends.
      warmup_steps: linear warm-up; the cosine runs from there to the last training step.
      b1, b2, eps, weight_decay: of AdamW; clip_norm: bound on the global gradient norm, 0 for none.
    """

    lr: float = 1e-3
    init_lr: float = 0.0
    end_lr: float = 0.0
    warmup_steps: int = 100
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be positive")
        for name in ("init_lr", "end_lr", "warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must not be negative")


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate as a function of the step.

    Raises:
      ValueError: if the warm-up is longer than the run.
    """
    if config.warmup_steps > num_steps:
        raise ValueError(f"optim.warmup_steps={config.warmup_steps} exceeds train.num_steps={num_steps}")
    return optax.warmup_cosine_decay_schedule(
        config.init_lr, config.lr, config.warmup_steps, max(num_steps, config.warmup_steps + 1), config.end_lr
    )


def decay_mask(params):
    """True where weight decay applies."""
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(_DECAYED.search(path_name(path))), params)


def make_optimizer(config: OptimConfig, num_steps: int, trained: str | None = None) -> optax.GradientTransformation:
    """Clipping, then AdamW on the schedule, for the parameters whose path matches `trained`; None: for all."""
    adamw = optax.adamw(
        make_schedule(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
    if trained is None:
        return optimizer
    label = lambda path, _: "trained" if re.search(trained, path_name(path)) else "frozen"
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
