"""Mutate GGUF files, send every one through the preflight, and load what passes, in worker processes that may die.

    python tests/fuzz/run.py --llm tiny.gguf --count 200000
    python tests/fuzz/run.py --llm tiny.gguf --mmproj mmproj.gguf --count 20000

With ``--mmproj`` the vision tower is mutated, otherwise the language model. The last line is a JSON object with the
counts; the exit code is 1 if a process died, an error was of no type of llava-edge's, or a limit was passed. Files
that showed it are kept in ``--keep``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from mutate import build, mutate, parse

if TYPE_CHECKING:
    from llava_edge.gguf_header import Header

MAX_SECONDS = 2.0
MAX_BYTES = 1 << 30
PATIENCE_SECONDS = 60.0  # of the clock, for a machine that does other things too
LOADS_A_WORKER = 2000


def work(llm: str, mutates_mmproj: bool) -> None:
    """A worker: one path a line on stdin, one JSON object a line on stdout."""
    import faulthandler
    import logging

    import numpy as np
    from PIL import Image

    from llava_edge.chat_template import TemplateFormat
    from llava_edge.engine import Engine
    from llava_edge.errors import LlavaEdgeError
    from llava_edge.vision.mtmd import MtmdEncoder

    faulthandler.enable()
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is no result
    logging.disable(logging.WARNING)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    known = Engine(llm, n_ctx=512, n_threads=1, n_batch=64) if mutates_mmproj else None

    def try_llm(path: str) -> None:
        engine = Engine(path, n_threads=1, n_batch=64)
        try:
            ids = engine.tokenize("What is it? <|im_end|> \u00e9\U0001f408\n", special=True)
            for text in (engine.chat_template, engine.bos, engine.eos):
                assert text is None or isinstance(text, str)
            if engine.chat_template:
                TemplateFormat(engine.chat_template, bos=engine.bos, eos=engine.eos)
            engine.decode_tokens(ids[:32] or [0])
            for _ in range(2):
                token = int(np.nan_to_num(engine.logits()).argmax())
                engine.piece(token)
                engine.is_control(token)
                engine.decode_tokens([token])
        finally:
            engine.close()

    def try_mmproj(path: str) -> None:
        assert known is not None
        encoder = MtmdEncoder(path, known)
        try:
            for chunk in encoder.encode_chunks(picture):
                if chunk.embeddings is not None and len(chunk.embeddings) < 400:
                    known.decode_embeddings(
                        chunk.embeddings, positions=chunk.positions, n_pos=chunk.n_pos, causal=True, logits=True
                    )
        finally:
            known.truncate(0)
            encoder.close()

    for line in sys.stdin:
        began, outcome = time.process_time(), "ok"
        try:
            (try_mmproj if mutates_mmproj else try_llm)(line.strip())
        except LlavaEdgeError as error:
            outcome = f"error {type(error).__name__}: {error}"
        except Exception as error:
            outcome = f"untyped {type(error).__name__}: {error}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
        results.write(json.dumps([outcome, time.process_time() - began, peak]) + "\n")


class Worker:
    """A process that loads files until it dies or has loaded enough of them."""

    def __init__(self, llm: str, mutates_mmproj: bool) -> None:
        flags = ["--mmproj", "-"] if mutates_mmproj else []
        command = [sys.executable, __file__, "--worker", "--llm", llm, *flags]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            bufsize=1,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        self.loads = 0

    def load(self, path: Path) -> tuple[str, float, int]:
        """What became of it, the seconds of computing and the worker's peak memory."""
        assert self.process.stdin
        assert self.process.stdout
        self.loads += 1
        try:
            self.process.stdin.write(f"{path}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._died(), 0.0, 0
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(PATIENCE_SECONDS):
                return f"hung for {PATIENCE_SECONDS:.0f} s", PATIENCE_SECONDS, 0
        line = self.process.stdout.readline()
        if not line:
            return self._died(), 0.0, 0
        outcome, seconds, peak = json.loads(line)
        return outcome, seconds, peak

    def _died(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        lines = [line for line in self.log.read().splitlines() if line.strip()]
        return f"died with {code}: {' / '.join(lines[:12])}"

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream:
                stream.close()


def fuzz(options: argparse.Namespace, directory: Path) -> dict[str, object]:
    """Mutate, check, load; returns the counts."""
    from llava_edge.errors import LlavaEdgeError
    from llava_edge.gguf_check import check_gguf

    kind = "mmproj" if options.mmproj else "llm"
    original = parse(Path(options.mmproj or options.llm).read_bytes())
    path = directory / "mutated.gguf"
    counts: Counter[str] = Counter()
    failures: list[str] = []
    slowest_check = slowest_load = 0.0
    peak = 0
    worker: Worker | None = None
    try:
        for number in range(options.first, options.first + options.count):
            data = build(mutate(original, random.Random(f"{options.seed} {number}")))
            path.unlink(missing_ok=True)
            path.write_bytes(data)
            began = time.process_time()
            try:
                header = check_gguf(path, kind)
            except LlavaEdgeError:
                counts["refused"] += 1
            except Exception as error:
                failures.append(f"{number}: preflight raised {type(error).__name__}: {error}")
            else:
                worker = worker or Worker(options.llm, bool(options.mmproj))
                outcome, seconds, used = worker.load(path)
                ended = outcome.startswith(("died", "hung"))
                if not _is_known(header):
                    # Files of these kinds are first loaded in a process of their own, as this worker is one.
                    counts["tried, " + ("died" if ended else "survived")] += 1
                    bad = outcome.startswith("untyped")
                else:
                    word = outcome.split()[0]
                    counts[{"ok": "loaded", "error": "error"}.get(word, "failed")] += 1
                    slowest_load, peak = max(slowest_load, seconds), max(peak, used)
                    bad = word not in ("ok", "error") or seconds > MAX_SECONDS or used > MAX_BYTES
                if bad:
                    failures.append(f"{number}: {seconds:.2f} s, {used >> 20} MiB: {outcome}")
                    if options.keep:
                        (Path(options.keep) / f"{kind}-{options.seed}-{number}.gguf").write_bytes(data)
                if ended or worker.loads >= LOADS_A_WORKER or used > MAX_BYTES:
                    worker.close()
                    worker = None
            slowest_check = max(slowest_check, time.process_time() - began)
            if options.progress and number % 1000 == 999:
                sys.stderr.write(f"{number + 1} {dict(counts)} {len(failures)} failures\n")
    finally:
        if worker:
            worker.close()
    return {
        "kind": kind, "seed": options.seed, "files": options.count, **counts, "failures": failures,
        "slowest_check_seconds": round(slowest_check, 3), "slowest_load_seconds": round(slowest_load, 3),
        "peak_mib": peak >> 20,
    }  # fmt: skip


def _is_known(header: Header) -> bool:
    from llava_edge.gguf_check import CHECKED_ARCHITECTURES
    from llava_edge.gguf_mmproj import CHECKED_PROJECTORS, projector_of

    if header.architecture == "clip":
        return projector_of(header) in CHECKED_PROJECTORS
    return header.architecture in CHECKED_ARCHITECTURES


def main() -> int:
    """Parse the arguments; either work or fuzz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--mmproj")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--keep")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.llm, bool(options.mmproj))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        result = fuzz(options, Path(directory))
    sys.stdout.write(json.dumps(result) + "\n")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
