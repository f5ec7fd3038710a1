"""What it costs to write several answers together, and whether each keeps the bits that it has alone.

    python -m llava_edge.bench.rows nano --rows 1,2,4,8

evaluates a token for each of so many conversations in one batch: random tokens, behind ``--depth`` others. A model is a
bundle or a GGUF file. One JSON object goes to stdout: the milliseconds of a batch and of a row of it, and how many rows
of ``--trials`` batches had other logits than alone. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge.bundle import resolve_model
from llava_edge.engine import Engine
from llava_edge.errors import LlavaEdgeError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def measure(path: Path, rows: Sequence[int], *, depth: int, trials: int, threads: int | None) -> dict[str, Any]:
    """The figures of one language model, for each number of rows; medians, in milliseconds."""
    most = max(rows)
    engine = Engine(path, n_ctx=depth + 2, n_threads=threads, n_seq_max=most)
    try:
        random = np.random.default_rng(0)
        for seq in range(most):
            engine.decode_tokens([int(token) for token in random.integers(0, engine.n_vocab, depth)], seq=seq)
        seconds: dict[int, list[float]] = {count: [] for count in rows}
        others = dict.fromkeys(rows, 0)
        for _ in range(trials):
            tokens = [int(token) for token in random.integers(0, engine.n_vocab, most)]
            alone = [_evaluate(engine, {seq: token}, depth)[1][0] for seq, token in enumerate(tokens)]
            for count in rows:  # in turns, since the machine's speed drifts
                took, logits = _evaluate(engine, dict(enumerate(tokens[:count])), depth)
                seconds[count].append(took)
                others[count] += sum(row.tobytes() != own.tobytes() for row, own in zip(logits, alone, strict=False))
        medians = {count: 1000 * statistics.median(values) for count, values in seconds.items()}
        return {
            "model": str(path),
            "n_threads": engine.n_threads,
            "depth": depth,
            "trials": trials,
            "rows": [
                {"rows": n, "batch_ms": medians[n], "row_ms": medians[n] / n, "rows_with_other_logits": others[n]}
                for n in rows
            ],
        }
    finally:
        engine.close()


def _evaluate(engine: Engine, tokens: Mapping[int, int], depth: int) -> tuple[float, NDArray[np.float32]]:
    """The seconds of a batch and its logits; its tokens are forgotten."""
    began = time.perf_counter()
    logits = engine.decode_each(tokens)
    took = time.perf_counter() - began
    for seq in tokens:
        engine.truncate(depth, seq)
    return took, logits


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--rows", default="1,2,3,4,6,8")
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--threads", type=int)
    chosen = parser.parse_args()
    rows = [int(count) for count in chosen.rows.split(",")]
    try:
        found = [
            measure(_file(name), rows, depth=chosen.depth, trials=chosen.trials, threads=chosen.threads)
            for name in chosen.models
        ]
    except LlavaEdgeError as error:
        raise SystemExit(f"error: {error}") from None
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


def _file(name: str) -> Path:
    return Path(name) if name.endswith(".gguf") else resolve_model(name).file("llm")


if __name__ == "__main__":
    main()
