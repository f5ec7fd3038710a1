"""Whether the figures of ``llava-edge bench`` are those of the programs that others measure with.

    python -m llava_edge.bench.agreement speed BUNDLE --llama-bench PATH
    python -m llava_edge.bench.agreement speed --synthetic SHAPE --llama-bench PATH
    python -m llava_edge.bench.agreement divergence BUNDLE REFERENCE TEXT --llama-perplexity PATH
    python -m llava_edge.bench.agreement bandwidth

``speed`` runs llama-bench and this project's own loop in turn on the same file; ``divergence`` takes the KL divergence
of two language models on a text both ways; ``bandwidth`` compiles a small C program (with OpenMP) that reads memory.
One JSON object goes to stdout, with the ratio of our figure to the other one and, with several turns, its interval. The
machine should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge import native
from llava_edge.bench.models import open_subject
from llava_edge.bench.quality.cases import CHUNK
from llava_edge.bench.quality.data import read_data
from llava_edge.bench.quality.measure import QualitySettings, bench_quality
from llava_edge.bench.speed.ceilings import read_bandwidth
from llava_edge.bench.speed.measure import decode_seconds, prefill_seconds
from llava_edge.bench.speed.shapes import find_shape
from llava_edge.bench.speed.synthetic import synthetic_bundle
from llava_edge.bench.statistics import of_samples
from llava_edge.bundle import resolve_model
from llava_edge.engine import Engine
from llava_edge.errors import LlavaEdgeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

WARM_UPS = 3
_MEAN = re.compile(r"Mean\s+KLD:\s+(\S+)")


def speed(
    bundle: str | None, synthetic: str | None, program: str, *, threads: int, rounds: int, prompt: int, answer: int
) -> dict[str, Any]:
    """Tokens a second of ``pp`` and ``tg``, the median of ``rounds`` runs in turn.

    Both let OpenMP's threads wait in the same way, on which the rates depend more than on anything else here.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", str(native.spin_count()))
    with ExitStack() as stack:
        if synthetic is not None:
            shape = find_shape(synthetic)
            folder = stack.enter_context(synthetic_bundle(shape, "Q4_K_M", "F16", lambda _line: None))
            bundle = str(folder)
        assert bundle is not None
        path = resolve_model(bundle).file("llm")
        return _speed(path, program, threads=threads, rounds=rounds, prompt=prompt, answer=answer)


def _speed(path: Path, program: str, *, threads: int, rounds: int, prompt: int, answer: int) -> dict[str, Any]:
    rates: dict[str, list[list[float]]] = {f"pp{prompt}": [], f"tg{answer}": []}
    command = [program, "-m", path, "-t", threads, "-p", prompt, "-n", answer, "-r", 2, "-fa", 1, "-o", "json"]
    random = np.random.default_rng(0)
    engine = Engine(path, n_ctx=prompt + answer, n_threads=threads, flash_attention=True)
    try:
        read, said = ([int(t) for t in random.integers(0, engine.n_vocab, n)] for n in (prompt, answer))
        ours: dict[str, Callable[[], float]] = {
            f"pp{prompt}": lambda: prompt / prefill_seconds(engine, read),
            f"tg{answer}": lambda: answer / decode_seconds(engine, said, 0),
        }
        for _ in range(rounds):
            theirs = {_name(test): test["avg_ts"] for test in json.loads(_run(command))}
            for name, measure in ours.items():
                for _ in range(WARM_UPS):  # after the other's seconds a process takes one to come to its speed
                    measure()
                rates[name].append([float(np.mean([measure() for _ in range(2)])), theirs[name]])
    finally:
        engine.close()
    return {name: _compared(np.array(pairs)) for name, pairs in rates.items()}


def _name(test: dict[str, Any]) -> str:
    return f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']}"


def divergence(bundle: str, reference: str, text: Path, program: str, *, threads: int, chunks: int) -> dict[str, Any]:
    """Mean KL divergence of two language models on the second half of each of ``chunks`` runs of 512 tokens."""
    files = [resolve_model(name).file("llm") for name in (reference, bundle)]
    with tempfile.TemporaryDirectory(prefix="llava-edge-") as folder:
        base = Path(folder) / "base.kld"
        shared = ["-f", text, "-c", CHUNK, "--chunks", chunks, "-t", threads, "--kl-divergence-base", base]
        _run([program, "-m", files[0], *shared])
        said = _run([program, "-m", files[1], *shared, "--kl-divergence"])
        found = _MEAN.search(said)
        if found is None:
            raise LlavaEdgeError(f"{program} says nothing of a mean KLD: {said[-300:]}")
        settings = QualitySettings(threads, text_chunks=chunks)
        data = read_data(text, None)
        result = bench_quality([open_subject(bundle)], open_subject(reference), data, settings, Path(folder))
    return {"kl_mean": _compared(np.array([[result.rows[0].metrics["kl_mean"].value, float(found[1])]]))}


def bandwidth(*, threads: int, rounds: int) -> dict[str, Any]:
    """The rate of reading memory, by NumPy and by a C program in turn; NumPy's is the mean of before and after."""
    source = resources.files("llava_edge.bench").joinpath("speed", "read_bandwidth.c").read_text()
    with tempfile.TemporaryDirectory(prefix="llava-edge-") as folder:
        program = Path(folder) / "read_bandwidth"
        compiler = os.environ.get("CC", "cc")
        _run([compiler, "-O3", "-march=native", "-fopenmp", "-x", "c", "-", "-o", program], source)
        pairs = []
        for _ in range(rounds):
            before = read_bandwidth(threads).value
            theirs = float(_run([program], OMP_NUM_THREADS=str(threads)))
            pairs.append([(before + read_bandwidth(threads).value) / 2, theirs])
    return {"read_bandwidth": _compared(np.array(pairs))}


def _compared(pairs: NDArray[np.float64]) -> dict[str, Any]:
    """Medians of both, and of the ratio in each turn: what the machine can do changes by the second."""
    ours, theirs = np.median(pairs, axis=0)
    ratio = of_samples("ratio", (pairs[:, 0] / pairs[:, 1]).tolist())
    return {
        "ours": float(ours), "theirs": float(theirs),
        "ratio": ratio.value, "interval": ratio.interval, "pairs": pairs.tolist(),
    }  # fmt: skip


def _run(command: list[Any], text: str | None = None, **environment: str) -> str:
    """What a program prints; LlavaEdgeError with its last words if it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, check=False, env={**os.environ, **environment}
        )
    except OSError as error:
        raise LlavaEdgeError(f"can't run {words[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise LlavaEdgeError(f"{words[0]} failed ({done.returncode}): {done.stderr.strip()[-300:]}")
    return done.stdout


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("speed")
    model = one.add_mutually_exclusive_group(required=True)
    model.add_argument("bundle", nargs="?")
    model.add_argument("--synthetic", metavar="SHAPE")
    one.add_argument("--llama-bench", dest="program", default="llama-bench")
    one.add_argument("--rounds", type=int, choices=range(1, 100), metavar="N", default=15)
    one.add_argument("--prompt", type=int, default=512)
    one.add_argument("--answer", type=int, default=64)
    two = commands.add_parser("divergence")
    two.add_argument("bundle")
    two.add_argument("reference")
    two.add_argument("text", type=Path)
    two.add_argument("--llama-perplexity", dest="program", default="llama-perplexity")
    two.add_argument("--chunks", type=int, default=8)
    three = commands.add_parser("bandwidth")
    three.add_argument("--rounds", type=int, choices=range(1, 100), metavar="N", default=25)
    values = vars(parser.parse_args())
    measures: dict[str, Callable[..., dict[str, Any]]] = {
        "speed": speed,
        "divergence": divergence,
        "bandwidth": bandwidth,
    }
    try:
        sys.stdout.write(json.dumps(measures[values.pop("command")](**values)) + "\n")
    except LlavaEdgeError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
