"""How soon a place is free when a client leaves: while an answer is written, a text is read, a picture is encoded."""

from __future__ import annotations

import base64
import io
import random
import re
import time
from typing import Any

import numpy as np
from PIL import Image

from llava_edge.bench.http_client import Client, quantiles
from llava_edge.engine import DEFAULT_BATCH

STORY = "Write a long story about a dog that crosses the sea. Tell it in many chapters."
QUIET_SECONDS = 0.3
NUMBERS = 300  # two or three tokens each


def cancel_latencies(client: Client, count: int, seed: int) -> dict[str, Any]:
    """Seconds from the moment at which a client leaves until its place is free: as ``/metrics`` shows it to who keeps
    asking, and, the next time, from when the server knows it, as that says itself afterwards.

    Beside them the time of one token, of one batch of a text, and of one picture, when nobody leaves.
    """
    chance = random.Random(seed)
    whole = client.ask(_question(STORY))
    gaps = [later - earlier for earlier, later in zip(whole.seconds, whole.seconds[1:], strict=False)]
    long = client.ask(_question(_text(chance)))
    seen = client.ask(_question("What is it?", _picture(chance)))
    assert long.ttft_seconds is not None
    assert seen.ttft_seconds is not None
    found: dict[str, list[float]] = {kind: [] for kind in ("decode", "prefill", "picture")}
    own: dict[str, list[float]] = {kind: [] for kind in found}
    for number in range(2 * count):
        for kind in found:
            before, ended = _server_seconds(client)
            if kind == "decode":
                client.ask(_question(STORY), leave_after=chance.randint(1, max(1, len(whole.seconds) - 4)))
            elif kind == "prefill":
                client.ask(_question(_text(chance)), patience_seconds=chance.uniform(0.1, 0.8) * long.ttft_seconds)
            else:
                picture = _question("What is it?", _picture(chance))
                client.ask(picture, patience_seconds=chance.uniform(0.1, 0.8) * seen.ttft_seconds)
            if number % 2:
                found[kind].append(_until_free(client))
                continue
            time.sleep(QUIET_SECONDS)  # to ask takes the server's time too
            after, last = _server_seconds(client)
            if last == ended + 1:  # the answer had not ended by itself
                own[kind].append(after - before)
    return {
        "count": count,
        "token_seconds": quantiles(gaps),
        "batch_seconds": long.ttft_seconds * DEFAULT_BATCH / max(DEFAULT_BATCH, long.prompt_tokens),
        "picture_seconds": seen.ttft_seconds,
        **{f"{kind}_seconds_until_free": quantiles(values) for kind, values in found.items()},
        **{f"{kind}_seconds_in_server": quantiles(values) for kind, values in own.items()},
    }


def _server_seconds(client: Client) -> tuple[float, float]:
    """The sum and the number of the server's own times."""
    text = client.get("/metrics")[1].decode()
    total, number = (re.search(rf"^llava_edge_cancel_seconds_{name} (\S+)", text, re.M) for name in ("sum", "count"))
    return (float(total[1]), float(number[1])) if total and number else (0.0, 0.0)


def _until_free(client: Client) -> float:
    left = time.perf_counter()
    while b"llava_edge_running 0.0" not in client.get("/metrics")[1]:
        time.sleep(0.002)  # the server needs the processor for more than these answers
    return time.perf_counter() - left


def _question(text: str, picture: str | None = None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": picture}})
    return [{"role": "user", "content": parts}]


def _text(chance: random.Random) -> str:
    """Numbers that no cache knows."""
    return " ".join(str(chance.randrange(1000)) for _ in range(NUMBERS))


def _picture(chance: random.Random) -> str:
    pixels = np.random.default_rng(chance.randrange(1 << 32)).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
