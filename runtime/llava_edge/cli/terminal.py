"""What the commands write, and where: answers to stdout, everything else to stderr."""

from __future__ import annotations

import sys
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
