"""Several clients at a time: the same texts, places that are freed at once, and ends that don't hang."""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

import llava_edge
from llava_edge.engine import Engine
from llava_edge.grammar import from_schema
from llava_edge.prompt import Answer, TokenRun, UserText
from llava_edge.server import scheduler as scheduler_module
from llava_edge.server.answer import REMEMBERED_TOKENS, AnswerMemory, Event, Job
from llava_edge.server.errors import ApiError
from llava_edge.server.lanes import Lanes
from llava_edge.server.metrics import Metrics
from llava_edge.server.protocol import ChatRequest, Turn
from llava_edge.server.scheduler import Scheduler
from llava_edge.server.service import Options, Service
from llava_edge.side_by_side import runs

from .conftest import Server, answer, get, metric, question, wait_for

# An answer that can't end soon, whatever the random weights say.
_NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 512}
LONG: dict[str, Any] = {
    "max_tokens": 1900,
    "response_format": {"type": "json_schema", "json_schema": {"name": "numbers", "schema": _NUMBERS}},
}


def post(server: Server, body: Any, headers: dict[str, str] | None = None) -> http.client.HTTPConnection:
    """A request whose answer nobody reads yet."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json", **(headers or {})})
    return connection


def test_texts_under_load_are_those_of_the_chat(
    nano_server: Server, client: openai.OpenAI, nano: llava_edge.Model, photos: list[Path]
) -> None:
    """Conversations of three turns, more of them than places, so that they are batched, stored and taken up again.

    The later turns go beyond the 256th token, from where on answers are computed one by one.
    """
    questions = ["Describe this picture.", "What is in the background?", "Tell me a long story about it."]

    def expected(first: Path, second: Path) -> list[str]:
        with nano.chat() as chat:
            pictures = [[first], [], [second, first]]
            return [chat.ask(q, p, max_tokens=24).text for q, p in zip(questions, pictures, strict=True)]

    def served(first: Path, second: Path) -> list[str]:
        messages: list[Any] = []
        texts = []
        for text, pictures in zip(questions, [[first], [], [second, first]], strict=True):
            messages.append(question(text, *pictures))
            reply = client.chat.completions.create(model="nano", messages=messages, max_tokens=24)
            texts.append(reply.choices[0].message.content or "")
            messages.append(answer(texts[-1]))
        return texts

    pairs = [(a, b) for a in photos for b in photos if a != b][:8]
    with ThreadPoolExecutor(len(pairs)) as pool:
        together = list(pool.map(lambda pair: served(*pair), pairs))
    assert together == [expected(*pair) for pair in pairs]


def test_sequences_are_evaluated_together_where_their_numbers_follow_each_other() -> None:
    assert runs([2, 0, 1], 3) == [[0, 1, 2]]
    assert runs([5, 3, 0, 1, 2], 3) == [[0, 1, 2], [3], [5]]
    assert runs([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3], [4]]
    assert runs([4], 3) == [[4]]
    assert runs([], 3) == []


def test_a_conversation_comes_to_lie_beside_one_that_is_busy(engine: Engine) -> None:
    four = Engine(engine.path, n_ctx=64, n_threads=1, n_seq_max=4)
    try:
        lanes = Lanes(four, store_bytes=0)
        lanes.lanes[3].busy = True
        assert [lanes.take([TokenRun((1,))]).seq for _ in range(3)] == [2, 1, 0]
    finally:
        four.close()


def test_answers_are_remembered_up_to_a_number_of_tokens() -> None:
    memory = AnswerMemory()
    history = [UserText("What is it?")]
    for number in range(3):
        memory.remember(history, str(number), range(REMEMBERED_TOKENS // 2))
    assert memory.recall(history, "0") == UserText("0")
    assert memory.recall(history, "2") == Answer(tuple(range(REMEMBERED_TOKENS // 2)))
    memory.remember(history, "2", [7])
    assert memory.recall(history, "1") == Answer(tuple(range(REMEMBERED_TOKENS // 2)))
    assert memory.recall(history, "2") == Answer((7,))


def test_a_picture_that_several_ask_about_is_read_once(nano_server: Server, pictures: list[Path]) -> None:
    def cached(text: str) -> int:
        reply = nano_server.client().chat.completions.create(
            model="nano", messages=[question(text, pictures[0], detail="high")], max_tokens=2
        )
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        return reply.usage.prompt_tokens_details.cached_tokens or 0

    misses = metric(nano_server, 'llava_edge_pictures_total{cache="miss"}')
    with ThreadPoolExecutor(3) as pool:
        found = sorted(pool.map(cached, ("What is it?", "Is it a cat?", "What colour is it?")))
    assert found[0] < 16  # no more than what begins every prompt
    assert found[1] >= 256
    assert metric(nano_server, 'llava_edge_pictures_total{cache="miss"}') == misses + 1


@pytest.mark.parametrize("pause_seconds", [60.0, 0.0])
def test_prompts_that_wait_are_read_until_the_pause_is_over(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, pause_seconds: float
) -> None:
    """Two questions come while an answer is written, which goes on after both or between them."""
    monkeypatch.setattr(scheduler_module, "_PAUSE_SECONDS", pause_seconds)
    names: list[str] = []
    began, over = threading.Event(), threading.Event()

    def job(name: str) -> Job:
        def emit(event: Event) -> None:
            names.append(name)
            began.set()
            if len(names) > 40:
                over.set()

        request = ChatRequest(None, (Turn("Hello"),), max_tokens=400, top_logprobs=0)
        now = time.perf_counter()
        return Job(request, [[]], emit, now, now + 60, from_schema(_NUMBERS))

    model = llava_edge.load(tiny_bundle, n_threads=1, n_ctx=512, n_seq_max=3)
    scheduler = Scheduler(model, Metrics(), exact=True, store_bytes=0)
    try:
        scheduler.submit(job("first"))
        assert began.wait(30)
        with scheduler._lock:  # both are there before the next step
            scheduler.submit(job("second"))
            scheduler.submit(job("third"))
        assert over.wait(30)
    finally:
        scheduler.close()
        model.close()
    between = names[names.index("second") : names.index("third")]
    assert ("first" in between) == (pause_seconds == 0), names


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(tiny_server: Server, stream: bool) -> None:
    before = metric(tiny_server, "llava_edge_cancelled_total")
    freed = metric(tiny_server, "llava_edge_cancel_seconds_count")
    connection = post(
        tiny_server,
        {"messages": [question("Hello")], "stream": stream, **LONG},
    )
    wait_for(lambda: metric(tiny_server, "llava_edge_running") == 1)
    connection.close()
    wait_for(lambda: metric(tiny_server, "llava_edge_cancelled_total") == before + 1)
    wait_for(lambda: metric(tiny_server, "llava_edge_running") == 0)
    assert metric(tiny_server, "llava_edge_cancel_seconds_count") == freed + 1


def test_a_client_that_leaves_while_its_prompt_is_read_stops_that(
    serve: Callable[..., Server], make_llm: Callable[..., Path], make_bundle: Callable[..., Path]
) -> None:
    """One batch of this prompt takes far longer than is waited for."""
    bundle = make_bundle(llm=make_llm(context=65536))
    server = serve("--model", bundle, "--parallel", 1, "--threads", 1, "--n-ctx", 60000)
    connection = post(server, {"messages": [question("cat " * 40_000)], "max_tokens": 1})
    wait_for(lambda: metric(server, "llava_edge_running") == 1)
    time.sleep(0.5)
    connection.close()
    started = time.monotonic()
    wait_for(lambda: metric(server, "llava_edge_running") == 0)
    assert metric(server, "llava_edge_prompt_tokens_total") == 0  # it was not read to its end
    server.client().chat.completions.create(model="tiny", messages=[question("Hello")], max_tokens=2)
    assert time.monotonic() - started < 60


def test_a_full_queue_sends_away(serve: Callable[..., Server], tiny_bundle: Path) -> None:
    server = serve("--model", tiny_bundle, "--parallel", 1, "--queue", 1, "--threads", 1, "--n-ctx", 512)
    # A body that is announced and does not come holds a place too.
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    for connection in held:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n"
        )
    refused: list[openai.RateLimitError] = []

    def ask() -> bool:
        try:
            server.client().chat.completions.create(model="tiny", messages=[question("Hello")], max_tokens=1)
        except openai.RateLimitError as error:
            refused.append(error)
        return bool(refused)

    wait_for(ask)
    assert int(refused[0].response.headers["retry-after"]) >= 1
    assert refused[0].code == "queue_full"
    assert json.loads(get(server, "/health")) == {"status": "ok"}
    for connection in held:
        connection.close()
    # The official client tries again by itself.
    retrying = server.client(max_retries=5)
    assert retrying.chat.completions.create(model="tiny", messages=[question("Hello")], max_tokens=1).choices


def test_reading_ahead_sends_no_question_away() -> None:
    service = Service(lambda: pytest.fail("not loaded"), Options(parallel=1, queue=0))
    with ExitStack() as held:
        held.enter_context(service.place())
        held.enter_context(service.reading_ahead())
        held.enter_context(service.place())  # of a question
        with pytest.raises(ApiError, match="Enough pictures"):
            held.enter_context(service.reading_ahead())
        with pytest.raises(ApiError, match="which is the limit"):
            held.enter_context(service.place())
    with service.place(), service.reading_ahead():  # all was given back
        pass


def test_an_answer_that_takes_too_long_ends(serve: Callable[..., Server], tiny_bundle: Path) -> None:
    server = serve("--model", tiny_bundle, "--parallel", 1, "--threads", 1, "--timeout", 0.2)
    options: dict[str, Any] = {"model": "tiny", "messages": [question("Hello")], **LONG}
    with pytest.raises(openai.APIStatusError, match="longer than the server allows") as caught:
        server.client().chat.completions.create(**options)
    assert caught.value.status_code == 504
    with pytest.raises(openai.APIError, match="longer than the server allows"):
        list(server.client().chat.completions.create(**options, stream=True))
    wait_for(lambda: metric(server, "llava_edge_running") == 0)


def test_health_answers_while_an_answer_is_computed(tiny_server: Server) -> None:
    connection = post(tiny_server, {"messages": [question("Hello")], **LONG})
    wait_for(lambda: metric(tiny_server, "llava_edge_running") == 1)
    assert json.loads(get(tiny_server, "/health")) == {"status": "ok"}
    connection.close()


def test_a_stop_finishes_what_runs_and_ends(serve: Callable[..., Server], tiny_bundle: Path) -> None:
    server = serve("--model", tiny_bundle, "--parallel", 1, "--threads", 1)
    stream = server.client().chat.completions.create(
        model="tiny", messages=[question("Hello")], stream=True, **{**LONG, "max_tokens": 100}
    )
    chunks = iter(stream)
    next(chunks)
    assert server.stop() == 0
    assert list(chunks)[-1].choices[0].finish_reason in ("stop", "length")


def test_a_stop_gives_up_what_takes_too_long(serve: Callable[..., Server], tiny_bundle: Path) -> None:
    server = serve("--model", tiny_bundle, "--parallel", 1, "--threads", 1, "--grace", 0.3)
    body = {"messages": [question("Hi")], **LONG}
    connections = [post(server, body) for _ in range(3)]
    wait_for(lambda: metric(server, "llava_edge_running") == 1 and metric(server, "llava_edge_queued") == 2)
    assert server.stop(signal.SIGINT) == 0
    for connection in connections:
        response = connection.getresponse()
        assert response.status == 503
        assert json.loads(response.read())["error"]["code"] == "shutting_down"
        connection.close()


def test_a_kill_loses_nothing_but_the_request(
    serve: Callable[..., Server], tiny_bundle: Path, pictures: list[Path]
) -> None:
    args = ("--model", tiny_bundle, "--parallel", 1, "--threads", 1)
    server = serve(*args)
    options: dict[str, Any] = {"model": "tiny", "messages": [question("Hello", pictures[0])], "max_tokens": 12}
    first = server.client().chat.completions.create(**options).choices[0].message.content
    connection = post(server, {"messages": [question("Hi")], **LONG})
    wait_for(lambda: metric(server, "llava_edge_running") == 1)
    server.process.kill()
    with pytest.raises((http.client.HTTPException, OSError)):
        connection.getresponse().read()
    connection.close()
    again = serve(*args)
    assert again.client().chat.completions.create(**options).choices[0].message.content == first


def test_clients_that_come_and_leave_at_random_leave_nothing_behind(tiny_server: Server, pictures: list[Path]) -> None:
    client = tiny_server.client(max_retries=8)

    def visit(number: int) -> None:
        chance = random.Random(number)
        picture = chance.choice(pictures)
        stream = client.chat.completions.create(
            model="tiny", messages=[question(f"Question {number}", picture)], stream=True, max_tokens=60
        )
        for count, _ in enumerate(stream):
            if chance.random() < 0.3 and count > chance.randrange(20):
                stream.close()
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(visit, range(40)))
    wait_for(lambda: metric(tiny_server, "llava_edge_running") == 0)
    assert metric(tiny_server, "llava_edge_queued") == 0
    assert metric(tiny_server, 'llava_edge_requests_total{status="500"}') == 0


def test_full_batching_answers_everybody(serve: Callable[..., Server], tiny_bundle: Path, pictures: list[Path]) -> None:
    server = serve("--model", tiny_bundle, "--parallel", 6, "--threads", 1, "--batching", "full", "--n-ctx", 256)
    assert "(6 in a batch)" in server.log

    def ask(number: int) -> Any:
        return server.client().chat.completions.create(
            model="tiny", messages=[question(f"Question {number}", pictures[number % 3])], max_tokens=20
        )

    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(ask, range(12)))
    assert {reply.choices[0].finish_reason for reply in replies} <= {"stop", "length"}


def test_metrics_count_what_happened(serve: Callable[..., Server], tiny_bundle: Path, pictures: list[Path]) -> None:
    server = serve("--model", tiny_bundle, "--parallel", 1, "--threads", 1, "--n-ctx", 256)
    for text in ("What?", "Why?"):
        messages: Any = [question(text, pictures[0])]
        reply = server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=5)
    assert reply.usage is not None
    assert metric(server, 'llava_edge_requests_total{status="200"}') == 2
    assert metric(server, "llava_edge_ttft_seconds_count") == 2
    assert metric(server, 'llava_edge_pictures_total{cache="miss"}') == 1
    assert metric(server, 'llava_edge_pictures_total{cache="hit"}') == 1
    assert (
        0 < metric(server, "llava_edge_prompt_cached_tokens_total") < metric(server, "llava_edge_prompt_tokens_total")
    )
    assert metric(server, "llava_edge_answer_tokens_total") >= reply.usage.completion_tokens
    assert metric(server, "llava_edge_kv_cells_used") > 0
    if Path("/proc/self/stat").exists():
        assert metric(server, "process_resident_memory_bytes") > 1e6
