"""What a model computes on its way, and what follows when it is changed.

out, values = run(model, params, tokens, capture=["0.mixer_out", "1.mixer.q"])
restored = interchange_grid(model, params, corrupted, clean, sites, positions, answer_probability(at, answers))
"""

from path_jax.interpretability.attribution import attribution_patching, exact_patching, path_patch
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
from path_jax.interpretability.exit_rules import GapRule, LinearRule, SimilarityRule, load_rule, save_rule, settled_rule
from path_jax.interpretability.hooks import Site, run, selection, site_shapes, sites, with_weights
from path_jax.interpretability.implant_trials import ImplantReport, Pairs
from path_jax.interpretability.implants import find_pairs, implant
from path_jax.interpretability.interventions import ablate, interchange, interchange_grid, patch, replacements, steer
from path_jax.interpretability.logit_lens import TopTokens, stream_top_tokens, top_tokens
from path_jax.interpretability.outcomes import accuracy, answer_probability, attribution_score, logit_difference
from path_jax.interpretability.probes import Probe, attention_summary, linear_probes
from path_jax.interpretability.saturation import (
    CorpusSaturation,
    RankOrder,
    SaturationSummary,
    is_early,
    permutation_test,
    rank_order,
    saturation_layers,
    saturation_summary,
    strict_kendall_tau,
)
from path_jax.interpretability.states import state_patch
from path_jax.interpretability.stream_sample import StreamSample, collect_streams
from path_jax.interpretability.transitions import (
    ProbeReport,
    TransitionProbe,
    Transitions,
    balance,
    fit_transition_probe,
    rank_in_progress,
)

__all__ = [
    "ExitSummary",
    "ExitTrace",
    "calibrate",
    "first_exits",
    "oracle_exits",
    "summarise_exits",
    "trace_exits",
    "ExitMonitor",
    "GapRule",
    "LinearRule",
    "SimilarityRule",
    "load_rule",
    "save_rule",
    "settled_rule",
    "ImplantReport",
    "Pairs",
    "find_pairs",
    "implant",
    "StreamSample",
    "collect_streams",
    "ProbeReport",
    "TransitionProbe",
    "Transitions",
    "balance",
    "fit_transition_probe",
    "rank_in_progress",
    "CorpusSaturation",
    "Probe",
    "RankOrder",
    "SaturationSummary",
    "Site",
    "TopTokens",
    "ablate",
    "accuracy",
    "answer_probability",
    "attention_summary",
    "attribution_patching",
    "attribution_score",
    "exact_patching",
    "interchange",
    "interchange_grid",
    "is_early",
    "linear_probes",
    "logit_difference",
    "patch",
    "path_patch",
    "permutation_test",
    "rank_order",
    "replacements",
    "run",
    "saturation_layers",
    "saturation_summary",
    "selection",
    "site_shapes",
    "sites",
    "state_patch",
    "steer",
    "stream_top_tokens",
    "strict_kendall_tau",
    "top_tokens",
    "with_weights",
]
