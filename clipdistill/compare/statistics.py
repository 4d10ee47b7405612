"""Paired comparisons of two arms over seeds and images, and what a number of seeds and images can show.

Shapes: S seeds, N images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
"""Significance level, after correction for the number of comparisons."""

LEAST_SEEDS = 6
"""With fewer, no outcome of a two-sided exact test over seeds reaches the level."""

_POWER = 0.8
_RESAMPLES = 9999


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against another one.

    Attributes:
        difference: mean over seeds of the difference in accuracy.
        low: lower bound of its 95 % interval (BCa bootstrap over seeds).
        high: upper bound.
        p_seeds: exact sign-flip test over seeds, two-sided.
        p_images: McNemar's exact test over images, two-sided.
        better: images that more seeds of this arm get right than of the other.
        worse: images of the opposite.
        adjusted: larger of both p-values, corrected by Holm's method for the number of comparisons.
    """

    difference: float
    low: float
    high: float
    p_seeds: float
    p_images: float
    better: int
    worse: int
    adjusted: float = math.nan

    @property
    def is_shown(self) -> bool:
        """Whether a difference is shown: both tests reach the level after correction, and the interval excludes 0."""
        return self.adjusted <= LEVEL and (self.low > 0 or self.high < 0)


def compare_pair(correct_SN: NDArray[np.bool_], other_SN: NDArray[np.bool_], *, seed: int = 0) -> Comparison:
    """Compare the predictions of two arms on the same images, whose runs share their seeds, pair by pair.

    Args:
        correct_SN: whether each run of the arm is right about each image.
        other_SN: the same of the other arm, in the same order of seeds and images.
        seed: of the bootstrap.

    Raises:
        ValueError: other shapes, or fewer than two seeds.
    """
    from scipy.stats import bootstrap, permutation_test
    from statsmodels.stats.contingency_tables import mcnemar

    if correct_SN.shape != other_SN.shape or correct_SN.ndim != 2 or len(correct_SN) < 2:
        raise ValueError(f"shapes {correct_SN.shape} and {other_SN.shape}; allowed: equal (S, N) with S of 2 or more")
    difference_S = correct_SN.mean(1) - other_SN.mean(1)
    low = high = float(difference_S[0])
    if np.ptp(difference_S) > 0:
        interval = bootstrap(
            (difference_S,), np.mean, n_resamples=_RESAMPLES, method="BCa", rng=np.random.default_rng(seed)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    flips = permutation_test((difference_S,), np.mean, permutation_type="samples", n_resamples=np.inf)
    votes_N = correct_SN.sum(0).astype(int) - other_SN.sum(0)
    better, worse = int((votes_N > 0).sum()), int((votes_N < 0).sum())
    return Comparison(
        difference=float(difference_S.mean()),
        low=low,
        high=high,
        p_seeds=float(flips.pvalue),
        p_images=float(mcnemar([[0, better], [worse, 0]], exact=True).pvalue) if better + worse else 1.0,
        better=better,
        worse=worse,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: Holm 1979, A simple sequentially rejective multiple test procedure."""
    from statsmodels.stats.multitest import multipletests

    return [float(value) for value in multipletests(list(p_values), method="holm")[1]] if p_values else []


def best_p(seeds: int, comparisons: int = 1) -> float:
    """Smallest corrected p-value that the exact test over seeds can give: all differences have one sign."""
    return min(1.0, comparisons * 2 / 2**seeds)


def seeds_needed(comparisons: int = 1) -> int:
    """Smallest number of seeds with which one of several comparisons can reach the level."""
    return math.ceil(math.log2(2 * comparisons / LEVEL))


def detectable_over_seeds(differences_S: Sequence[float], *, seeds: int, comparisons: int = 1) -> float:
    """Difference in accuracy that a paired t-test over seeds shows with a power of 80 %.

    Args:
        differences_S: of pilot runs, whose spread is taken for that of all.
        seeds: number of seeds of the comparison.
        comparisons: number of comparisons at the level, each at its share of it.
    """
    from statsmodels.stats.power import TTestPower

    spread = float(np.std(differences_S, ddof=1))
    effect = TTestPower().solve_power(nobs=seeds, alpha=LEVEL / comparisons, power=_POWER)
    return float(effect) * spread


def detectable_over_images(images: int, *, discordant: float, comparisons: int = 1) -> float:
    """Difference in accuracy that McNemar's test over images shows with a power of 80 %.

    Args:
        images: of the set.
        discordant: share of the images about which two runs disagree.
        comparisons: as for ``detectable_over_seeds``.
    """
    from scipy.stats import norm

    quantiles = norm.ppf(1 - LEVEL / comparisons / 2) + norm.ppf(_POWER)
    return float(quantiles * math.sqrt(discordant / images))
