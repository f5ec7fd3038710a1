"""The conformance suite of the C library, run by Python: ``python tests/support/conformance.py LIBRARY`` records anew
what the cases are expected to give, with the tower of that library.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import llava_edge
from llava_edge import native
from llava_edge.errors import ContextFullError

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "conformance" / "cases.json"
NANO = ROOT / "runtime" / "llava_edge" / "models" / "nano"
CONTEXT_FULL = 50
FINISH = {"stop": 0, "length": 1, "cancelled": 2}


def read_cases() -> dict[str, Any]:
    """The suite: ``recorded_with`` and ``cases``."""
    return json.loads(CASES.read_text(encoding="utf-8"))


def machine() -> str:
    """What llama.cpp says of the kernels that it uses; other kernels may choose another token at a tie."""
    return native.llama().llama_print_system_info().decode()


def picture(source: Any) -> Any:
    """A file beside the examples, or a pattern ``[width, height, number]`` that the C runner draws too."""
    if isinstance(source, str):
        return ROOT / "examples" / source
    width, height, number = source
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    planes = (x * 255 // width, y * 255 // height, (x * y + number * (x + 2 * y) + number * 37) % 256)
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def run_case(model: llava_edge.Model, case: dict[str, Any]) -> list[dict[str, Any]]:
    """What each question of a case gives."""
    found: list[dict[str, Any]] = []
    with model.chat(case.get("system")) as chat:
        for step in case["steps"]:
            if "truncate" in step:
                chat.truncate(step["truncate"])
            elif "save" in step:
                saved = model.cache.save()
                model.cache.clear()
                model.cache.restore(saved)
            else:
                found.append(ask(chat, step))
    return found


def ask(chat: llava_edge.ChatSession, step: dict[str, Any]) -> dict[str, Any]:
    """One question: tokens, text and counts of the answer, or the number of the error."""
    options = {key: value for key, value in step.items() if key not in ("ask", "images")}
    pieces: list[str] = []
    try:
        images = [picture(source) for source in step.get("images", [])]
        for chunk in chat.stream(step["ask"], images, **options):
            pieces.append(chunk.text)
            reply = chunk.reply
    except ContextFullError:
        return {"status": CONTEXT_FULL}
    assert reply is not None
    usage = reply.usage
    return {
        "status": 0,
        "ids": list(reply.token_ids),
        "text": "".join(pieces),
        "finish": FINISH[reply.finish_reason],
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "image_tokens": usage.image_tokens,
    }


def run_all(
    cases: list[dict[str, Any]], threads: int | None = None, bundle: Path = NANO
) -> dict[str, list[dict[str, Any]]]:
    """All cases in their order, a model for each run of equal settings."""
    found: dict[str, list[dict[str, Any]]] = {}
    model, settings = None, None
    for case in cases:
        if model is None or case["model"] != settings:
            if model is not None:
                model.close()
            settings = case["model"]
            model = llava_edge.load(bundle, vision_backend="native", n_threads=threads, **settings)
        found[case["name"]] = run_case(model, case)
    if model is not None:
        model.close()
    return found


if __name__ == "__main__":
    os.environ["LLAVA_EDGE_LIBRARY"] = sys.argv[1]
    os.environ["LLAVA_EDGE_CACHE_MB"] = "0"  # as in the tests: what lies on disk would count as cached
    suite = read_cases()
    results = run_all(suite["cases"])
    for case in suite["cases"]:
        case["expected"] = results[case["name"]]
    suite["recorded_with"] = machine()
    lines = ",\n".join(f"    {json.dumps(case, ensure_ascii=False)}" for case in suite["cases"])
    head = json.dumps(suite["recorded_with"])
    CASES.write_text(f'{{\n  "recorded_with": {head},\n  "cases": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
