"""Generation that leaves layers out against a loop over tokens and layers without a cache."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.decoder_lm import Block
from path_jax.models.early_exit import generate_with_exits
from path_jax.models.generate import generate

VOCAB, LAYERS, STEPS = 23, 4, 9
PROMPTS = [[1, 2, 3], [4], [5, 6]]
EXITS = [0, 2]


@flax.struct.dataclass
class SomeTokens:
    """Fires where a number of the stream, which is as good as random, is above a limit."""

    limit: float

    def __call__(self, exit, x, before, lens):
        return jnp.sin(50 * x[:, 0]) + 0.3 * exit > self.limit


NEVER, ALWAYS = SomeTokens(9.0), SomeTokens(-9.0)


def make_model(mixer="rope", **options):
    config = ModelConfig(VOCAB, LAYERS, 16, 2, mlp_dim=32, mixer=mixer, scan_layers=False, **options)
    model = DecoderLM(config)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    return model, jax.tree.map(lambda x: 5 * x, params)


@pytest.fixture(scope="module")
def rope():
    return make_model()


def follow(model, params, prompt, rule, missing):
    """Tokens and depths by definition: each layer over the inputs that all tokens so far gave it."""
    size = len(prompt) + STEPS
    blocks = [
        jax.jit(
            lambda x, i=i: Block(model.config, i).apply(
                {"params": params[f"layers_{i}"]}, x[None], jnp.arange(size)[None], None
            )[0][0]
        )
        for i in range(LAYERS)
    ]
    lens = lambda x: model.apply({"params": params}, x, method="lens")
    embed = lambda t: model.apply({"params": params}, jnp.array([[t]]), jnp.zeros((1, 1), int), method="embed_tokens")
    tokens, depths = list(prompt), []
    inputs = np.zeros((LAYERS + 1, size, model.config.embed_dim), np.float32)  # of layers, and what the last one gives
    for at in range(size):
        is_new = at >= len(prompt)
        inputs[0, at] = embed(tokens[at])[0, 0]
        depth = LAYERS
        for i in range(LAYERS):
            inputs[i + 1, at] = blocks[i](inputs[i])[at]
            if i in EXITS and is_new and depth == LAYERS:
                x, before = jnp.array(inputs[i + 1, at][None]), jnp.array(inputs[i, at][None])
                if rule(EXITS.index(i), x, before, lens)[0]:
                    depth = i + 1
                    if missing == "propagate":
                        inputs[depth:, at] = inputs[depth, at]
                        break
        if at >= len(prompt) - 1:
            tokens.append(int(jnp.argmax(lens(jnp.array(inputs[depth, at])))))
            depths.append(depth)
    return tokens[:size], depths[:STEPS]


@pytest.mark.parametrize(
    ("mixer", "missing"),
    [
        ("rope", "recompute"),
        ("mamba", "propagate"),
        *(
            pytest.param(*item, marks=pytest.mark.slow)
            for item in (
                ("rope", "propagate"),
                ("mamba", "recompute"),
                ("path_fox", "recompute"),
                ("path_fox", "propagate"),
            )
        ),
    ],
)
def test_tokens_are_those_of_the_definition(mixer, missing):
    model, params = make_model(mixer)
    rule = SomeTokens(0.5)
    out = generate_with_exits(
        model, params, PROMPTS, rule=rule, exit_layers=EXITS, max_new_tokens=STEPS, missing=missing, max_waiting=STEPS
    )
    assert {1, 3, 4} == set(out.depths.ravel())
    for row, prompt in enumerate(PROMPTS):
        tokens, depths = follow(model, params, prompt, rule, missing)
        np.testing.assert_array_equal(out.tokens[row, : len(tokens)], tokens)
        np.testing.assert_array_equal(out.depths[row], depths)
        if row == 0:
            alone = generate_with_exits(
                model, params, [prompt], rule=rule, exit_layers=EXITS, max_new_tokens=STEPS, missing=missing,
                max_waiting=STEPS,
            )  # fmt: skip
            np.testing.assert_array_equal(alone.tokens[0], tokens)
            np.testing.assert_array_equal(alone.depths[0], depths)


@pytest.mark.parametrize("missing", ["recompute", "propagate"])
def test_without_exits_it_is_generate(rope, missing):
    run = lambda rule, exits=EXITS, **options: generate_with_exits(
        *rope, PROMPTS, rule=rule, exit_layers=exits, max_new_tokens=STEPS, missing=missing, **options
    )
    full = np.asarray(generate(*rope, PROMPTS, max_new_tokens=STEPS))
    out = run(NEVER)
    np.testing.assert_array_equal(out.tokens, full)
    assert (out.depths == LAYERS).all() and out.num_steps == STEPS - 1
    assert out.num_layer_runs == LAYERS * out.num_steps
    np.testing.assert_array_equal(run(ALWAYS, min_margin=1.0).tokens, full)
    np.testing.assert_array_equal(run(ALWAYS, exits=[]).tokens, full)
    if missing == "recompute":
        np.testing.assert_array_equal(run(ALWAYS, max_waiting=1).depths[0], [4, 1, 4, 1, 4, 1, 4, 1, 4])


def test_sampling_and_stops_are_those_of_generate(rope):
    options = dict(max_new_tokens=STEPS, temperature=1.0, top_k=5, rng=jax.random.key(1))
    full = np.asarray(generate(*rope, PROMPTS, **options))
    stop = int(full[0, 5])
    options["stop_token"] = stop
    full = np.asarray(generate(*rope, PROMPTS, **options))
    out = generate_with_exits(*rope, PROMPTS, rule=NEVER, exit_layers=EXITS, **options)
    np.testing.assert_array_equal(out.tokens, full)
    (ends,) = np.nonzero(full[0, 3:] == stop)
    assert (out.depths[0] > 0).sum() == ends[0] + 1


class Recording:
    """Checks every second token, and stops exits after some disagreements."""

    def __init__(self, limit):
        self.seen, self.limit, self.num = [], limit, 0

    @property
    def is_tripped(self):
        return self.seen.count(False) >= self.limit

    def foresee(self, num):
        return (np.arange(num) + self.num) % 2 == 0

    def choose(self, num):
        chosen = self.foresee(num)
        self.num += num
        return chosen

    def observe(self, agreed):
        self.seen += agreed.tolist()


def test_a_monitor_sees_full_depth_and_ends_exits(rope):
    monitor = Recording(limit=2)
    out = generate_with_exits(
        *rope, PROMPTS[:1], rule=ALWAYS, exit_layers=[0], max_new_tokens=30, monitor=monitor, max_waiting=100
    )
    assert monitor.seen.count(False) == 2 and not monitor.seen[-1]
    first_full = 2 * len(monitor.seen)  # the first token has all layers, then every second one is checked
    np.testing.assert_array_equal(out.depths[0, 1:first_full], ([4, 1] * 30)[: first_full - 1])
    assert (out.depths[0, first_full:] == LAYERS).all()
    # A step at full depth whose caches are exact gives the token of full depth.
    again = np.asarray(generate(*rope, out.tokens[:, :-1][:, : 3 + first_full], max_new_tokens=1))
    assert again[0, -1] == out.tokens[0, 3 + first_full]


@pytest.mark.parametrize(
    ("missing", "options"),
    [
        ("recompute", dict(max_waiting=2, min_margin=0.2)),
        ("recompute", dict(temperature=1.0, rng=jax.random.key(3), stop_token=7)),
        ("propagate", dict(min_margin=0.2)),
    ],
)
def test_a_single_row_on_the_device_is_that_of_the_host(rope, missing, options):
    """Somebody who wants to see every token gets them one by one."""

    def run(**more):
        monitor = Recording(limit=3)
        out = generate_with_exits(
            *rope, PROMPTS[:1], rule=SomeTokens(0.3), exit_layers=EXITS, max_new_tokens=40, missing=missing,
            monitor=monitor, **options, **more,
        )  # fmt: skip
        return out, monitor

    (ours, monitor), (wanted, other) = run(), run(on_token=lambda token, is_running: False)
    for found, expected in zip(ours, wanted):
        np.testing.assert_array_equal(found, expected)
    assert monitor.seen == other.seen and monitor.num == other.num > 2
    assert len(set(ours.depths[0]) - {0}) > 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"exit_layers": [2, 1]},
        {"exit_layers": [LAYERS - 1]},
        {"missing": "guess"},
        {"max_waiting": 0},
        {"min_margin": 2.0},
        {"max_new_tokens": 0},
    ],
)
def test_wrong_arguments_are_named(rope, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate_with_exits(*rope, [[1]], **dict(rule=NEVER, exit_layers=EXITS, max_new_tokens=2) | wrong)
