"""A whole result as Markdown: what was measured, where, how, and what to read from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_edge.bench.record import Result
from llava_edge.bench.report import table

LEGEND = {
    "kl_mean": "KL divergence in nats from the reference's next-token distribution, along the data's answers or text",
    "perplexity_ratio": "perplexity of the same tokens divided by the reference's",
    "same_text": "greedy answers that are the reference's, to the letter",
    "cider_d": "CIDEr-D of the model's own captions",
    "accuracy": "own answers that are the known one, but for case and punctuation",
    "ttft_cold": "from starting a process to the first token about a picture, files dropped from the page cache",
    "ttft_warm": "from the question about a new picture to the first token, model loaded",
    "peak_memory": "most memory of a process that answered one question",
}
_INTERVALS = (
    "± is half of the 95 % interval: of a timing's median by order statistics (their range below six repetitions), "
    "of quality by a bootstrap over pictures, of the share of right or equal answers Wilson's, but where several "
    "questions share a picture."
)
_SHARES = (
    "pp reads a prompt, tg writes after so many tokens (@); MFU and MBU are shares of the machine's own rate of "
    "matrix products and of reading memory, measured in the same run."
)


def legend(result: Result) -> list[str]:
    """What the columns mean, as sentences."""
    names = {name for row in result.rows for name in row.metrics}
    lines = [f"{title_of(name)}: {words}." for name, words in LEGEND.items() if name in names]
    return [*lines, *([_SHARES] if any(n.startswith("pp") for n in names) else []), _INTERVALS]


def title_of(name: str) -> str:
    """A metric's title in the tables."""
    known = {entry[0]: entry[1] for entry in (*table.QUALITY, *table.SPEED)}
    return known.get(name, name)


def circumstances(result: Result) -> list[tuple[str, str]]:
    """Where and how it was measured, as names and values."""
    machine = result.machine
    facts = [
        ("machine", f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 1e9:.0f} GB, {machine.system}"),
        ("power", machine.power_source),
        ("measured", f"{result.created_utc} with llava-edge {result.version}"),
        ("llama.cpp", f"{result.llama_cpp_commit} (llama-cpp-python {result.llama_cpp_version})"),
        *([("ONNX Runtime", result.onnxruntime_version)] if result.onnxruntime_version else []),
        ("settings", ", ".join(_flat(result.settings))),
    ]
    for name, metric in result.ceilings.items():
        unit = "GB/s" if metric.unit == "bytes/s" else "GFLOP/s"
        what, _, kind = name.partition(" ")
        facts.append((f"{what.replace('_', ' ')} {kind}".strip(), f"{metric.value / 1e9:.1f} {unit}"))
    return facts


def _flat(values: dict[str, Any], before: str = "") -> Iterator[str]:
    """Nested settings in words: ``threads 2``, ``depths 0 512``."""
    for key, value in values.items():
        name = f"{before}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name} ")
        elif value is not None:
            yield f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def summary(result: Result) -> str:
    """The table and the recommendations, for a terminal."""
    picks = "".join(f"{rec.rule}: {rec.label or 'none'}\n" for rec in result.recommendations)
    return table.markdown(result) + ("\n" + picks if picks else "")


def report(result: Result, title: str, plots: tuple[str, ...] = ()) -> str:
    """The result as a page of Markdown; ``plots`` are files of pictures beside it."""
    lines = [f"# {title}", ""]
    if result.recommendations:
        lines += [*(f"- {rec.rule}: **{rec.label or 'none'}**" for rec in result.recommendations), ""]
    lines += [table.markdown(result), *(f"![{name}]({name})\n" for name in plots)]
    lines += [*(f"- {line}" for line in legend(result)), ""]
    if result.warnings:
        lines += ["## Warnings", "", *(f"- {warning}" for warning in result.warnings), ""]
    lines += ["## Circumstances", "", *(f"- {name}: {value}" for name, value in circumstances(result)), ""]
    return "\n".join(lines)
