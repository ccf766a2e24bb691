"""A training run for test_resume to interrupt: `python interrupted_run.py WORKDIR NUM_STEPS SAVE_EVERY`."""

import sys

from configs import lm_path
from path_jax.training import loop
from path_jax.training.experiment import make_experiment


def main(workdir, num_steps, save_every):
    config = lm_path.get_config("size=debug")
    config.train.update(num_steps=int(num_steps), save_every=int(save_every))
    config.data.update(source="files", path=__file__, sequence_length=32)
    config.model.update(embed_dim=32)
    loop.run(make_experiment(config.to_dict()), workdir)


if __name__ == "__main__":
    main(*sys.argv[1:])
