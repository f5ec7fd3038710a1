"""Progress of long loops as lines, with an estimate of what is left."""

from __future__ import annotations

import time
from collections.abc import Callable

Say = Callable[[str], None]
_EVERY_SECONDS = 5.0


class Progress:
    """Counts steps of one kind and says so now and then."""

    def __init__(self, label: str, total: int, say: Say) -> None:
        self._label, self._total, self._say = label, total, say
        self._done = 0
        self._started = self._said = time.monotonic()

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._said >= _EVERY_SECONDS and self._done < self._total:
            self._said = now
            left = (now - self._started) / self._done * (self._total - self._done)
            self._say(f"{self._label}: {self._done} of {self._total}, about {duration(left)} left")


def duration(seconds: float) -> str:
    """``40 s``, ``3 min``, ``1 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
