"""Our side of ``bench ttft``: processes that load a model, ask about a picture and tell their times.

``python -m llava_edge.bench.speed.first_token JSON`` is the child; it prints one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.bench.speed.cold import complaint
from llava_edge.errors import LlavaEdgeError
from llava_edge.types import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    import llava_edge

PATIENCE_SECONDS = 900


def run(step: str, **asked: Any) -> dict[str, float]:
    """Run a step in a process of its own; the figures that it tells."""
    command = [sys.executable, "-m", __name__, json.dumps({"step": step, **asked})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise LlavaEdgeError(f"the step {step} takes longer than {PATIENCE_SECONDS} s") from None
    if done.returncode != 0:
        said = complaint(done.returncode, done.stderr)
        raise LlavaEdgeError(f"the step {step} fails in a process of its own: {said}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def whole_process(
    bundle: Path, picture: Path, question: str, *, threads: int, n_ctx: int, tokens: int, cache: bool
) -> tuple[float, int]:
    """Seconds of a whole ``llava-edge chat -p`` that rambles, and how many tokens it wrote."""
    from llava_edge.bench.speed.peer import RAMBLING

    options: list[object] = ["--threads", threads, "--n-ctx", n_ctx, "--max-tokens", tokens, "--seed", 0]
    options += ["--n-gpu-layers", 0, "--json", "--quiet"]
    command: list[object] = [
        sys.executable,
        "-m",
        "llava_edge",
        "chat",
        "--model",
        bundle,
        "--image",
        picture,
        "-p",
        question,
    ]
    options += [part for pair in RAMBLING.items() for part in pair]
    command += [*options, *([] if cache else ["--no-cache"])]
    started = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise LlavaEdgeError(f"llava-edge chat fails: {done.stderr.strip()[-400:]}")
    return seconds, int(json.loads(done.stdout)["usage"]["completion_tokens"])


class _Wandering:
    """Chooses as the greedy sampler does, at its full cost, but writes other tokens, so that no answer ends early."""

    def __init__(self, n_vocab: int) -> None:
        from llava_edge.sampling import Sampler

        self._sampler = Sampler(SamplingParams())
        self._next = n_vocab // 2

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token."""
        self._sampler.choose(logits)
        self._next += 1
        return self._next


def cold(model: llava_edge.Model, picture: str, questions: Sequence[str], counts: Sequence[int]) -> dict[str, float]:
    """The first question about a picture with each number of tokens, and a second one after the first of them.

    What an answer leaves to be written is on the disk before the next question is asked.
    """
    found: dict[str, float] = {}
    for number, count in enumerate(counts):
        model.forget()
        model.image_tokens = count
        reply = model.chat().ask(questions[0], images=[picture], max_tokens=1)
        found[f"ttft_{count}"] = reply.timings.ttft_seconds
        _let_write(model)
        if number == 0:
            found["encode"] = reply.timings.encode_seconds
            found["text_tokens"] = reply.usage.prompt_tokens - reply.usage.image_tokens
            again = model.chat().ask(questions[1], images=[picture], max_tokens=1)
            found["second_question"] = again.timings.ttft_seconds
            _let_write(model)
    return found


def _let_write(model: llava_edge.Model) -> None:
    if model.remembered is not None:
        model.remembered.close()
        os.sync()


def decode(model: llava_edge.Model, tokens: int) -> float:
    """Tokens a second through everything that an answer passes."""
    from llava_edge.generate import Generation, generate

    model.forget()
    model.engine.decode_tokens([model.engine.n_vocab // 3])
    generation = Generation()
    loop = model.token_loop(generation, _Wandering(model.engine.n_vocab), tokens + 1)
    for _ in generate(loop, model.cache):
        pass
    return generation.decoded / generation.decode_seconds


def main(asked: str) -> None:
    """The child: an error is one line for the parent."""
    try:
        figures = _measure(json.loads(asked))
    except LlavaEdgeError as error:
        sys.exit(str(error))
    sys.stdout.write(json.dumps(figures))


def _measure(options: dict[str, Any]) -> dict[str, float]:
    """The figures of a step."""
    from PIL import Image

    import llava_edge
    from llava_edge.cache import DiskCache

    counts, settings = options["counts"], options["settings"]
    with llava_edge.load(options["bundle"], image_tokens=counts[0], **settings) as model:
        found = {"load": model.load_seconds}
        if options["step"] == "cold":
            began = time.perf_counter()
            size = model.bundle.manifest.image.size if model.bundle else 224
            model.encode(model.open_picture(Image.new("RGB", (size, size))))
            found["load"] += time.perf_counter() - began
            if model.remembered is not None:
                model.remembered.close()
            DiskCache().clear()
            found |= cold(model, options["picture"], options["questions"], counts)
            found["decode"] = decode(model, options["answer_tokens"])
        else:
            reply = model.chat().ask(options["questions"][1], images=[options["picture"]], max_tokens=1)
            found["new_process"] = reply.timings.ttft_seconds
            found["cached_tokens"] = reply.usage.cached_tokens
    return found


if __name__ == "__main__":
    main(sys.argv[1])
