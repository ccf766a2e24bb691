"""Turning a RoPE model into PaTH."""

import jax
import numpy as np
import pytest

from configs import lm_baselines, rope_to_path
from path_jax.checkpoints import load_pretrained, save_pretrained
from path_jax.models import ModelConfig
from path_jax.models.stacking import stack_layers
from path_jax.training import loop
from path_jax.training.conversion import ConversionConfig
from path_jax.training.experiment import make_experiment
from path_jax.training.optim import OptimConfig, make_schedule


def run(config, workdir, steps, **changes):
    config.train.num_steps = steps
    config.optim.warmup_steps = 1
    for section, values in changes.items():
        config[section].update(values)
    return loop.run(make_experiment(config.to_dict()), workdir)


def convert(stage, workdir, steps=2, teacher=None, start="", **changes):
    config = rope_to_path.get_config(f"stage={stage},size=debug")
    return run(config, workdir, steps, conversion=dict(teacher=str(teacher), start=str(start)), **changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model whose logits depend on position: its projections are 6 times those of a young one."""
    workdir = tmp_path_factory.mktemp("teacher")
    run(lm_baselines.get_config("size=debug,mixer=rope"), workdir / "run", 1)
    config, params = load_pretrained(workdir / "run")
    larger = lambda path, x: 6 * x if "proj" in jax.tree_util.keystr(path) else x
    save_pretrained(workdir / "model", config, jax.tree_util.tree_map_with_path(larger, params), "native")
    return workdir / "model"


def flat(params):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


def test_mixers_alone_are_trained_and_start_as_the_teachers(teacher, tmp_path):
    result = convert("mse", tmp_path, steps=8, teacher=teacher, optim=dict(lr=3e-4))
    params, theirs = flat(result.params), flat(scanned(teacher))
    is_mixer = lambda name: "'mixer'" in name
    for name, x in params.items():
        if is_mixer(name):
            assert name not in theirs or np.abs(x - theirs[name]).max() < 0.01  # eight small steps away
        else:
            np.testing.assert_array_equal(x, theirs[name], name)
    assert any((x != theirs[name]).any() for name, x in params.items() if is_mixer(name) and name in theirs)
    first, *_, last = result.records
    assert first["loss"] == pytest.approx((first["layer_0"] + first["layer_1"]) / 2, rel=1e-5)
    assert last["loss"] < first["loss"]


def scanned(path):
    return stack_layers(load_pretrained(path)[1])


@pytest.mark.parametrize("stage", ["mse", "kl"])
@pytest.mark.parametrize("scan_layers, accumulate", [(True, 1), pytest.param(False, 2, marks=pytest.mark.slow)])
def test_a_copy_of_the_teacher_has_nothing_to_learn(teacher, tmp_path, stage, scan_layers, accumulate):
    model = dict(mixer="rope", mixer_options=dict(rope_theta=5e5), scan_layers=scan_layers)
    chunked = dict(accumulate=accumulate, loss_chunk=24)
    result = convert(stage, tmp_path, steps=1, teacher=teacher, model=model, train=chunked, data=dict(batch_size=16))
    assert abs(result.records[0]["loss"]) < 1e-6


@pytest.mark.slow
def test_stages_follow_each_other(teacher, tmp_path):
    convert("mse", tmp_path / "mse", teacher=teacher)
    convert("kl", tmp_path / "kl", teacher=teacher, start=tmp_path / "mse")
    result = convert(
        "lm",
        tmp_path / "lm",
        teacher=teacher,
        start=tmp_path / "kl",
        steps=1,
        optim=dict(lr=1e-30, init_lr=0.0, end_lr=0.0),
    )
    for (name, x), y in zip(flat(result.params).items(), flat(scanned(tmp_path / "kl")).values()):
        np.testing.assert_array_equal(x, y, name)
    assert 3 < result.records[0]["loss"] < 7  # nats per byte


def test_what_does_not_fit_is_named(teacher, tmp_path):
    with pytest.raises(ValueError, match="embed_dim=64, the model 32"):
        convert("mse", tmp_path / "a", teacher=teacher, model=dict(embed_dim=32))
    with pytest.raises(ValueError, match="has no layers/mixer"):
        convert("kl", tmp_path / "b", teacher=teacher, start=teacher)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert("lm", tmp_path / "c", teacher=teacher, start="/nowhere")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="stage='mle'"):
        ConversionConfig("x", "mle")
    with pytest.raises(ValueError, match="must name a checkpoint"):
        ConversionConfig("", "mse")


@pytest.mark.parametrize("size", ["debug", "quickstart", "smollm2_demo", "smollm2_135m", "smollm2_1.7b"])
@pytest.mark.parametrize("stage", ["mse", "kl", "lm"])
def test_configurations_are_complete(size, stage):
    config = rope_to_path.get_config(f"stage={stage},size={size}")
    make_schedule(OptimConfig(**config.optim), config.train.num_steps)
    ModelConfig(**config.model.to_dict()).make_mixer()
