"""Rules that pick a row. Each says what it asks for, so that a person can disagree.

They go by the divergence, which is 0 for the reference alone and grows with every change; perplexity can fall where a
model gets worse, as it does for one that is too sure of itself and has it blurred by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llava_edge.bench.record import Recommendation, Row

# Nats a token: of what F16 itself would say, perplexity grows by so much (e to the divergence).
CLOSE, ACCEPTABLE = 0.01, 0.05
ANSWER_TOKENS = 64


def recommend(rows: Sequence[Row], memory_limit_bytes: int) -> tuple[Recommendation, ...]:
    """The rules that the rows' figures allow."""
    measured = all("kl_mean" in row.metrics for row in rows)
    scores = [name for name in (rows[0].metrics if rows else {}) if _is_score(rows[0], name)]
    timed = [row for row in rows if answer_seconds(row) is not None and "peak_memory" in row.metrics]
    found = []
    if measured:
        rule = f"smallest with a mean KL divergence of at most {CLOSE:g} from F16 (end of its interval)"
        found.append(_pick(rule, [row for row in rows if _divergence(row) <= CLOSE], lambda row: row.bytes))
    if len(timed) == len(rows):
        fits = [row for row in rows if row.metrics["peak_memory"].value <= memory_limit_bytes]
        if measured:
            kept = [row for row in fits if _divergence(row) <= ACCEPTABLE]
        else:
            kept = [row for row in fits if all(_keeps(row, rows[0], name) for name in scores)]
        rule = (
            f"fastest answer of {ANSWER_TOKENS} tokens about a new picture in {memory_limit_bytes / 1e9:g} GB of memory"
        )
        if measured:
            rule += f", mean KL divergence at most {ACCEPTABLE:g}"
        elif scores:
            rule += f", {' and '.join(scores)} at most {ACCEPTABLE:.0%} worse than F16's"
        found.append(_pick(rule, kept, lambda row: answer_seconds(row) or 0.0))
    if measured:
        rule = "nothing smaller is closer to F16 (front of size and mean KL divergence)"
        labels = ", ".join(row.label for row in pareto(rows, lambda r: r.bytes, lambda r: r.metrics["kl_mean"].value))
        found.append(Recommendation(rule, labels))
    return tuple(found)


def pareto(rows: Sequence[Row], first: Callable[[Row], float], second: Callable[[Row], float]) -> list[Row]:
    """The rows that no other row beats in one figure without losing in the other; less is better in both."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (first(row), second(row))):
        if not front or second(row) < second(front[-1]):
            front.append(row)
    return front


def answer_seconds(row: Row) -> float | None:
    """Time to the first token and for the rest of an answer, None where it wasn't measured."""
    rates = [
        metric.value for name, metric in row.metrics.items() if name.startswith("tg") and metric.unit == "tokens/s"
    ]
    if not rates or "ttft_warm" not in row.metrics:
        return None
    return row.metrics["ttft_warm"].value + (ANSWER_TOKENS - 1) / rates[0]


def _divergence(row: Row) -> float:
    """The pessimistic end of the interval."""
    metric = row.metrics["kl_mean"]
    return metric.interval[1] if metric.interval else metric.value


def _is_score(row: Row, name: str) -> bool:
    """Whether a figure is a task's, and better or worse: LLaVA-Bench without its judge only counts words."""
    return row.metrics[name].unit == "score" and not name.startswith("llava-bench")


def _keeps(row: Row, reference: Row, task: str) -> bool:
    """Whether a task's score is about the reference's. Of CHAIR's, which counts what isn't there, less is better."""
    if task not in row.metrics:
        return False
    found, wanted = row.metrics[task].value, reference.metrics[task].value
    return found <= wanted * (1 + ACCEPTABLE) if task.startswith("chair") else found >= wanted * (1 - ACCEPTABLE)


def _pick(rule: str, rows: Sequence[Row], cost: Callable[[Row], float]) -> Recommendation:
    return Recommendation(rule, min(rows, key=cost).label if rows else None)
