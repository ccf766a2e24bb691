"""Training goes on from checkpoints of every format, with `configs/continued.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints.synthetic import GGUF, MODELS, random_params, write_gguf

from configs import continued
from path_jax.checkpoints import load_pretrained, save_pretrained
from path_jax.data import make_iterator
from path_jax.models import DecoderLM
from path_jax.training import loop
from path_jax.training.experiment import make_experiment
from path_jax.training.objectives import language_modelling


@pytest.mark.parametrize(
    "name",
    ["fla-path-fox", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gguf", "fox-pro", "llama", "gpt2"))],
)
def test_one_more_step(name, tmp_path):
    if name == "gguf":
        checkpoint = write_gguf(tmp_path / "model.gguf", random_params(GGUF), "Q8_0")
    else:
        format_, model = MODELS[name]
        checkpoint = tmp_path / "model"
        save_pretrained(checkpoint, model, random_params(model), format_)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 40, 2000))

    config = continued.get_config(f"checkpoint={checkpoint}")
    config.model.update(dtype="float32", remat="none")
    config.data.update(path=str(tmp_path / "tokens.npy"), sequence_length=16, batch_size=8, heldout_fraction=0.1)
    config.optim.update(lr=1e-3, init_lr=1e-3, end_lr=1e-3, warmup_steps=0)
    config.train.update(num_steps=1, loss_chunk=0)
    experiment = make_experiment(config.to_dict())
    result = loop.run(experiment, tmp_path / "run")

    ours, params = load_pretrained(checkpoint)
    batch = jax.tree.map(jnp.asarray, next(make_iterator(experiment.data, experiment.corpus.train)))
    total, weight = language_modelling(DecoderLM(ours))(params, batch, None)[1]["loss"]
    assert result.records[0]["loss"] == pytest.approx(float(total / weight), rel=1e-5)
    trained = load_pretrained(tmp_path / "run")[1]
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    change = jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(x - y).max()), trained, params))
    assert max(change) > 5e-4 and max(change) < 2e-3  # one step of AdamW
