"""``POST /v1/chat/completions``: one request from its bytes to the last event, or until its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from llava_edge.errors import InputError
from llava_edge.grammar import from_schema
from llava_edge.server.answer import Event, Failed, Finished, Job, Piece
from llava_edge.server.errors import ApiError, as_api_error
from llava_edge.server.protocol import ChatRequest, parse_chat, parse_json
from llava_edge.server.replies import Completion, event
from llava_edge.server.scheduler import Scheduler
from llava_edge.server.service import Service

log = logging.getLogger(__name__)

T = TypeVar("T")

BODY_SECONDS = 60.0
READ_SECONDS = 10.0  # for what is written last, beyond the time that an answer may take
CLIENT_CLOSED_REQUEST = 499
_LARGE_BODY = 1 << 20


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class ChatCompletions:
    """The route as an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        started = time.perf_counter()
        try:
            with self._service.place():
                status = await self._serve(Request(scope, receive), send, started)
        except (ClientGone, ClientDisconnect):
            status = CLIENT_CLOSED_REQUEST
            self._service.metrics.cancelled()
        except Exception as failure:
            error = as_api_error(failure)
            status = _noted(failure, error)
            await JSONResponse(error.body(), status, headers=error.headers())(scope, receive, send)
        self._service.metrics.request(status)
        log.info("chat completion: status %d, %.2f s", status, time.perf_counter() - started)

    async def _serve(self, request: Request, send: Send, started: float) -> int:
        scheduler = self._service.ready()
        body = await _read_body(request, self._service.options.max_body_bytes)
        parse = parse_json(body) if len(body) < _LARGE_BODY else await asyncio.to_thread(parse_json, body)
        asked = parse_chat(parse)
        name = scheduler.model.name
        if asked.model not in (None, name):
            raise ApiError(404, f"There is no such model here, only {name!r}.", param="model", code="model_not_found")
        with contextlib.nullcontext() if asked.max_tokens else self._service.reading_ahead():
            return await self._work(scheduler, asked, request, send, started)

    async def _work(
        self, scheduler: Scheduler, asked: ChatRequest, request: Request, send: Send, started: float
    ) -> int:
        self._service.check_length(asked)
        grammar = None if asked.schema is None else await asyncio.to_thread(_grammar, asked.schema)
        gone = asyncio.create_task(_disconnected(request))
        try:
            async with asyncio.timeout(self._service.options.timeout_seconds):
                pictures = await _unless(gone, self._service.open_pictures(asked))
            return await self._answer(scheduler, asked, pictures, grammar, gone, send, started)
        except TimeoutError:
            raise ApiError(504, "The pictures took longer than the server allows.", code="timeout") from None
        finally:
            gone.cancel()

    async def _answer(
        self,
        scheduler: Scheduler,
        asked: ChatRequest,
        pictures: Any,
        grammar: str | None,
        gone: asyncio.Task[None],
        send: Send,
        started: float,
    ) -> int:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        gone.add_done_callback(lambda _task: events.put_nowait(None))

        def emit(item: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everybody who listens
                loop.call_soon_threadsafe(events.put_nowait, item)

        job = Job(asked, pictures, emit, started, started + self._service.options.timeout_seconds, grammar)
        scheduler.submit(job)
        completion = Completion(scheduler.model.name, include_usage=asked.include_usage)
        try:
            # The scheduler ends what takes too long; beyond that, it is a client that reads nothing.
            async with asyncio.timeout_at(loop.time() + job.deadline - time.perf_counter() + READ_SECONDS):
                if asked.stream:
                    return await _stream(completion, events, send)
                await _whole(completion, events, send, logprobs=asked.top_logprobs is not None)
                return 200
        except TimeoutError:
            raise ClientGone from None
        finally:
            scheduler.cancel(job)


async def _whole(completion: Completion, events: asyncio.Queue[Event | None], send: Send, *, logprobs: bool) -> None:
    pieces: list[Piece] = []
    while not isinstance(item := await _next(events), Finished):
        pieces.append(item)
    await _send_start(send, "application/json")
    body = json.dumps(completion.whole(pieces, item, logprobs=logprobs), ensure_ascii=False).encode()
    await send({"type": "http.response.body", "body": body})


async def _stream(completion: Completion, events: asyncio.Queue[Event | None], send: Send) -> int:
    """Returns the status that the answer would have had if it had not begun with 200."""
    status = 200
    item = await _next(events)  # an error before the first piece still has a status of its own
    await _send_start(send, "text/event-stream")
    await _send_part(send, completion.first())
    try:
        while isinstance(item, Piece):
            await _send_part(send, completion.piece(item))
            item = await _next(events)
        last = completion.last(item)
    except ClientGone:
        raise
    except Exception as failure:
        error = as_api_error(failure)
        status = _noted(failure, error)
        last = event(error.body())
    await send({"type": "http.response.body", "body": last})
    return status


def _noted(failure: Exception, error: ApiError) -> int:
    """The error's status; a defect of the server is logged, without the words of its message."""
    if error.status == 500:
        log.error("a request failed: %s", type(failure).__name__, exc_info=log.isEnabledFor(logging.DEBUG))
    return error.status


async def _next(events: asyncio.Queue[Event | None]) -> Piece | Finished:
    item = await events.get()
    if item is None:
        raise ClientGone
    if isinstance(item, Failed):
        raise item.error
    return item


async def _send_start(send: Send, kind: str) -> None:
    headers = [(b"content-type", kind.encode()), (b"x-accel-buffering", b"no")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_part(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _read_body(request: Request, limit: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page elsewhere can't send this without asking first
        raise ApiError(415, "The content type has to be application/json.", code="unsupported_media_type")
    too_large = ApiError(413, f"The body is larger than {limit:,} bytes.", code="request_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"The body took more than {BODY_SECONDS:.0f} s.", code="timeout") from None
    return bytes(body)


def _grammar(schema: dict[str, Any]) -> str:
    try:
        return from_schema(schema)
    except InputError as error:
        raise ApiError(400, f"{error}.", param="response_format", code="invalid_schema", hint=error.hint) from None


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: asyncio.Task[None], work: Coroutine[Any, Any, T]) -> T:
    """The result of some work; ClientGone, and the work is given up, if the client leaves first."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
