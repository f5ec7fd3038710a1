"""Repeat a measurement until its spread is small or a limit is met."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from llava_edge.bench import statistics
from llava_edge.bench.environment import BUSY, Watch
from llava_edge.bench.record import Metric
from llava_edge.errors import InputError


@dataclass(frozen=True)
class Limits:
    """When to stop: half the interval is below ``spread`` of the median, or a limit is met.

    There are two samples even if they take longer than ``max_seconds``, because one has no spread. Six repetitions
    are the fewest whose range covers the median with 95 %.
    """

    min_repetitions: int = 6
    max_repetitions: int = 30
    max_seconds: float = 10.0
    spread: float = 0.02

    def __post_init__(self) -> None:
        if not 1 <= self.min_repetitions <= self.max_repetitions:
            raise InputError(
                f"repetitions are {self.min_repetitions} to {self.max_repetitions}; expected 1 or more, in this order"
            )
        if self.max_seconds <= 0 or self.spread <= 0:
            raise InputError(f"limits are {self.max_seconds} s and a spread of {self.spread}; expected more than 0")


@dataclass(frozen=True)
class Repeated:
    """Samples, and what a reader must know of them.

    ``others`` is the share of the processor that other programs used meanwhile, None where nobody knows.
    ``doubt`` says in words why the limits left the spread large.
    """

    samples: list[float]
    others: float | None
    doubt: str | None

    @property
    def disturbed(self) -> bool:
        """Whether other programs took enough to slow it down."""
        return self.others is not None and self.others > BUSY


def repeat(measure: Callable[[], float], limits: Limits) -> Repeated:
    """Call ``measure`` once to warm up, then again and again.

    It returns its own figure, in seconds, so that preparing it costs nothing.
    """
    measure()
    watch = Watch()
    started = time.perf_counter()
    samples: list[float] = []
    while len(samples) < limits.max_repetitions:
        samples.append(measure())
        if len(samples) >= limits.min_repetitions and _spread(samples) <= limits.spread:
            break
        if len(samples) > 1 and time.perf_counter() - started > limits.max_seconds:
            break
    return Repeated(samples, watch.others(), _doubt(samples, limits))


def rate(seconds: list[float], count: int) -> Metric:
    """Timings of ``count`` tokens as tokens a second."""
    return statistics.of_samples("tokens/s", [count / each for each in seconds])


def _spread(samples: list[float]) -> float:
    """Half the interval as a share of the median."""
    width = statistics.half_width(statistics.of_samples("s", samples))
    return float("inf") if width is None else width


def _doubt(samples: list[float], limits: Limits) -> str | None:
    if len(samples) == 1:
        return "a single sample, which tells nothing of the spread"
    if _spread(samples) > limits.spread:
        return f"uncertain by {_spread(samples):.0%} after {len(samples)} repetitions"
    return None
