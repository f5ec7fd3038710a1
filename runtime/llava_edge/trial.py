"""The first use of a model of an unusual kind, in a process that may die.

The preflight knows LLaVA's files and Qwen2-VL's tensor by tensor. llama.cpp runs dozens of other kinds, and ends the
process when something in such a file doesn't fit. So a pair of files of another kind is first loaded, and shown a
picture, in a process of its own; that it passed is remembered until a file changes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_edge import native
from llava_edge.errors import LlavaEdgeError, ModelFileError
from llava_edge.gguf_check import CHECKED_ARCHITECTURES
from llava_edge.gguf_header import Header
from llava_edge.gguf_mmproj import CHECKED_PROJECTORS, projector_of
from llava_edge.paths import cache_dir, exists

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 900
_PICTURE = (40, 60)


def require_trial(llm: Header, mmproj: Header | None) -> None:
    """Try the files out unless their kind is known or they have passed before; ModelFileError if the process died.

    ``mmproj`` is None where something else than llama.cpp runs the vision tower.
    """
    known_tower = mmproj is None or projector_of(mmproj) in CHECKED_PROJECTORS
    if llm.architecture in CHECKED_ARCHITECTURES and known_tower:
        return
    files = [llm, mmproj] if mmproj else [llm]
    mark = cache_dir() / "trials" / f"{_fingerprint(files)}.passed"
    if exists(mark):
        return
    log.info("first use of a model of kind %s: trying it out in a process of its own", llm.architecture)
    suspect = llm if known_tower else files[-1]
    command = [sys.executable, "-m", "llava_edge.trial", *(str(header.path.resolve()) for header in files)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE_SECONDS,
            check=False,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # it would start a debugger
        )
    except subprocess.TimeoutExpired:
        raise ModelFileError(suspect.path, "content", f"keeps llama.cpp busy for {PATIENCE_SECONDS} s") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        log.debug("%s", done.stderr.decode("utf-8", "replace"))
        raise ModelFileError(suspect.path, "content", f"makes llama.cpp end the process ({name})")
    if done.returncode == 0:
        _remember(mark)


def _fingerprint(headers: Sequence[Header]) -> str:
    facts: list[object] = [native.version()]
    for header in headers:
        status = header.path.stat()
        facts += [str(header.path.resolve()), status.st_size, status.st_mtime_ns]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _remember(mark: Path) -> None:
    """Losing the mark costs one more trial, so a cache that can't be written is not an error."""
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        log.debug("can't write %s: %s", mark, error)


def _try(llm: Path, mmproj: Path | None) -> None:
    """Load the files, show a picture, write two tokens."""
    from PIL import Image

    from llava_edge.engine import Engine
    from llava_edge.vision.mtmd import MtmdEncoder

    engine = Engine(llm, n_ctx=256, n_gpu_layers=0)
    if mmproj is not None:
        encoder = MtmdEncoder(mmproj, engine)
        encoder.encode_chunks(Image.linear_gradient("L").resize(_PICTURE).convert("RGB"))
    engine.decode_tokens(engine.tokenize("?", special=False) or [0])
    engine.decode_tokens([int(engine.logits().argmax())])


if __name__ == "__main__":
    try:
        _try(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    except LlavaEdgeError as failure:
        sys.exit(str(failure))
