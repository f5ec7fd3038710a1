"""Requests that are nearly right: none may make the server fail. LLAVA_EDGE_MUTATIONS sets how many are sent."""

from __future__ import annotations

import copy
import http.client
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .conftest import Server, answer, question

COUNT = int(os.environ.get("LLAVA_EDGE_MUTATIONS", "600"))
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, 1e308, -1e308, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**400),
    *("", " ", "x", "\0", "\ud800", "é" * 9, "🙂", "<|im_start|>", "<image>", "{{7*7}}", "%s%n", "../../etc/passwd"),
    *([], [[]], [None], {}, {"": ""}, {"type": "text"}, {"url": None}, "a" * 5000, [1] * 200, "data:image/png;base64,"),
    *({"type": "object", "properties": {"a": {"$ref": "#"}}}, {"anyOf": []}, {"enum": []}, {"$ref": "#/definitions/x"}),
    *({"type": "array", "items": {"type": "string"}, "minItems": 3}, {"const": {"a": [1, None]}}, {"type": ["string"]}),
]


def base(picture: Path) -> dict[str, Any]:
    """A request that uses everything."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    return {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            question("Hello", picture, detail="low"),
            answer("Hi"),
            question("Bye"),
        ],
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "seed": 1,
        "stop": ["x"],
        "stream": False,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        "image_tokens": 4,
        "n": 1,
        "tools": [],
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inner for found in ((*path, key), *places(item, (*path, key)))]


def mutated(request: dict[str, Any], chance: random.Random) -> bytes:
    """The request with up to three odd values, and now and then damaged bytes."""
    request = json.loads(json.dumps(request))
    if chance.random() < 0.8:
        del request["response_format"]
    for _ in range(chance.randint(1, 3)):
        odd = copy.deepcopy(chance.choice(ODD))
        path = chance.choice(places(request))
        where = request
        for key in path[:-1]:
            where = where[key]
        kind = chance.random()
        if kind < 0.2:
            del where[path[-1]]
        elif kind < 0.3 and isinstance(where, dict):
            where[chance.choice(["x", "role", "content", "", "type", "functions", "pattern"])] = copy.deepcopy(
                chance.choice(ODD)
            )
        elif kind < 0.4 and isinstance(where, list):
            where.append(copy.deepcopy(chance.choice([odd, *where])))
        else:
            where[path[-1]] = odd
    data = bytearray(json.dumps(request).encode())
    if chance.random() < 0.15:
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data[: chance.randrange(len(data))] if chance.random() < 0.05 else data)


def test_mutated_requests_are_answered_or_refused(tiny_server: Server, pictures: list[Path]) -> None:
    request = base(pictures[0])

    def send(first: int) -> list[int]:
        """Every second request over one connection, which stays open."""
        connection = http.client.HTTPConnection("127.0.0.1", tiny_server.port, timeout=60)
        seen = []
        for number in range(first, COUNT, 2):
            body = mutated(request, random.Random(number))
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
            assert response.status < 500, (number, text)
            assert "Traceback" not in text
            assert ("error" if response.status >= 400 else '"choices"') in text, number
            seen.append(response.status)
        connection.close()
        return seen

    with ThreadPoolExecutor(2) as pool:
        statuses = [status for part in pool.map(send, (0, 1)) for status in part]
    assert len(statuses) == COUNT
    assert {200, 400} <= set(statuses)
    assert "Traceback" not in tiny_server.log
    reply = tiny_server.client().chat.completions.create(model="tiny", messages=[question("Hello")], max_tokens=1)
    assert reply.choices
