"""Which tokens and which parts of a model carry an association: interchange interventions on documents with a question.

A document tells pairs and asks for one of them (`path_jax.data.query_document`). It is corrupted by replacing the key,
or the value, that is asked for; then one site at one token gets its value from the run on the clean document. What that
restores of the answer's probability says whether the information passes there.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from path_jax.data import as_batch
from path_jax.data.query_document import QueryTask
from path_jax.interpretability.hooks import Site, as_sites, run, sites
from path_jax.interpretability.interventions import interchange_grid
from path_jax.interpretability.outcomes import accuracy, answer_probability, attribution_score, logit_difference
from path_jax.models import DecoderLM
from path_jax.models.cache import init_cache
from path_jax.models.config import ModelConfig

CORRUPTED = "key", "value"
# Taps of a mixer that are patched together: what turns the keys, what is compared and fetched, what asks.
_PARTS = ("w", "beta"), ("k", "v"), ("q",), ("log_forget",), ("conv_out",), ("recurrence",), ("gate",)


class RecallAnalysis(NamedTuple):
    """What happened on n documents.

    Attributes:
      behaviour: {"accuracy", "probability", "logit_difference" (to the value that replaces the answer): [n]}.
      sites, roles: rows and columns of the grids; roles are "key", "value", "divider", "query" and maybe "type".
      attribution: {corrupted token: share of the lost probability that a site at a token restores,
        [sites, roles, n]}, NaN in documents whose corruption loses no more than `threshold`.
      parts: {corrupted token: {sites joined by " + ": the same for them together, at all tokens [n]}}.
    """

    behaviour: dict[str, Float[np.ndarray, "n"]]
    sites: tuple[Site, ...]
    roles: tuple[str, ...]
    attribution: dict[str, Float[np.ndarray, "sites roles n"]]
    parts: dict[str, dict[str, Float[np.ndarray, "n"]]]
    threshold: float

    def at(self, site: Site | str, role: str, corrupted: str = "key") -> Float[np.ndarray, "n"]:
        """Attribution of one site at one token."""
        (site,) = as_sites(site)
        return self.attribution[corrupted][self.sites.index(site), self.roles.index(role)]


def analyse_recall(
    model: DecoderLM,
    params,
    task: QueryTask,
    *,
    seed: int = 1,
    num_examples: int = 320,
    batch_size: int = 64,
    patched: Sequence[Site | str] | None = None,
    corrupted: Sequence[str] = CORRUPTED,
    parts: Sequence[Sequence[Site | str]] = (),
    threshold: float = 0.01,
) -> RecallAnalysis:
    """Behaviour and attribution of a model that recalls.

    Args:
      task: of the documents; only their answers are looked at.
      seed: of the series of documents; `TaskStream` trains on even ones.
      num_examples: documents, rounded up to whole batches; the paper has 320.
      patched: sites, all that have tokens by default.
      corrupted: "key", "value" or both.
      parts: groups of sites to patch together at all tokens; `mixer_parts` has those of a model's mixers.
      threshold: documents whose corruption loses no more probability have no attribution.

    Raises:
      ValueError: for an unknown site or corruption.

    Source: Arora et al., "Mechanistic evaluation of Transformers and state space models", 2025, section 3.
    """
    if unknown := set(corrupted) - set(CORRUPTED):
        raise ValueError(f"corrupted={sorted(unknown)} is not among {', '.join(CORRUPTED)}")
    patched = sites(model.config) if patched is None else as_sites(patched)
    parts = {" + ".join(map(str, sites)): sites for sites in map(as_sites, parts)}
    batches = [
        _analyse_batch(
            model, params, task, seed, np.arange(start, start + batch_size), patched, corrupted, parts, threshold
        )
        for start in range(0, num_examples, batch_size)
    ]
    roles = batches[0][0]
    behaviour, attribution, parts = jax.tree.map(
        lambda *values: np.concatenate(values, axis=-1), *(batch[1:] for batch in batches)
    )
    return RecallAnalysis(behaviour, patched, roles, attribution, parts, threshold)


def mixer_parts(config: ModelConfig) -> list[tuple[Site, ...]]:
    """Sites in each layer's mixer that carry information together: w and beta, k and v, q, and so on."""
    there = set(sites(config))
    groups = [tuple(Site(layer, tap) for tap in part) for layer in range(config.num_layers) for part in _PARTS]
    return [group for group in groups if there.issuperset(group)]


def _analyse_batch(model, params, task, seed, index, patched, corrupted, parts, threshold):
    examples, places = task.examples(seed, index), task.sites(seed, index)
    rows = np.arange(len(index))
    answer_at = places.pop("answer")
    answers = examples.tokens[rows, answer_at]
    inputs = _inputs(examples)
    tokens = np.maximum(examples.tokens, 0)
    other = task.replacements(examples.tokens, "answer", seed, index)[rows, answer_at]
    metric = answer_probability(answer_at - 1, answers)
    clean = _measured(
        model, params, tokens, inputs,
        (accuracy(answer_at - 1, answers), metric, logit_difference(answer_at - 1, answers, other)),
    )  # fmt: skip
    behaviour = dict(zip(("accuracy", "probability", "logit_difference"), map(np.asarray, clean)))
    attribution, together = {}, {}
    for name in corrupted:
        base = np.maximum(task.replacements(examples.tokens, name, seed, index), 0)
        (lost,) = _measured(model, params, base, inputs, (metric,))
        restored = [
            interchange_grid(model, params, base, tokens, grid_sites, where, metric, inputs=inputs)
            for grid_sites, where in ((patched, np.stack(list(places.values()))), _masks(parts, base.shape))
        ]
        alone, groups = (np.asarray(attribution_score(x, lost, behaviour["probability"], threshold)) for x in restored)
        attribution[name], together[name] = alone, dict(zip(parts, groups))
    return tuple(places), behaviour, attribution, together


def _masks(parts, shape) -> tuple[list[Site], np.ndarray]:
    """Sites of all groups, and where each group patches them: at all tokens. [groups, sites, *shape]."""
    members = list(dict.fromkeys(site for group in parts.values() for site in group))
    is_patched = np.array([[site in group for site in members] for group in parts.values()], bool)
    is_patched = is_patched.reshape(len(parts), len(members), *[1] * len(shape))
    return members, np.broadcast_to(is_patched, (len(parts), len(members), *shape))


def _inputs(examples):
    batch = as_batch(examples)
    return {"segment_ids": batch.segment_ids, "positions": batch.positions}


@functools.partial(jax.jit, static_argnames="model")
def _measured(model, params, tokens, inputs, metrics):
    out, _ = run(model, params, tokens, **inputs)
    return [metric(out) for metric in metrics]


def mean_and_interval(
    values: Float[np.ndarray, "*grid n"], num_resamples: int = 1000, seed: int = 0
) -> Float[np.ndarray, "3 *grid"]:
    """Mean over documents that are not NaN, and the ends of its 95 % bootstrap interval (percentiles)."""
    num_rows = values.shape[-1]
    counts = np.random.default_rng(seed).multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=num_resamples)
    is_there = ~np.isnan(values)

    def mean(weights):
        with np.errstate(invalid="ignore"):  # 0 / 0 where no document is left
            return (np.where(is_there, values, 0) @ weights) / (is_there @ weights)

    ends, has_some = np.full((2, *values.shape[:-1]), np.nan), is_there.any(axis=-1)
    if has_some.any():
        ends[:, has_some] = np.nanpercentile(mean(counts.T.astype(float))[has_some], [2.5, 97.5], axis=-1)
    return np.concatenate([mean(np.ones(num_rows))[None], ends])


def mechanism(analysis: RecallAnalysis) -> dict[str, np.ndarray]:
    """Shares of the association that reach the second layer by each way: mean, low, high, [3] each.

    With the key corrupted and the second layer's input restored at one token:

      induction: at the value. The first layer has stored there to which key it belongs.
      direct_second: at the key. The second layer reads the key itself, and the value beside it.
      direct_first: at the query. The first layer has found the answer already.

    Raises:
      ValueError: for a model of one layer, or an analysis without that site or that corruption.

    Source: Arora et al., 2025, section 3; their induction and direct-retrieval scores.
    """
    site = Site(1, "resid_pre")
    if site not in analysis.sites or "key" not in analysis.attribution:
        raise ValueError(f"there is no attribution of {site} with a corrupted key")
    roles = {"induction": "value", "direct_second": "key", "direct_first": "query"}
    return {name: mean_and_interval(analysis.at(site, role)) for name, role in roles.items()}


def decode_state_bytes(config: ModelConfig, length: int) -> int:
    """Bytes that a row of `length` tokens keeps for the next one, in all layers."""
    state = jax.eval_shape(lambda: init_cache(config, 1, length))
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(state))
