"""llama.cpp's own programs beside ours: what they are asked, and what they say of their times."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_edge.errors import InputError, LlavaEdgeError

PATIENCE_SECONDS = 900
_ENCODED = re.compile(r"(?:slice encoded|batch encoding done) in (\d+) ms")
_DECODED = re.compile(r"image decoded \(batch \d+/\d+\) in (\d+) ms")
_LOAD = re.compile(r"(?<!un)load time = +([\d.]+) ms")
_PROMPT = re.compile(r"prompt eval time = +([\d.]+) ms / +(\d+) tokens")
_EVAL = re.compile(r"[^t] eval time = +([\d.]+) ms / +(\d+) runs")


@dataclass(frozen=True)
class PeerRun:
    """One process of llama-mtmd-cli. ``read_tokens`` are those of the picture and of the text around it.

    ``ttft_seconds`` is for encoding, reading of everything, and one token.
    """

    encode_seconds: float
    ttft_seconds: float
    read_tokens: int
    process_seconds: float


# Any token after any other, so that an answer is as long as it may be.
RAMBLING = {"--temperature": 100, "--top-k": 0, "--top-p": 1, "--min-p": 0}


def ask(
    program: Path,
    files: tuple[Path, Path],
    picture: Path,
    question: str,
    *,
    threads: int,
    n_ctx: int,
    tokens: int,
    rambling: bool = False,
) -> PeerRun:
    """Run llama-mtmd-cli once with a language model and a tower, on the CPU, greedily or rambling."""
    llm, mmproj = files
    arguments = ["-m", llm, "--mmproj", mmproj, "--image", picture, "-p", question, "-n", tokens, "-t", threads]
    options = ["-c", n_ctx, "-ngl", 0, "--jinja", "-lv", 4]
    sampling = RAMBLING if rambling else {"--temperature": 0}
    options += [part for name, value in sampling.items() for part in (name.replace("--temperature", "--temp"), value)]
    started = time.perf_counter()
    said = _run([program, *arguments, *options])
    return parse(said, time.perf_counter() - started)


def parse(said: str, process_seconds: float) -> PeerRun:
    """The times in what llama-mtmd-cli logs; LlavaEdgeError if they are not there.

    Its prompt evaluation runs from the text before the picture to the last token read, so that reading the picture and
    encoding it are in that time. Where they can't be, because it is too short, they are added.
    """
    encoded, prompt, evaluated = _ENCODED.findall(said), _PROMPT.search(said), _EVAL.search(said)
    if not encoded or prompt is None or evaluated is None:
        raise LlavaEdgeError(f"llama-mtmd-cli says nothing of its times: {' '.join(said.split()[-40:])}")
    encode, decode = (sum(map(float, found)) / 1000 for found in (encoded, _DECODED.findall(said)))
    reading, single = float(prompt[1]) / 1000, float(evaluated[1]) / 1000 / max(1, int(evaluated[2]))
    if reading < decode:
        reading += decode
    if reading - decode < encode:
        reading += encode
    return PeerRun(encode, reading + single, int(prompt[2]), process_seconds)


def decode_rate(program: Path, llm: Path, *, threads: int, tokens: int) -> float:
    """Tokens a second of llama-bench's ``tg``."""
    command = [program, "-m", llm, "-p", 0, "-n", tokens, "-t", threads, "-ngl", 0, "-r", 1, "-o", "json"]
    said = _run(command, errors=False)
    try:
        (row,) = json.loads(said)
        return float(row["avg_ts"])
    except (ValueError, KeyError, TypeError):
        raise LlavaEdgeError(f"llama-bench says {said[:200]!r}; expected one row of JSON") from None


def check_program(path: Path) -> Path:
    """The path, if it is a program."""
    if not path.is_file() or not os.access(path, os.X_OK):
        raise InputError(f"{path} is not a program", hint="Build llama.cpp and name its llama-mtmd-cli.")
    return path


def _run(command: Sequence[object], *, errors: bool = True) -> str:
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if errors else subprocess.PIPE,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LlavaEdgeError(f"{command[0]} takes longer than {PATIENCE_SECONDS} s") from None
    said = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        raise LlavaEdgeError(f"{command[0]} fails with {done.returncode}: {' '.join(said.split()[-40:])}")
    return said
