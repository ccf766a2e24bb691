"""The decode cache of a whole model: one mixer state per layer."""

import dataclasses

from path_jax.models.config import ModelConfig
from path_jax.models.decoder_lm import LMCache
from path_jax.models.stacking import unstack_layers


def init_cache(config: ModelConfig, batch: int, max_length: int, **cache_options) -> LMCache:
    """State of every layer before the first token.

    Args:
      config: of the model.
      batch: rows B.
      max_length: tokens a row can hold.
      **cache_options: `dtype` of keys and values (config.dtype by default), `superchunk` and `num_pages`, see
        pallas_kernels.init_cache.

    Raises:
      ValueError: for rows longer than the learned positions of the model.
    """
    if config.num_positions and max_length > config.num_positions:
        raise ValueError(f"{max_length=} is more than the model's {config.num_positions} learned positions")
    mixer = config.make_mixer()
    return tuple(
        mixer.init_state(batch, max_length, config.embed_dim, **cache_options) for _ in range(config.num_layers)
    )


def unrolled(config: ModelConfig, params) -> tuple[ModelConfig, dict]:
    """The same model with layer-by-layer parameters, the form that decodes."""
    if not config.scan_layers:
        return config, params
    return dataclasses.replace(config, scan_layers=False), unstack_layers(params)
