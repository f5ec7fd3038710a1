"""``bench ttft`` as a table: ours, theirs, and the ratio of the two."""

from __future__ import annotations

from collections.abc import Iterator

from llava_edge.bench.record import Metric, Result

HEADINGS = ("", "ours", "llama.cpp", "ratio")


def markdown(result: Result) -> str:
    """Medians, and half of their interval behind ±."""
    (row,) = result.rows
    rows = [HEADINGS, ("---", "---:", "---:", "---:"), *_rows(row.metrics)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _rows(metrics: dict[str, Metric]) -> Iterator[tuple[str, ...]]:
    counts = [int(name.removeprefix("ttft_")) for name in metrics if name.startswith("ttft_")]
    titles = [
        ("load", "loading the model", ""),
        ("load_again", "loading it for a picture in the cache", ""),
        ("encode", "image encode", "peer_encode"),
        *((f"ttft_{count}", f"TTFT cold, {count} tokens", "peer_ttft") for count in counts),
        ("second_question", "second question, same process (ratio: to own cold)", ""),
        ("new_process", "the same in a new process (ratio: to own cold)", ""),
        ("decode", "decode, tokens/s", "peer_decode"),
        ("process_cold", "whole process, cold", "peer_process"),
        ("process_warm", "whole process, picture in the cache", "peer_process"),
    ]
    for name, title, theirs in titles:
        if name in metrics:
            yield (title, _cell(metrics[name]), _cell(metrics.get(theirs)), _cell(metrics.get(f"ratio_{name}")))


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return ""
    unit = " s" if metric.unit == "s" else ""
    if metric.interval is None:
        return f"{metric.value:.3f}{unit}"
    return f"{metric.value:.3f} ± {(metric.interval[1] - metric.interval[0]) / 2:.3f}{unit}"
