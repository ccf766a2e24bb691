"""A run of seconds for tests that start train.py: `tiny_config.py:DIRECTORY` reads the text in DIRECTORY."""

from configs import lm_path


def get_config(directory):
    config = lm_path.get_config("size=debug")
    config.data.update(source="files", path=directory, sequence_length=32, batch_size=8, heldout_fraction=0.3)
    config.model.update(embed_dim=32)
    config.train.update(num_steps=20, save_every=5, log_batches=True, hang_seconds=120.0)
    config.evals = dict(perplexity=dict(max_tokens=100))
    return config
