"""What ``/metrics`` tells, in Prometheus's format. Nothing in it comes from what people write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

if TYPE_CHECKING:
    from llava_edge.server.scheduler import Scheduler
    from llava_edge.types import Usage

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_CANCEL_SECONDS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "llava_edge_requests", "Chat completions by HTTP status", ["status"], registry=self._registry
        )
        self._cancelled = Counter(
            "llava_edge_cancelled", "Answers whose client left before the end", registry=self._registry
        )
        self._prompt_tokens = Counter("llava_edge_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self._cached_tokens = Counter(
            "llava_edge_prompt_cached_tokens", "Tokens of prompts found in the KV cache", registry=self._registry
        )
        self._answer_tokens = Counter("llava_edge_answer_tokens", "Tokens of finished answers", registry=self._registry)
        self._pictures = Counter(
            "llava_edge_pictures", "Pictures of prompts, by whether they were encoded before", ["cache"],
            registry=self._registry,
        )  # fmt: skip
        self._ttft = Histogram(
            "llava_edge_ttft_seconds", "From a request to its first token", buckets=_SECONDS, registry=self._registry
        )
        self._speed = Histogram(
            "llava_edge_decode_tokens_per_second", "Speed of an answer", buckets=_SPEEDS, registry=self._registry
        )
        self._freed = Histogram(
            "llava_edge_cancel_seconds", "From a client's leaving until its place is free", buckets=_CANCEL_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._gauges = {
            name: Gauge(f"llava_edge_{name}", text, registry=self._registry)
            for name, text in (
                ("running", "Answers being computed"),
                ("queued", "Requests that wait for a place"),
                ("kv_cells_used", "Tokens in the KV cache"),
                ("kv_stored_bytes", "Memory of conversations outside the KV cache"),
            )
        }

    def request(self, status: int) -> None:
        """A chat completion was answered."""
        self._requests.labels(str(status)).inc()

    def cancelled(self) -> None:
        """A client left."""
        self._cancelled.inc()

    def freed(self, seconds: float) -> None:
        """The place of a client that left is free, so long after the server knew that it left."""
        self._freed.observe(seconds)

    def picture(self, hit: bool) -> None:
        """A picture was asked about."""
        self._pictures.labels("hit" if hit else "miss").inc()

    def prompt(self, tokens: int, cached: int) -> None:
        """A prompt was evaluated."""
        self._prompt_tokens.inc(tokens)
        self._cached_tokens.inc(cached)

    def finished(self, usage: Usage, ttft_seconds: float, speed: float | None) -> None:
        """An answer is complete."""
        self._answer_tokens.inc(usage.completion_tokens)
        self._ttft.observe(ttft_seconds)
        if speed is not None:
            self._speed.observe(speed)

    def render(self, scheduler: Scheduler | None) -> bytes:
        """The text of ``/metrics``."""
        if scheduler is not None:
            for name, value in scheduler.state().items():
                self._gauges[name].set(value)
        return generate_latest(self._registry)
