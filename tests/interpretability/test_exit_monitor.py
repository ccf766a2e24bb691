"""Bounds that hold at all times, and exits that end when they should."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.interpretability.exit_monitor import ExitMonitor
from path_jax.interpretability.exit_rules import SimilarityRule
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.early_exit import generate_with_exits


def test_bounds_by_their_formula():
    monitor = ExitMonitor(0.5, confidence=0.9)
    assert monitor.bounds == (0, 1) and math.isnan(monitor.share)
    monitor.observe(np.array([True] * 17 + [False] * 3))
    beta = lambda a, b: math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    ratio = lambda p: beta(3.5, 17.5) / beta(0.5, 0.5) / (p**3 * (1 - p) ** 17)
    low, high = monitor.bounds
    assert low < monitor.share == 0.15 < high
    assert ratio(low) == pytest.approx(10, rel=1e-6) and ratio(high) == pytest.approx(10, rel=1e-6)
    for agreed in ([True] * 50, [False] * 50):
        monitor.reset()
        monitor.observe(np.array(agreed))
        assert monitor.bounds[0 if agreed[0] else 1] == (0 if agreed[0] else 1)


def test_exits_within_the_limit_are_seldom_ended():
    ended = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        monitor = ExitMonitor(0.02)
        for agreed in rng.random(1000) >= 0.02:
            monitor.observe(np.array([agreed]))
        ended += monitor.is_tripped
    assert ended <= 17  # at most 10 are expected; more than 17 of 200 have a probability of 1 %


def test_a_bad_threshold_is_caught_within_500_tokens():
    """At a tenth of the tokens, a rule that is wrong in a quarter of the exits against a limit of 1 %."""
    tokens = []
    for seed in range(200):
        rng, monitor = np.random.default_rng(seed), ExitMonitor(0.01, seed=seed)
        while not monitor.is_tripped and monitor.num_exits < 2000:
            monitor.observe(rng.random(monitor.choose(1).sum()) >= 0.25)
        tokens.append(monitor.num_exits)
    assert np.mean(np.array(tokens) <= 500) > 0.95


def test_generation_falls_back_to_full_depth():
    model = DecoderLM(ModelConfig(23, 3, 16, 2, mlp_dim=32, mixer="rope", scan_layers=False))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    params = jax.tree.map(lambda x: 5 * x, params)
    monitor = ExitMonitor(0.3, check_rate=0.5)
    out = generate_with_exits(
        model, params, [[1], [2]], rule=SimilarityRule(jnp.array([-2.0])), exit_layers=[0], max_new_tokens=60,
        monitor=monitor,
    )  # fmt: skip
    assert monitor.is_tripped and monitor.bounds[0] > 0.3
    num_early = (out.depths == 1).sum()
    assert num_early and (out.depths[:, -10:] == 3).all()
    assert monitor.num_exits == num_early + monitor.num_checked
    monitor.reset()
    assert not monitor.is_tripped


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limit": 1}, {"check_rate": 0}, {"confidence": 1}])
def test_wrong_numbers_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ExitMonitor(**{"limit": 0.1} | wrong)
