"""A model in a process of its own, as a person starts it: time to the first token, and the peak of memory.

``python -m llava_edge.bench.speed.cold`` is the child. It prints a line when the first token is there, and then its
figures as JSON. The clock is the parent's, so that starting Python is inside the time.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_edge.bench.models import Subject
from llava_edge.errors import LlavaEdgeError

QUESTION = "Describe this picture in one sentence."
_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class ColdStart:
    """One start. ``dropped`` tells whether the files were asked out of the system's page cache before."""

    ttft_seconds: float
    peak_memory_bytes: int
    dropped: bool


def start(subject: Subject, picture: Path, *, threads: int, n_ctx: int) -> ColdStart:
    """Start a process that asks one question; LlavaEdgeError with its message if it fails."""
    bundle = subject.bundle
    drops = [_drop_from_page_cache(bundle.directory / file.path) for file in bundle.manifest.files]
    asked: dict[str, Any] = {
        "bundle": str(bundle.directory),
        "picture": str(picture),
        "n_threads": threads,
        "n_ctx": n_ctx,
    }
    asked |= {"image_tokens": subject.image_tokens, "vision_backend": subject.vision_backend}
    command = [sys.executable, "-m", __name__, json.dumps(asked)]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        first = child.stdout.readline()
        seconds = time.perf_counter() - started
        figures = child.stdout.read()
        said = child.stderr.read()
    if child.returncode != 0 or first != "first token\n":
        raise LlavaEdgeError(
            f"{bundle.manifest.name} fails in a process of its own: {complaint(child.returncode, said)}"
        )
    return ColdStart(seconds, json.loads(figures)["peak_memory_bytes"], all(drops))


def complaint(code: int, said: str) -> str:
    """What a child died of: the last line of a Python program, which may have warned before, or the end of a crash."""
    lines = said.strip().splitlines()
    return (lines[-1] if code == 1 and lines else said.strip()[-400:]) or f"exit status {code}"


def _drop_from_page_cache(path: Path) -> bool:
    """Ask the system to forget what it read of a file. It keeps pages that another process has mapped."""
    if not hasattr(os, "posix_fadvise"):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def peak_memory_bytes() -> int:
    """The most memory that this process ever held. On Linux ``getrusage`` would count the parent before ``exec``."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(asked: str) -> None:
    """The child: an error is one line for the parent."""
    try:
        _answer(json.loads(asked))
    except LlavaEdgeError as error:
        sys.exit(str(error))


def _answer(options: dict[str, Any]) -> None:
    """Answer one question and report."""
    import llava_edge

    bundle, picture = options.pop("bundle"), options.pop("picture")
    with llava_edge.load(bundle, cache=False, **options) as model, model.chat() as chat:
        first = True
        for _ in chat.stream(QUESTION, images=[picture], max_tokens=_ANSWER_TOKENS):
            if first:
                sys.stdout.write("first token\n")
                sys.stdout.flush()
            first = False
        sys.stdout.write(json.dumps({"peak_memory_bytes": peak_memory_bytes()}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
