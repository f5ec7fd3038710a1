"""``llava-edge chat --server``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llava_edge
from llava_edge.errors import ImageError, InputError
from llava_edge.remote import RemoteModel, ServerError

from .conftest import EXAMPLES, Server, metric, wait_for

CAT = EXAMPLES / "cat.jpg"
ASK = "What animal is in this picture?"


def chat(*args: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llava_edge", "chat", *map(str, args)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=120, check=False, env={**os.environ}
    )


def test_the_answer_is_that_of_the_chat_without_a_server(nano_server: Server, nano: llava_edge.Model) -> None:
    done = chat("--server", nano_server.url, "--image", CAT, "-p", ASK)
    with nano.chat() as here:
        assert done.stdout == here.ask(ASK, [CAT]).text + "\n"
    assert done.returncode == 0
    assert done.stderr == ""


def test_json_has_the_fields_of_the_chat(nano_server: Server) -> None:
    reply = json.loads(chat("--server", nano_server.url, "--image", CAT, "-p", ASK, "--json", "--max-tokens", 2).stdout)
    assert set(reply) == {"text", "finish_reason", "model", "usage", "timings"}
    assert reply["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 2
    assert reply["usage"]["image_tokens"] == 64
    assert reply["timings"]["ttft_seconds"] > 0


def test_a_conversation_goes_on(nano_server: Server, nano: llava_edge.Model, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    done = chat("--server", nano_server.url, "--image", CAT, stdin=f"{ASK}\nAre you sure?\n/save {saved}\n")
    with nano.chat() as here:
        expected = [here.ask(ASK, [CAT]).text, here.ask("Are you sure?").text]
    assert done.stdout.splitlines() == expected
    turns = json.loads(saved.read_text())["turns"]
    assert [turn["text"] for turn in turns if turn["role"] == "assistant"] == expected
    assert turns[0]["images"] == ["cat.jpg"]


def test_pictures_are_read_ahead(serve: Callable[..., Server]) -> None:
    server = serve()
    with RemoteModel(server.url) as model, model.chat() as talk:
        talk.add_image(CAT)
        talk.read_ahead()
        wait_for(lambda: metric(server, "llava_edge_prompt_tokens_total") >= 64)
        *_, last = talk.stream(ASK, max_tokens=4)
        assert last.reply is not None
        assert last.reply.usage.cached_tokens >= 64
        talk.add_image(CAT)
        talk.read_ahead()
        talk.reset()  # hangs up, and the server goes on
        assert talk.turns == []
        *_, last = talk.stream(ASK, images=[CAT], max_tokens=4)
        assert last.reply is not None


def test_a_stopped_answer_stays_as_far_as_it_came(tiny_server: Server) -> None:
    with RemoteModel(tiny_server.url) as model, model.chat() as talk:
        stream = talk.stream("Hello", max_tokens=100)
        first = next(stream).text
        stream.close()
        assert talk.turns == [("user", "Hello", []), ("assistant", first, [])]
        assert [chunk.reply for chunk in talk.stream("Go on", max_tokens=3)][-1] is not None
        assert len(talk.turns) == 4


def test_a_key_is_used(serve: object, tiny_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# mine\nsome-key-0123456789\n")
    server: Server = serve("--model", tiny_bundle, "--threads", 1, "--parallel", 1, "--api-key-file", keys)  # type: ignore[operator]
    assert RemoteModel(f"{server.url}/#key=some-key-0123456789").name == "tiny"
    assert chat("--server", server.url, "--api-key-file", keys, "-p", "Hi", "--max-tokens", 1).returncode == 0
    refused = chat("--server", server.url, "-p", "Hi")
    assert refused.returncode == 1
    assert "wants an API key" in refused.stderr
    assert "hint: Name the file with the server's key" in refused.stderr


def test_what_is_wrong_is_said(tiny_server: Server, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"can't reach http://127.0.0.1:1: Connection refused"):
        RemoteModel("127.0.0.1:1")
    for wrong in ("ftp://localhost", "http://", "http://localhost:port"):
        with pytest.raises(InputError, match="is not an address"):
            RemoteModel(wrong)
    model = RemoteModel(tiny_server.url)
    with pytest.raises(ImageError, match="no such picture"):
        model.chat().add_image(tmp_path / "missing.png")
    with pytest.raises(ServerError, match="context 512"):
        list(model.chat().stream("word " * 2000))
    assert chat("--server", tiny_server.url, "--model", "nano", "-p", "Hi").returncode == 2
    assert chat("--api-key-file", tmp_path / "x", "-p", "Hi").returncode == 2
