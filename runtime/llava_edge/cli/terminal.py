"""What the commands write, and where: answers to stdout, everything else to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_edge.types import Reply

# C0 and C1 controls and DEL but tab and newline: neither a model's answer nor a file's name may steer the terminal.
_CONTROLS = dict.fromkeys([*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)], "\N{REPLACEMENT CHARACTER}")


def printable(text: str) -> str:
    """The text without control characters, so that it can be shown safely."""
    return text.translate(_CONTROLS)


def data(text: str) -> None:
    """Write a piece of an answer to stdout at once."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Write a line for the person to stderr."""
    sys.stderr.write(f"{printable(text)}\n")
    sys.stderr.flush()


def error(message: str, hint: str | None = None) -> None:
    """Write one line that says what failed, and one with the next step."""
    note(f"error: {' '.join(message.splitlines())}")
    if hint:
        note(f"hint: {' '.join(hint.splitlines())}")


def stats(reply: Reply) -> str:
    """One line with an answer's times and speeds."""
    usage, timings = reply.usage, reply.timings
    parts = [f"load {timings.load_seconds:.2f} s"]
    if timings.encode_seconds >= 0.0005:
        parts.append(f"encode {timings.encode_seconds:.2f} s")
    fresh = usage.prompt_tokens - usage.cached_tokens
    parts.append(f"prefill {fresh} of {usage.prompt_tokens} tokens{_speed(timings.prefill_tokens_per_second)}")
    parts.append(f"first token {timings.ttft_seconds:.2f} s")
    parts.append(f"decode {usage.completion_tokens} tokens{_speed(timings.decode_tokens_per_second)}")
    return " | ".join(parts)


def _speed(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f" at {tokens_per_second:.1f} tokens/s"


def size(n_bytes: int) -> str:
    """Bytes for people."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write columns to stdout; the titles are left out when a program reads them."""
    shown = [list(titles), *map(list, rows)] if sys.stdout.isatty() else list(map(list, rows))
    widths = [max((len(row[column]) for row in shown), default=0) for column in range(len(titles))]
    for row in shown:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        data("  ".join(cells).rstrip() + "\n")


class Bar:
    """Progress of a download on stderr: share, bytes, speed, time to go."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._total = max(1, total)
        self._shown = shown
        self._done = 0
        self._began = self._drawn = time.monotonic()
        self._first: int | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._shown and self._done:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def advance(self, n_bytes: int) -> None:
        """So many bytes more are here."""
        if self._first is None:  # what an earlier process downloaded says nothing about the speed
            self._first = n_bytes
        self._done += n_bytes
        now = time.monotonic()
        if self._shown and now - self._drawn > 0.2:
            self._drawn = now
            self._draw(now)

    def _draw(self, now: float) -> None:
        speed = (self._done - (self._first or 0)) / max(0.1, now - self._began)
        left = (self._total - self._done) / speed if speed > 0 else 0
        share = self._done / self._total
        filled = "=" * int(28 * share)
        line = f"[{filled:<28}] {share:4.0%}  {self._done / 1e6:.0f} of {self._total / 1e6:.0f} MB"
        sys.stderr.write(f"\r\033[K{line}  {speed / 1e6:.1f} MB/s  {left / 60:.0f}:{left % 60:02.0f} left")
        sys.stderr.flush()
