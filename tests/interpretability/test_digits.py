"""The ViT of digits: a few steps of a small one."""

import sys

import jax
import numpy as np
import pytest

from path_jax.interpretability.digits import train_digits
from path_jax.models.vit import ViT

SMALL = dict(num_layers=1, embed_dim=16, num_heads=2)


def test_training_learns_and_repeats(capsys):
    pytest.importorskip("sklearn", reason="needs the extra [interp]")
    found, again, other = (train_digits(seed=seed, steps=60, learning_rate=1e-2, **SMALL) for seed in (0, 0, 1))
    assert found.images.shape == (449, 8, 8, 1) and found.labels.shape == (449,)
    assert found.images.min() == 0 and found.images.max() == 1 and set(found.labels.tolist()) == set(range(10))
    assert found.accuracy > 0.3 and "step 60 of 60" in capsys.readouterr().err
    logits = jax.jit(lambda params: ViT(found.config).apply({"params": params}, found.images).logits)
    right = np.asarray(logits(found.params)).argmax(axis=-1) == found.labels
    assert right.mean() == pytest.approx(found.accuracy)
    assert (np.asarray(logits(found.initial_params)).argmax(axis=-1) == found.labels).mean() < 0.25

    jax.tree.map(np.testing.assert_array_equal, found._replace(config=0), again._replace(config=0))
    assert not np.array_equal(other.images, found.images)


def test_what_does_not_fit(monkeypatch):
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        train_digits(steps=0)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install path-jax\[interp\]"):
        train_digits()
