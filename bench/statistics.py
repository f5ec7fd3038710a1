"""Intervals that assume little: of a median by order statistics, of anything else by a bootstrap over pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llava_edge.bench.record import Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIDENCE = 0.95
SURE = 6  # samples: the range of fewer covers the median with less than that
DRAWS = 1000


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The narrowest pair of order statistics that covers the median with 95 %.

    With fewer than six samples it is their range, which covers less (94 % for five, 50 % for two); None for one.
    """
    ordered = sorted(samples)
    count = len(ordered)
    if count < 2:
        return None
    below = 0  # samples that are cut off at each end
    outside = 2 / 2**count
    while True:
        outside += 2 * math.comb(count, below + 1) / 2**count
        if outside > 1 - CONFIDENCE or 2 * (below + 1) >= count:
            return ordered[below], ordered[count - 1 - below]
        below += 1


def of_samples(unit: str, samples: Sequence[float]) -> Metric:
    """The median of timings or rates with its interval."""
    return Metric(unit, float(np.median(samples)), median_interval(samples), tuple(samples))


def half_width(metric: Metric) -> float | None:
    """Half the interval as a share of the value, None without an interval."""
    if metric.interval is None or metric.value == 0:
        return None
    return (metric.interval[1] - metric.interval[0]) / 2 / abs(metric.value)


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least ``share`` of the samples don't exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def bootstrap(
    groups: Sequence[NDArray[np.float64]], estimate: Callable[[NDArray[np.float64]], float], unit: str, seed: int = 0
) -> Metric:
    """An estimate over all rows of all groups, with an interval from redrawing whole groups (pictures).

    The tokens of one answer are not independent, so that redrawing tokens would promise too much.
    """
    value = estimate(np.concatenate(groups))
    if len(groups) < 2:
        return Metric(unit, value)
    random = np.random.default_rng(seed)
    draws = []
    for _ in range(DRAWS):
        chosen = random.integers(0, len(groups), len(groups))
        draws.append(estimate(np.concatenate([groups[i] for i in chosen])))
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Metric(unit, value, (float(low), float(high)))
