"""Intervals and tests. Pictures, not questions, are what a benchmark draws at random: questions on one picture stay
together when samples are drawn again.

Shapes: C clusters (pictures), K columns that are summed up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 1000
Z = 1.959964


@dataclass(frozen=True)
class Metric:
    """A value and its 95 % interval. Without samples to tell from, the bounds are None."""

    value: float | None
    low: float | None = None
    high: float | None = None


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (JASA 22, 1927)."""
    share = successes / trials
    centre = share + Z * Z / (2 * trials)
    spread = Z * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials * trials))
    scale = 1 + Z * Z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def share(successes: int, trials: int) -> Metric:
    """A share with Wilson's interval."""
    return Metric(successes / trials, *wilson(successes, trials)) if trials else Metric(None)


def share_of(clusters: Sequence[str], right: Sequence[float]) -> Metric:
    """The share of what is 1, not 0.

    The interval is Wilson's where every picture comes once, or all are alike (then of as many as there are pictures),
    and the bootstrap's where questions share pictures.
    """
    pictures = len(set(clusters))
    if pictures == len(right):
        return share(int(sum(right)), len(right))
    if len(set(right)) == 1:
        return Metric(float(right[0]), *wilson(right[0] * pictures, pictures))
    return mean(clusters, right)


def bootstrap(clusters: Sequence[str], columns: Array, statistic: Callable[[Array], float]) -> Metric:
    """A statistic of column sums ``[K]``, with the percentile interval over pictures drawn again 1,000 times.

    ``clusters`` names the picture of each row of ``columns`` ``[rows, K]``. The draws are the same every time.
    """
    sums = cluster_sums(clusters, columns)
    if not len(sums):
        return Metric(None)
    value = statistic(sums.sum(axis=0))
    if math.isnan(value):
        return Metric(None)
    if len(sums) == 1:  # every draw would be the same
        return Metric(value)
    drawn = np.array([statistic(total) for total in redraw(sums)])
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return Metric(value)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Metric(value, float(low), float(high))


def mean(clusters: Sequence[str], values: Sequence[float]) -> Metric:
    """A mean with its bootstrap interval."""
    rows = np.array([[v, 1.0] for v in values], dtype=np.float64).reshape(-1, 2)
    return bootstrap(clusters, rows, lambda sums: ratio(sums[0], sums[1]))


def ratio(above: float, below: float) -> float:
    """A quotient; not a number where there is nothing to divide by."""
    return float(above / below) if below else math.nan


def cluster_sums(clusters: Sequence[str], columns: Array) -> Array:
    """Sums of the columns over each picture, ``[C, K]``, pictures in the order of their first row."""
    numbers: dict[str, int] = {}
    index = np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.int64)
    sums = np.zeros((len(numbers), columns.shape[1] if columns.ndim == 2 else 0))
    np.add.at(sums, index, columns)
    return sums


def redraw(sums: Array) -> list[Array]:
    """Column sums ``[K]`` of as many pictures, drawn with replacement, 1,000 times with a fixed seed."""
    rng = np.random.default_rng(0)
    count = len(sums)
    return [np.bincount(rng.integers(count, size=count), minlength=count) @ sums for _ in range(DRAWS)]


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value that two models differ (McNemar, Psychometrika 12, 1947).

    Given are the samples that only the first and only the second got right: under the null a fair coin decides.
    """
    flips = only_first + only_second
    if flips == 0:
        return 1.0
    logs = [
        math.lgamma(flips + 1) - math.lgamma(k + 1) - math.lgamma(flips - k + 1) - flips * math.log(2)
        for k in range(min(only_first, only_second) + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
