"""Scores by their definition, rules on disk, what exits do to a text, and thresholds that keep to a limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.data import Batch
from path_jax.interpretability import top_tokens
from path_jax.interpretability.exit_calibration import (
    calibrate,
    first_exits,
    oracle_exits,
    summarise_exits,
    trace_exits,
)
from path_jax.interpretability.exit_rules import (
    GapRule,
    LinearRule,
    SimilarityRule,
    load_rule,
    save_rule,
    score_cost,
    settled_rule,
)
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.early_exit import generate_with_exits

EXITS, LAYERS = [0, 2], 4
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def rope():
    model = DecoderLM(ModelConfig(23, LAYERS, 16, 2, mlp_dim=32, mixer="rope"))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    return model, jax.tree.map(lambda x: 5 * x, params)


def rules():
    return {
        "gap": GapRule(jnp.array([0.3, 0.2])),
        "similarity": SimilarityRule(jnp.array([0.7, 0.6])),
        "linear": LinearRule(jnp.zeros(2), jnp.asarray(RNG.normal(size=(2, 16)), jnp.float32), jnp.array([0.1, -0.1])),
    }


def test_scores_are_their_definitions():
    x, before = (jnp.asarray(RNG.normal(size=(5, 16)), jnp.float32) for _ in range(2))
    table = jnp.asarray(RNG.normal(size=(16, 7)), jnp.float32)
    lens = lambda x: x @ table
    probabilities = np.sort(jax.nn.softmax(lens(x)), axis=-1)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(np.asarray(x), np.asarray(before))]
    found = rules()
    np.testing.assert_allclose(
        found["gap"].scores(0, x, before, lens), probabilities[:, -1] - probabilities[:, -2], rtol=1e-5
    )
    np.testing.assert_allclose(found["similarity"].scores(0, x, before, lens), cosines, rtol=1e-5)
    linear = found["linear"]
    np.testing.assert_allclose(linear.scores(1, x, before, lens), x @ linear.weights[1] - 0.1, rtol=1e-5)
    np.testing.assert_array_equal(linear(1, x, before, lens), linear.scores(1, x, before, lens) > 0)
    assert not linear.with_thresholds([np.inf, np.inf])(0, x, before, lens).any()


def test_rules_come_back_from_files(tmp_path):
    for name, rule in rules().items():
        save_rule(tmp_path / f"{name}.npz", rule, EXITS)
        again, exits = load_rule(tmp_path / f"{name}.npz")
        assert type(again) is type(rule) and exits == EXITS
        jax.tree.map(np.testing.assert_array_equal, again, rule)
    (tmp_path / "other.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not an exit rule"):
        load_rule(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError):
        load_rule(tmp_path / "none.npz")


@pytest.mark.parametrize("name", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("gap", "similarity")), "linear"])
def test_a_trace_says_what_generation_does(rope, name):
    """Greedy text: at every token the trace's exit is generation's depth, and its best token the next one."""
    model, params = rope
    rule = rules()[name]
    out = generate_with_exits(
        model, params, [[1, 2, 3]], rule=rule, exit_layers=EXITS, max_new_tokens=20, max_waiting=99
    )
    trace = trace_exits(model, params, [out.tokens], EXITS, {name: rule})
    exits = first_exits(trace.scores[name], rule.thresholds)[2:-1]
    depths = np.array([1, 3, 4])
    np.testing.assert_array_equal(depths[exits][1:], out.depths[0, 1:])
    chosen = trace.best[:, 2:-1][exits, np.arange(len(exits))]
    np.testing.assert_array_equal(chosen[1:], out.tokens[0, 4:])
    assert len(set(out.depths[0])) > 1


def test_a_trace_has_the_best_tokens_of_the_logit_lens(rope):
    model, params = rope
    tokens = RNG.integers(0, 23, (2, 7)).astype(np.int32)
    segment_ids = np.array([[1] * 7, [1] * 4 + [0] * 3], np.int32)
    batch = Batch(tokens, np.roll(tokens, -1, 1), (segment_ids > 0).astype(np.float32), segment_ids,
                  np.tile(np.arange(7, dtype=np.int32), (2, 1)))  # fmt: skip
    trace = trace_exits(model, params, [batch, batch], EXITS, {}, num_streams=15)
    ids = top_tokens(model, params, tokens, 1, segment_ids=segment_ids, positions=batch.positions).ids[..., 0]
    expected = np.asarray(ids)[[*EXITS, LAYERS - 1]][:, segment_ids > 0]
    np.testing.assert_array_equal(trace.best, np.tile(expected, 2))
    assert trace.streams.shape == (2, 15, 16) and trace.targets.shape == (22,)
    for wrong in ([], [3], [1, 0]):
        with pytest.raises(ValueError, match="exit_layers"):
            trace_exits(model, params, [tokens], wrong, {})


def some_scores(num_tokens):
    """Scores that say how probable agreement is."""
    rng = np.random.default_rng(1)
    scores = rng.random((2, num_tokens))
    agrees = rng.random((2, num_tokens)) < np.stack([scores[0] ** 3, scores[1] ** 0.1])
    return scores, agrees


def test_calibrated_thresholds_keep_to_the_target():
    scores, agrees = some_scores(20_000)
    thresholds = calibrate(scores[:, :10_000], agrees[:, :10_000], [1, 3, 4], target=0.05)
    exits = first_exits(scores[:, 10_000:], thresholds)
    agrees = np.concatenate([agrees[:, 10_000:], np.ones((1, 10_000), bool)])
    disagreement = 1 - agrees[exits, np.arange(10_000)].mean()
    assert 0.04 < disagreement < 0.05
    assert thresholds[0] > thresholds[1]  # a score says less at the first exit
    never, always = (calibrate(scores, np.full(scores.shape, x), [1, 3, 4], target=0.01) for x in (False, True))
    assert (first_exits(scores, never) < 2).mean() < 0.01
    assert (first_exits(scores, always) == 0).mean() > 0.99
    for wrong in (dict(target=0), dict(confidence=1), dict(score_cost=-1)):
        with pytest.raises(ValueError):
            calibrate(*some_scores(100), [1, 3, 4], **wrong)
    with pytest.raises(ValueError, match="too few"):
        calibrate(*some_scores(30), [1, 3, 4])


def test_exits_that_do_not_pay_for_their_scores_are_given_up():
    scores, agrees = some_scores(20_000)
    choose = lambda cost: calibrate(scores, agrees, [1, 3, 4], target=0.05, score_cost=cost)
    cost = lambda thresholds, each: (
        np.array([1, 3, 4])[exits := first_exits(scores, thresholds)]
        + each * np.cumsum([*np.isfinite(thresholds), 0])[exits]
    ).mean()
    free, dear = choose(0.0), choose(3.0)
    assert np.isfinite(free).all() and np.isinf(dear).all()
    each = 0.3  # the last exit saves one layer at most, and not for all
    some = choose(each)
    assert np.isfinite(some).sum() == 1 and cost(some, each) < min(cost(free, each), 4)


def test_a_rule_without_its_unused_exits():
    rule = LinearRule(jnp.array([jnp.inf, 0.5, jnp.inf]), jnp.arange(6.0).reshape(3, 2), jnp.array([1.0, 2.0, 3.0]))
    small, layers = rule.without_unused([2, 4, 6])
    assert layers == [4] and small.thresholds.tolist() == [0.5] and small.bias.tolist() == [2.0]
    np.testing.assert_array_equal(small.weights, [[2.0, 3.0]])


def test_cost_of_a_score():
    config = ModelConfig(vocab_size=64, num_layers=2, embed_dim=16, num_heads=2, mixer="rope")
    params = jax.eval_shape(DecoderLM(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    sizes = [x.size for path, x in jax.tree.leaves_with_path(params) if "layers" in str(path[0])]
    assert score_cost(GapRule(jnp.zeros(1)), config, params) == pytest.approx(64 * 16 / (sum(sizes) / 2))
    assert score_cost(SimilarityRule(jnp.zeros(1)), config, params) == 0


def test_the_confidence_is_kept():
    """Of many calibrations, few give more than the target."""
    agree_share = lambda scores: scores**3
    num_over, grid = 0, np.linspace(0, 1, 20_001)[None]
    for seed in range(100):
        rng = np.random.default_rng(seed)
        scores = rng.random((1, 600))
        (threshold,) = calibrate(scores, rng.random((1, 600)) < agree_share(scores), [1, 2], target=0.1, seed=seed)
        leaves = grid > threshold
        num_over += (leaves * (1 - agree_share(grid))).mean() > 0.1
    assert num_over <= 11  # 5 are expected at most; 12 or more of 100 have a probability of 0.4 %


def test_a_settled_rule_finds_what_tells_agreement():
    rng = np.random.default_rng(2)
    streams = rng.normal(size=(3, 400, 8)).astype(np.float32)
    agrees = np.stack([streams[0, :, 2] > 0.5, streams[1, :, 5] < 0, np.ones(400, bool)])
    rule = settled_rule(streams, agrees)
    scores = [np.asarray(rule.scores(i, jnp.asarray(x), None, None)) for i, x in enumerate(streams)]
    assert all(((score > 0) == agree).mean() > 0.95 for score, agree in zip(scores, agrees))
    assert np.isinf(rule.thresholds).all()
    with pytest.raises(ValueError, match="not"):
        settled_rule(streams, agrees[:2])


def test_summaries_and_the_oracle(rope):
    model, params = rope
    trace = trace_exits(model, params, [RNG.integers(0, 23, (4, 50))], EXITS, {})
    oracle = oracle_exits(trace.agrees)
    perfect = summarise_exits(trace, oracle, EXITS, LAYERS)
    assert perfect.disagreement == 0 and perfect.accuracy == perfect.full_accuracy
    for i, exit in enumerate(oracle):
        column = trace.agrees[:, i]
        assert column[exit:].all() and (exit == 0 or not column[exit - 1])
    first = summarise_exits(trace, np.zeros_like(oracle), EXITS, LAYERS)
    assert first.disagreement == 1 - trace.agrees[0].mean()
    assert first.disagreement_low < first.disagreement < first.disagreement_high
    assert (first.mean_depth, first.layer_speedup, first.published_speedup) == (1, 4, np.inf)
    full = summarise_exits(trace, np.full_like(oracle, 2), EXITS, LAYERS)
    assert (full.disagreement, full.mean_depth, full.published_speedup) == (0, 4, 4 / 3)
    np.testing.assert_array_equal(full.exit_shares, [0, 0, 1])
