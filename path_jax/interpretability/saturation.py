"""Top-k saturation: from which layer on a model's best tokens stay what they are, and whether that goes in their order.

The token of rank i (0 is the best) saturates at the first layer from which on the i-th best token of every layer is the
i-th best of the last one. Runs on the host, on the ids of `logit_lens`. Axes: k ranks, n tokens, L layers from 0.

A rank that is the same in all layers saturates at layer 0. With `as_published=True` functions do what the published
code does: such a rank gets L (but 0 in its separate function for the top-1, which is row 0 of ours without the option),
so the filter drops tokens whose best one never changes, and a token whose ranks all saturate at the last layer is an
IndexError. Layers and the functions that read them take the same option.

Source: Lioubashevski et al., "Looking beyond the top-1: Transformers determine top tokens in order", 2024 (arXiv
2410.20210), and its code beyond_top1.

Not supported: dependence between tokens of a text; p-values take tokens to be independent.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

MAX_SHARE = 0.85  # of the layers, by which the best token of a token that takes part has saturated
_LEAST_RANKS = 3  # that Kendall's tau compares
_ROUNDING = 1e-12


class RankOrder(NamedTuple):
    """In which place each rank saturates: 1 + the number of the token's ranks that do so in an earlier layer."""

    means: Float[np.ndarray, "k"]  # NaN where no token takes part
    standard_errors: Float[np.ndarray, "k"]  # population standard deviation / sqrt(count)
    counts: Int[np.ndarray, "k"]  # tokens that take part
    p_values: Float[np.ndarray, "k-1"]  # two-sided t-test between neighbouring ranks; NaN where it is undefined


class SaturationSummary(NamedTuple):
    """Statistics of a corpus, of the tokens that the filter keeps unless said otherwise; NaN of no token."""

    num_tokens: int  # of the corpus
    num_kept: int  # by the filter
    num_compared: int  # of which tau is defined
    mean_layers: Float[np.ndarray, "k"]
    order: RankOrder
    tau: float  # mean strict Kendall tau of the tokens compared
    p_value: float  # of tau, by permutations
    strict_share: float  # of tokens whose ranks saturate one after the other
    weak_share: float  # of tokens in which no rank saturates before a better one
    before_shares: Float[np.ndarray, "k-1"]  # of tokens in which a rank saturates before the next


def saturation_layers(ids: Int[Array, "L n k"], *, as_published: bool = False) -> Int[np.ndarray, "k n"]:
    """The layer at which each rank saturates, int16: 1 + the last one where another token has the rank, 0 for none.

    Args:
      ids: of the best tokens after every layer, best first.
      as_published: L instead of 0.

    Raises:
      ValueError: if the shape does not fit.
    """
    ids = np.asarray(ids)
    if ids.ndim != 3 or not len(ids) or not ids.shape[2]:
        raise ValueError(f"ids are {ids.shape}, not of some layers, tokens and ranks [L, n, k]")
    num_layers = len(ids)
    is_other = ids != ids[-1]
    layers = num_layers - is_other[::-1].argmax(axis=0)  # of 1 ... L - 1, or L where none is another
    return (layers if as_published else layers % num_layers).T.astype(np.int16)


def is_early(layers: Int[np.ndarray, "k n"], num_layers: int, max_share: float = MAX_SHARE) -> Bool[np.ndarray, "n"]:
    """The filter: whether a token's best one saturates at layer floor(max_share * L) or before."""
    return _checked(layers, num_layers)[0] <= int(max_share * num_layers)


def rank_order(layers: Int[np.ndarray, "k n"], num_layers: int) -> RankOrder:
    """In which place each rank saturates among those of its token; equal layers share the earliest place.

    Ranks that saturate at the last layer take no place of their own. The t-test is Student's for two independent
    samples; the published code means to make it, but reads keys that do not exist.

    Raises:
      ValueError: if the layers do not fit.
    """
    from scipy import stats  # slow to import

    layers = _checked(layers, num_layers)
    places = [1 + (layers < row).sum(axis=0)[row < num_layers - 1] for row in layers]
    counts = np.array([len(x) for x in places])
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.array([x.sum() for x in places]) / counts
        variances = np.array([np.square(x - mean).sum() for x, mean in zip(places, means)]) / counts
        deviations = np.sqrt(np.where(counts > 1, variances * counts / (counts - 1), np.nan))  # of a sample
        samples = list(zip(means, deviations, counts))
        tests = [stats.ttest_ind_from_stats(*a, *b) for a, b in zip(samples, samples[1:])]
        return RankOrder(means, np.sqrt(variances / counts), counts, np.array([test.pvalue for test in tests], float))


def strict_kendall_tau(
    layers: Int[np.ndarray, "k n"], num_layers: int, *, as_published: bool = False
) -> Float[np.ndarray, "n"]:
    """Kendall's tau between a token's ranks and their layers, where two ranks at the same layer disagree.

    tau = 2 * (pairs of ranks i < j with layer_i < layer_j) / (all pairs) - 1, of the ranks up to the last one that does
    not saturate at the last layer. NaN for a token with fewer than three such ranks.

    Args:
      as_published: raise an error where no rank is left at all.

    Raises:
      ValueError: if the layers do not fit.
      IndexError: see as_published.
    """
    layers = _checked(layers, num_layers)
    taus, num_ranks = np.full(layers.shape[1], np.nan), _num_ranks(layers, num_layers, as_published)
    for k in range(_LEAST_RANKS, len(layers) + 1):
        taus[num_ranks == k] = _taus(layers[:k, num_ranks == k])
    return taus


def permutation_test(
    layers: Int[np.ndarray, "k n"],
    num_layers: int,
    *,
    num_permutations: int = 1000,
    seed: int = 0,
    as_published: bool = False,
) -> tuple[float, float]:
    """Mean strict Kendall tau, and how probable it or a greater one is if every token's layers are in random order.

    Each permutation shuffles the layers of every token among the ranks that its tau compares, and
    p = (1 + permutations with at least this mean tau) / (1 + permutations).

    Args:
      as_published: shuffle them among all k ranks and then compare as many of them as before, so that layers beyond the
        cut come in; p = (permutations with at least this mean tau) / permutations, printed as "p < 0.001" for 0.

    Returns:
      (mean tau, p); NaN if there is nothing to compare (as published, p is 0 then).

    Raises:
      ValueError: if the layers do not fit, or for no permutations.
      IndexError: see `strict_kendall_tau`.
    """
    layers = _checked(layers, num_layers)
    if num_permutations < 1:
        raise ValueError(f"{num_permutations=} must be at least 1")
    num_ranks = _num_ranks(layers, num_layers, as_published)
    groups = {k: layers[:, num_ranks == k] for k in range(_LEAST_RANKS, len(layers) + 1)}
    num_compared = sum(group.shape[1] for group in groups.values())
    if not num_compared:
        return np.nan, 0.0 if as_published else np.nan
    mean_tau = lambda groups: sum(_taus(group[:k]).sum() for k, group in groups.items()) / num_compared
    actual = mean_tau(groups)
    rng = np.random.default_rng(seed)
    pools = {k: np.ascontiguousarray((group if as_published else group[:k]).T) for k, group in groups.items()}
    num_reached = sum(
        mean_tau({k: rng.permuted(pool, axis=1).T for k, pool in pools.items()}) >= actual - _ROUNDING
        for _ in range(num_permutations)
    )
    return float(actual), float((num_reached + (not as_published)) / (num_permutations + (not as_published)))


def saturation_summary(
    layers: Int[np.ndarray, "k n"],
    num_layers: int,
    *,
    max_share: float = MAX_SHARE,
    num_permutations: int = 1000,
    seed: int = 0,
    as_published: bool = False,
) -> SaturationSummary:
    """Statistics of the tokens that the filter keeps.

    Args:
      layers: of `saturation_layers`, with the same `as_published`.
      max_share: see `is_early`; 1 keeps all tokens.
      num_permutations, seed: see `permutation_test`.

    Raises:
      ValueError: if the layers do not fit.
      IndexError: see `strict_kendall_tau`.
    """
    layers = _checked(layers, num_layers)
    kept = layers[:, is_early(layers, num_layers, max_share)]
    tau, p_value = permutation_test(
        kept, num_layers, num_permutations=num_permutations, seed=seed, as_published=as_published
    )
    mean = lambda x: x.sum(axis=-1) / kept.shape[1] if kept.shape[1] else np.full(x.shape[:-1], np.nan)
    is_before, is_behind = kept[:-1] < kept[1:], kept[:-1] > kept[1:]
    return SaturationSummary(
        num_tokens=layers.shape[1],
        num_kept=kept.shape[1],
        num_compared=int((_num_ranks(kept, num_layers, as_published) >= _LEAST_RANKS).sum()),
        mean_layers=mean(kept),
        order=rank_order(kept, num_layers),
        tau=tau,
        p_value=p_value,
        strict_share=float(mean(is_before.all(axis=0))),
        weak_share=float(mean(~is_behind.any(axis=0))),
        before_shares=mean(is_before),
    )


class CorpusSaturation:
    """Collects the layers of a corpus part by part, 2 * k bytes a token, and sums them up.

    corpus = CorpusSaturation()
    for top in stream_top_tokens(model, params, batches, k=5):
        corpus.add(top.ids)
    corpus.summary().tau
    """

    def __init__(self, *, as_published: bool = False):
        self.as_published = as_published
        self.num_layers = 0
        self._parts = []

    def add(self, ids: Int[Array, "L n k"]) -> None:
        """Adds tokens.

        Raises:
          ValueError: if the shape does not fit, or has other layers or ranks than earlier ones.
        """
        layers = saturation_layers(ids, as_published=self.as_published)
        if self._parts and (self.num_layers, len(self._parts[0])) != (len(ids), len(layers)):
            raise ValueError(
                f"{len(ids)} layers and {len(layers)} ranks do not fit earlier ones: "
                f"{self.num_layers} layers and {len(self._parts[0])} ranks"
            )
        self.num_layers = len(ids)
        self._parts.append(layers)

    @property
    def layers(self) -> Int[np.ndarray, "k n"]:
        """Of all tokens so far, int16.

        Raises:
          ValueError: if there are none.
        """
        if not self._parts:
            raise ValueError("no tokens were added")
        self._parts = [np.concatenate(self._parts, axis=1)]
        return self._parts[0]

    def summary(
        self, *, max_share: float = MAX_SHARE, num_permutations: int = 1000, seed: int = 0
    ) -> SaturationSummary:
        """Statistics of all tokens so far.

        Args:
          max_share, num_permutations, seed: see `saturation_summary`.

        Raises:
          ValueError: if no tokens were added.
          IndexError: see `strict_kendall_tau`.
        """
        return saturation_summary(
            self.layers,
            self.num_layers,
            max_share=max_share,
            num_permutations=num_permutations,
            seed=seed,
            as_published=self.as_published,
        )


def _checked(layers, num_layers) -> np.ndarray:
    layers = np.asarray(layers)
    if layers.ndim != 2 or not len(layers) or not np.issubdtype(layers.dtype, np.integer):
        raise ValueError(f"layers are {layers.dtype} {layers.shape}, not integers of some ranks and tokens [k, n]")
    if layers.size and not 0 <= layers.min() <= layers.max() <= num_layers:
        raise ValueError(f"layers are {layers.min()} ... {layers.max()}, but the model has {num_layers}")
    return layers


def _num_ranks(layers, num_layers, as_published) -> Int[np.ndarray, "n"]:
    """How many ranks are left up to the last one that does not saturate at the last layer."""
    is_last = layers == num_layers - 1
    num_ranks = len(layers) - np.logical_and.accumulate(is_last[::-1], axis=0).sum(axis=0)
    if as_published and not num_ranks.all():
        # What NumPy says in the published code, and why.
        raise IndexError(
            "index -1 is out of bounds for axis 0 with size 0: "
            f"all ranks of token {num_ranks.argmin()} saturate at the last layer"
        )
    return num_ranks


def _taus(layers: Int[np.ndarray, "c n"]) -> Float[np.ndarray, "n"]:
    """Strict Kendall tau of each token's ranks."""
    first, second = np.triu_indices(len(layers), 1)
    num_agreeing = sum((layers[i] < layers[j]).astype(np.int32) for i, j in zip(first, second))
    return 2 * num_agreeing / len(first) - 1
