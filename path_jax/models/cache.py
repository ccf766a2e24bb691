"""The decode cache of a whole model: one mixer state per layer."""

import dataclasses

from path_jax.mixers.state import StatePages
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
    return tuple(
        config.make_mixer(layer).init_state(batch, max_length, config.embed_dim, **cache_options)
        for layer in range(config.num_layers)
    )


def unrolled(config: ModelConfig, params) -> tuple[ModelConfig, dict]:
    """The same model with layer-by-layer parameters, the form that decodes."""
    if not config.scan_layers:
        return config, params
    return dataclasses.replace(config, scan_layers=False), unstack_layers(params)


class CachePages:
    """Shares pages between the rows of a cache made with `init_cache(..., num_pages=P)`.

    Two requests with one beginning: read it in row 0, `fork` row 0 to row 1, go on with both; their pages of whole
    superchunks exist once. A method returns what takes the place of its argument, which it may consume. Every layer has
    its own `mixers.state.StatePages`; all do the same.
    """

    def __init__(self, cache: LMCache):
        """For a cache without tokens."""
        self._layers = [StatePages(state) for state in cache]

    @property
    def num_used(self) -> int:
        """Pages in use, per layer."""
        return self._layers[0].num_used

    @property
    def num_free(self) -> int:
        """Pages that are left, per layer."""
        return self._layers[0].num_free

    def reserve(self, cache: LMCache, new_tokens) -> LMCache:
        """Pages for `new_tokens` more tokens per row, an int or one per row."""
        return tuple(layer.reserve(state, new_tokens) for layer, state in zip(self._layers, cache))

    def fork(self, cache: LMCache, parent: int, child: int) -> LMCache:
        """Makes the empty row `child` a copy of row `parent` that shares its full pages."""
        return tuple(layer.fork(state, parent, child) for layer, state in zip(self._layers, cache))

    def release(self, cache: LMCache, row: int) -> LMCache:
        """Empties a row; pages that nobody else uses become free."""
        return tuple(layer.release(state, row) for layer, state in zip(self._layers, cache))
