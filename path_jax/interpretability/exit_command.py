"""`python -m path_jax.interpretability early-exit`: chooses exit rules by a text, and measures what they give."""

import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from path_jax.data import Batch
from path_jax.evaluation.text_model import TextModel
from path_jax.interpretability.exit_calibration import (
    ExitSummary,
    ExitTrace,
    calibrate,
    first_exits,
    oracle_exits,
    summarise_exits,
    trace_exits,
)
from path_jax.interpretability.exit_monitor import ExitMonitor
from path_jax.interpretability.exit_report import EarlyExits, Timing, exit_tables, write_exit_report
from path_jax.interpretability.exit_rules import (
    GapRule,
    LinearRule,
    Rule,
    SimilarityRule,
    save_rule,
    score_cost,
    settled_rule,
)
from path_jax.interpretability.logit_lens import top_tokens
from path_jax.interpretability.modality_command import say
from path_jax.interpretability.saturation_command import add_text_arguments, batches_of, load, strata
from path_jax.interpretability.stream_sample import collect_streams
from path_jax.interpretability.transitions import fit_transition_probe
from path_jax.models import DecoderLM
from path_jax.models.early_exit import MISSING, generate_with_exits
from path_jax.models.generate import generate

_RULES = ("settled", "transition", "gap", "similarity")
_TARGETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_RANKS = 3  # that a transition probe tells apart
_PROMPT = 64  # tokens


def add_parser(commands) -> None:
    """Adds the command to those of the package."""
    parser = commands.add_parser("early-exit", help="rules by which tokens leave early: what they change and save")
    add_text_arguments(parser)
    parser.add_argument(
        "--target", type=float, default=0.01, help="share of tokens that may differ (default %(default)s)"
    )
    parser.add_argument("--exit-layers", metavar="L,L,...", help="layers to leave after; by default in the upper half")
    parser.add_argument("--rules", default=",".join(_RULES), help="default %(default)s")
    parser.add_argument(
        "--num-tokens", type=int, default=6000, help="to choose thresholds by, and to test each text on"
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="to generate for the timing; 0 for none")
    parser.add_argument("--rows", type=int, nargs="*", default=[1], help="of generated batches (default 1)")
    parser.add_argument("--min-margin", type=float, default=0.0, help="of probability at an exit; closer goes on")
    parser.set_defaults(command=_run)


def _run(args) -> None:
    if len(args.checkpoint) > 1:
        raise ValueError("early-exit takes one checkpoint")
    names = args.rules.split(",")
    if unknown := [name for name in names if name not in _RULES]:
        raise ValueError(f"--rules={unknown[0]} is unknown; choose from {', '.join(_RULES)}")
    text_model = load(args.checkpoint[0], max(args.length, args.long or 0))
    model, params, num_layers = DecoderLM(text_model.config), text_model.params, text_model.config.num_layers
    exit_layers = _exit_layers(args.exit_layers, num_layers)
    depths = [*(layer + 1 for layer in exit_layers), num_layers]

    texts = strata(args)
    home = next(iter(texts))
    heldout = {}
    for name, (items, length) in texts.items():
        num_tokens = (3 if name == home else 1) * args.num_tokens
        heldout[name] = batches_of(text_model, items, args, num_tokens=num_tokens, length=length)
    batches, third = heldout[home], max(1, len(heldout[home]) // 3)
    if len(batches) < 3:
        raise ValueError(
            f"{home} has too little text: {len(batches)} batches of {args.batch_size} windows, 3 are needed"
        )
    batches = _shuffled(batches, args.seed)
    fitting, choosing, heldout[home] = batches[:third], batches[third : 2 * third], batches[2 * third :]

    say("fitting rules")
    rules = _fit(model, params, fitting, exit_layers, names, args)
    say("choosing thresholds")
    chosen = trace_exits(model, params, choosing, exit_layers, rules)
    costs = {name: score_cost(rule, text_model.config, params) for name, rule in rules.items()}
    choose = lambda name, target: calibrate(
        chosen.scores[name], chosen.agrees, depths, target=target, score_cost=costs[name], seed=args.seed
    )
    rules = {name: rule.with_thresholds(choose(name, args.target)) for name, rule in rules.items()}
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rule in rules.items():
        save_rule(args.output / f"{name}.npz", *rule.without_unused(exit_layers))

    summaries, targets = {}, {}
    for name, found in heldout.items():
        say(f"testing {name}")
        trace = trace_exits(model, params, found, exit_layers, rules)
        summaries[name] = _summaries(trace, rules, exit_layers, num_layers)
        if name == home:
            targets = {rule: [
                (target, summary.disagreement, summary.layer_speedup) for target in _TARGETS
                for summary in [summarise_exits(
                    trace, first_exits(trace.scores[rule], choose(rule, target)), exit_layers, num_layers
                )]
            ] for rule in rules}  # fmt: skip
    timings = []
    if args.new_tokens:
        for rows in args.rows:
            timings += _timings(text_model, heldout[home], rules, exit_layers, rows, args)
    monitor = _monitor_check(text_model, heldout[home], exit_layers, args) if args.new_tokens else ()
    exits = EarlyExits(num_layers, exit_layers, args.target, summaries, targets, timings, monitor)
    for table in exit_tables(exits):
        Console().print(table)
    print("\n".join(exits.monitor))
    try:
        say(f"report: {write_exit_report(args.output, exits)}")
    except ImportError as error:
        say(f"no report.html: {error}")


def _exit_layers(text: str | None, num_layers: int) -> list[int]:
    """As given, or in the upper half, the same distance apart."""
    if text:
        try:
            return [int(x) for x in text.split(",")]
        except ValueError as error:
            raise ValueError(f"--exit-layers={text} must be numbers, as in 12,16,20") from error
    step = max(1, num_layers // 10)
    return list(range(num_layers - 1 - step, num_layers // 2 - 2, -step))[::-1]


def _shuffled(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """The same windows in random order: thresholds keep to the target on text like that which they were chosen by."""
    rows = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    order = np.random.default_rng(seed).permutation(len(rows.tokens))
    return [jax.tree.map(lambda x: x[some], rows) for some in np.split(order, len(batches))]


def _fit(model, params, batches: Sequence[Batch], exit_layers, names, args) -> dict[str, Rule]:
    """Rules that never fire yet."""
    never = jnp.full(len(exit_layers), jnp.inf)
    rules: dict[str, Rule] = {"gap": GapRule(never), "similarity": SimilarityRule(never)}
    if "settled" in names:
        trace = trace_exits(model, params, batches, exit_layers, {}, num_streams=args.num_tokens)
        rules["settled"] = settled_rule(trace.streams, trace.agrees[:, : trace.streams.shape[1]])
    if "transition" in names:
        sample = collect_streams(model, params, batches, _RANKS, num_tokens=min(2000, args.num_tokens), seed=args.seed)
        probe, _ = fit_transition_probe(sample.streams, sample.layers, groups=sample.rows, seed=args.seed)
        # The best token is decided where the log-odds of deciding on it are low.
        weights = -probe.weights[0] / probe.scale
        bias = -probe.bias[0] - weights @ probe.mean
        repeat = lambda x: jnp.repeat(jnp.asarray(x, jnp.float32)[None], len(exit_layers), axis=0)
        rules["transition"] = LinearRule(never, repeat(weights), repeat(bias))
    return {name: rules[name] for name in names}


def _summaries(trace: ExitTrace, rules: Mapping[str, Rule], exit_layers, num_layers) -> dict[str, ExitSummary]:
    exits = {name: first_exits(trace.scores[name], rule.thresholds) for name, rule in rules.items()}
    exits["oracle"] = oracle_exits(trace.agrees)
    return {name: summarise_exits(trace, found, exit_layers, num_layers) for name, found in exits.items()}


def _prompts(batches: Sequence[Batch], num: int) -> list[list[int]]:
    """Beginnings of windows, all of one length, the same again where there are too few."""
    counts = np.concatenate([(batch.segment_ids > 0).sum(axis=1) for batch in batches])
    length = min(_PROMPT, counts.max())
    rows = np.concatenate([batch.tokens for batch in batches])[counts >= length, :length]
    return np.resize(rows, (num, length)).tolist()


def _timings(text_model: TextModel, batches, rules, exit_layers, rows: int, args) -> list[Timing]:
    """Of full depth and of each rule, in turn, each once to compile and once more to measure.

    A batch with exits gives every token to the host, and so does full depth where it is streamed; by itself, like a
    single row with exits, it is one loop on the device.
    """
    model, params, num_layers = DecoderLM(text_model.config), text_model.params, text_model.config.num_layers
    prompts = _prompts(batches, rows)
    ways = {"full depth": {}, "full depth, streamed": {"on_token": lambda *_: False}} | {
        f"{name}, {missing}": (*rule.without_unused(exit_layers), missing)
        for name, rule in rules.items()
        for missing in MISSING
    }
    timings, full_rate = [], np.nan
    for name, options in ways.items():
        say(f"timing {name}, {rows} rows")
        for _ in range(2):
            start = time.perf_counter()
            if isinstance(options, dict):
                tokens = np.asarray(generate(model, params, prompts, max_new_tokens=args.new_tokens, **options))
                depth = runs = float(num_layers)
            else:
                rule, used_layers, missing = options
                out = generate_with_exits(
                    model, params, prompts, rule=rule, exit_layers=used_layers, max_new_tokens=args.new_tokens,
                    missing=missing, min_margin=args.min_margin,
                )  # fmt: skip
                tokens, depth = out.tokens, float(out.depths[:, 1:].mean())
                runs = out.num_layer_runs / max(out.num_steps, 1)
            seconds = time.perf_counter() - start
        rate = rows * args.new_tokens / seconds
        full_rate = rate if name == "full depth" else full_rate
        different = 0.0 if isinstance(options, dict) else _disagreement(model, params, tokens, len(prompts[0]))
        timings.append(Timing(name, rows, rate, rate / full_rate, depth, runs, different))
        jax.clear_caches()  # of programs that the next way has no use for, and whose memory maps could run out
    return timings


def _disagreement(model, params, tokens, start: int) -> float:
    """Share of generated tokens, from `start` on, that full depth would not have taken after the same text."""
    best = top_tokens(model, params, tokens[:, :-1], 1).ids[-1, ..., 0]
    return float((best[:, start - 1 :] != tokens[:, start:]).mean())


def _monitor_check(text_model: TextModel, batches, exit_layers, args) -> list[str]:
    """What a monitor makes of a rule that lets every token leave at the first exit."""
    limit = 2 * args.target
    monitor = ExitMonitor(limit, seed=args.seed)
    bad = SimilarityRule(jnp.full(len(exit_layers), -2.0))
    say("checking the monitor")
    while not monitor.is_tripped and monitor.num_exits < 500:
        generate_with_exits(
            DecoderLM(text_model.config), text_model.params, _prompts(batches, 1), rule=bad, exit_layers=exit_layers,
            max_new_tokens=500, monitor=monitor,
        )  # fmt: skip
    low, high = monitor.bounds
    return [
        f"A rule that lets every token leave after layer {exit_layers[0]}, monitor with limit {limit:.1%}: "
        + (f"exits ended after {monitor.num_exits} tokens" if monitor.is_tripped else "not ended in 500 tokens")
        + f", {monitor.num_different} of {monitor.num_checked} compared were different, "
        f"95 % bounds {low:.1%} ... {high:.1%} at all times."
    ]
