"""What can be read off captured values: linear probes, and where attention goes. Runs on the host."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Float, Int

from path_jax.interpretability.hooks import Site, as_site


@dataclasses.dataclass(frozen=True)
class Probe:
    """How well a linear classifier reads a label off a site's value at one position of each row."""

    site: Site
    role: str
    accuracy: float
    control: float  # accuracy of the same probe for labels that are shuffled over the rows
    num_rows: int


def linear_probes(
    values: Mapping[Site | str, Array],
    labels: Int[Array, "B"],
    positions: Mapping[str, Int[Array, "B"]],
    *,
    folds: int | None = None,
    strength: float = 1.0,
    seed: int = 0,
) -> list[Probe]:
    """Fits a probe for every site and role of a position.

    A probe is a logistic regression on standardised features (of all heads, where a value has heads).

    Args:
      values: {site: [B, T, ...]}, as `hooks.run` captures.
      labels: a class for each row.
      positions: {role: [B]}; rows where the position is outside 0 ... T - 1 do not take part in that role's probes.
      folds: of a cross-validation; by default the first half of the rows trains and the second half tests.
      strength: of the L2 penalty; seed: of folds and shuffled labels.

    Raises:
      ImportError: scikit-learn is missing.
      ValueError: if a shape does not fit.

    Source: Alain and Bengio, 2016; control tasks after Hewitt and Liang, 2019, here with one shuffle of the labels,
    which shows what chance and the classes' sizes give.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("probes need scikit-learn; run: pip install path-jax[interp]") from error

    def score(features, labels):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1 / strength, max_iter=1000))
        if folds is None:
            half = len(labels) // 2
            return float(probe.fit(features[:half], labels[:half]).score(features[half:], labels[half:]))
        split = StratifiedKFold(folds, shuffle=True, random_state=seed)
        return float(cross_val_score(probe, features, labels, cv=split).mean())

    labels, probes = np.asarray(labels), []
    for site, value in values.items():
        site = as_site(site)
        value = np.asarray(value, np.float32)
        value = np.moveaxis(value, 2, 1) if site.tap == "attn_probs" else value
        if labels.shape != value.shape[:1]:
            raise ValueError(f"labels are {labels.shape}, but {site} has {value.shape[0]} rows")
        for role, at in positions.items():
            rows = _rows(role, at, *value.shape[:2])
            features, classes = value[rows, np.asarray(at)[rows]].reshape(len(rows), -1), labels[rows]
            shuffled = np.random.default_rng(seed).permutation(classes)
            probes.append(Probe(site, role, score(features, classes), score(features, shuffled), len(rows)))
    return probes


def attention_summary(
    weights: Mapping[Site | str, Float[Array, "B N T S"]],
    queries: Mapping[str, Int[Array, "B"]],
    keys: Mapping[str, Int[Array, "B"]],
) -> dict[Site, Float[np.ndarray, "N Q K"]]:
    """Mean attention of each head from each role of queries to each role of keys.

    Args:
      weights: captured at `attn_probs` sites of a model `with_weights`.
      queries, keys: {role: position in each row}; rows where either is outside the sequence are left out.

    Returns:
      {site: means}, roles in the order given; NaN where no row takes part.

    Raises:
      ValueError: if a shape does not fit, or a site has no attention weights.
    """
    summary = {}
    for site, value in weights.items():
        site, value = as_site(site), np.asarray(value, np.float32)
        if site.tap != "attn_probs":
            raise ValueError(f"{site} has no attention weights; capture attn_probs")
        batch, num_heads, length, size = value.shape
        means = np.full((num_heads, len(queries), len(keys)), np.nan, np.float32)
        for i, (query_role, query) in enumerate(queries.items()):
            for j, (key_role, key) in enumerate(keys.items()):
                rows = np.intersect1d(_rows(query_role, query, batch, length), _rows(key_role, key, batch, size))
                if len(rows):
                    means[:, i, j] = value[rows, :, np.asarray(query)[rows], np.asarray(key)[rows]].mean(axis=0)
        summary[site] = means
    return summary


def _rows(role, positions, batch, length) -> np.ndarray:
    """Rows in which a position is inside the sequence."""
    positions = np.asarray(positions)
    if positions.shape != (batch,):
        raise ValueError(f"positions of {role!r} are {positions.shape}, not one for each of {batch} rows")
    return np.flatnonzero((positions >= 0) & (positions < length))
