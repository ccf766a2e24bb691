from path_jax.models.config import ModelConfig
from path_jax.models.decoder_lm import DecoderLM, LMOutput

__all__ = ["DecoderLM", "LMOutput", "ModelConfig"]
