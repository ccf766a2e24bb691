"""What a model computes on its way, and what follows when it is changed.

out, values = run(model, params, tokens, capture=["0.mixer_out", "1.mixer.q"])
restored = interchange_grid(model, params, corrupted, clean, sites, positions, answer_probability(at, answers))
"""

from path_jax.interpretability.attribution import attribution_patching, exact_patching, path_patch
from path_jax.interpretability.hooks import Site, run, selection, site_shapes, sites, with_weights
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
    strict_kendall_tau,
)
from path_jax.interpretability.states import state_patch

__all__ = [
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
