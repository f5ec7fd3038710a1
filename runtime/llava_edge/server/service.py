"""What the HTTP routes share: the model that is being loaded or ready, limits, and places for requests."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llava_edge.errors import InputError
from llava_edge.server.errors import ApiError
from llava_edge.server.guard import Access
from llava_edge.server.lanes import STORE_BYTES
from llava_edge.server.metrics import Metrics
from llava_edge.server.pictures import Fetch, Pictures
from llava_edge.server.scheduler import Scheduler

if TYPE_CHECKING:
    from llava_edge.model import Model, Picture
    from llava_edge.server.protocol import ChatRequest, ImageInput

log = logging.getLogger(__name__)

# No vocabulary has tokens as long as this on average; a longer text need not be tokenised to see that it doesn't fit.
_MOST_BYTES_PER_TOKEN = 256


@dataclass(frozen=True)
class Options:
    """Limits of a server. ``queue`` requests wait for one of ``parallel`` places; more are sent away."""

    parallel: int = 4
    queue: int = 32
    timeout_seconds: float = 300.0
    grace_seconds: float = 10.0
    max_body_bytes: int = 32 * 1024 * 1024
    store_bytes: int = STORE_BYTES
    exact: bool = True
    access: Access = field(default_factory=Access)

    def __post_init__(self) -> None:
        if not 1 <= self.parallel <= 64:
            raise InputError(f"parallel is {self.parallel}; expected 1 to 64")
        for name in ("queue", "grace_seconds", "store_bytes"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("timeout_seconds", "max_body_bytes"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}; expected more than 0")


class Service:
    """A server's state. ``load`` makes the model, in a thread, while the server answers already.

    ``on_ready`` is called when the model is there; ``on_failure`` when it can't be loaded.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        options: Options,
        *,
        fetch: Fetch | None = None,
        on_ready: Callable[[Scheduler], None] = lambda _scheduler: None,
        on_failure: Callable[[BaseException], None] = lambda _error: None,
    ) -> None:
        self.options = options
        self.metrics = Metrics()
        self.scheduler: Scheduler | None = None
        self.pictures: Pictures | None = None
        self.started = int(time.time())
        self._load = load
        self._fetch = fetch
        self._on_ready, self._on_failure = on_ready, on_failure
        self._in_flight = self._ahead = 0
        self._closing = False
        self._loader = threading.Thread(target=self._load_model, name="llava-edge-loader", daemon=True)
        self._closed: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to load the model."""
        self._loader.start()

    def begin_close(self) -> None:
        """Refuse what is new, and finish or give up what runs within the time of grace. A second call does nothing."""
        if self._closed is None:
            self._closing = True
            self._closed = asyncio.create_task(asyncio.to_thread(self._close))

    async def close(self) -> None:
        """End everything; afterwards the model is unloaded."""
        self.begin_close()
        assert self._closed is not None
        await self._closed
        if self.pictures is not None:
            self.pictures.close()

    def ready(self) -> Scheduler:
        """The scheduler; ApiError while the model is being loaded."""
        if self._closing:
            raise ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=5)
        if self.scheduler is None:
            raise ApiError(503, "The model is being loaded.", code="loading", retry_after=2)
        return self.scheduler

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for a request from its first byte on; ApiError 429 when all are taken."""
        if self._in_flight >= self.options.parallel + self.options.queue:
            raise ApiError(
                429,
                f"{self._in_flight} requests are being answered or wait, which is the limit.",
                code="queue_full",
                hint="Try again later.",
                retry_after=max(1, self.options.queue // (4 * self.options.parallel)),
            )
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """A request's place becomes one of those for reading ahead, so that no question is sent away for it."""
        if self._ahead >= self.options.parallel:
            raise ApiError(429, "Enough pictures are being read ahead.", code="queue_full", retry_after=1)
        self._in_flight -= 1
        self._ahead += 1
        try:
            yield
        finally:
            self._ahead -= 1
            self._in_flight += 1

    async def open_pictures(self, request: ChatRequest) -> list[list[tuple[Picture, int | None]]]:
        """The pictures of every turn, decoded, and how many tokens each is to have."""
        assert self.pictures is not None
        self._check_image_tokens(request)
        opened: list[list[tuple[Picture, int | None]]] = []
        number = 0
        for turn in request.turns:
            opened.append([])
            for image in turn.images:
                number += 1
                picture = await self.pictures.open(image.url, f"picture {number}")
                opened[-1].append((picture, self._image_tokens(request, image)))
        return opened

    def check_length(self, request: ChatRequest) -> None:
        """Refuse texts that are far too long before others have to wait for their tokens to be counted."""
        n_ctx = self.ready().model.engine.n_ctx
        texts = [request.system or "", *(text for turn in request.turns for text in (turn.question, turn.answer or ""))]
        size = sum(len(text) for text in texts)
        if size > n_ctx * _MOST_BYTES_PER_TOKEN:
            raise ApiError(
                400,
                f"The messages have {size:,} characters, which is far beyond the context {n_ctx}.",
                param="messages",
                code="context_length_exceeded",
            )

    def describe(self) -> dict[str, Any]:
        """What the page and programs want to know of the model."""
        model = self.ready().model
        tokens = model.visual_tokens
        return {
            "n_ctx": model.engine.n_ctx,
            "parallel": self.options.parallel,
            "image_tokens": None
            if tokens is None
            else {"default": model.image_tokens, "trained": sorted(tokens.trained)},
        }

    def _check_image_tokens(self, request: ChatRequest) -> None:
        tokens, asked = self.ready().model.visual_tokens, request.image_tokens
        if asked is not None and (tokens is None or asked not in tokens.trained):
            known = f"has to be one of {', '.join(map(str, sorted(tokens.trained)))}" if tokens else "needs a bundle"
            raise ApiError(400, f"'image_tokens' {known}.", param="image_tokens", code="invalid_value")

    def _image_tokens(self, request: ChatRequest, image: ImageInput) -> int | None:
        """The count that is asked for; ``detail`` low and high are the least and most that the model has learnt."""
        tokens = self.ready().model.visual_tokens
        if tokens is None:
            return None
        return request.image_tokens or {"low": min(tokens.trained), "high": max(tokens.trained)}.get(image.detail)

    def _load_model(self) -> None:
        try:
            model = self._load()
            scheduler = Scheduler(model, self.metrics, exact=self.options.exact, store_bytes=self.options.store_bytes)
            self.pictures = Pictures(*model.picture_settings, self._fetch)
            self.scheduler = scheduler
        except BaseException as error:
            self._on_failure(error)
        else:
            self._on_ready(scheduler)

    def _close(self) -> None:
        if self._loader.ident is not None:
            self._loader.join()
        if self.scheduler is not None:
            self.scheduler.close(self.options.grace_seconds)
            self.scheduler.model.close()
