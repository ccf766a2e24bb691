"""Checkpoints: of runs (native.py), and to and from the formats of others."""

from path_jax.checkpoints.hf import load_config, load_pretrained, save_pretrained

__all__ = ["load_config", "load_pretrained", "save_pretrained"]
