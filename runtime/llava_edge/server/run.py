"""Run a service until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
from types import FrameType

import uvicorn

from llava_edge.errors import InputError
from llava_edge.server.app import make_app
from llava_edge.server.service import Service

BACKLOG = 256
MAX_CONNECTIONS = 512


class _Server(uvicorn.Server):
    """uvicorn, which tells the service at the first signal, while answers still run."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Unlike uvicorn's own, it does not note the signal to raise it again at the end: to stop a server is no error.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._service.begin_close)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; InputError if the address can't be had. Port 0 takes any free one."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise InputError(
            f"can't listen on {host}:{port}: {error.strerror or error}", hint="Take another --port or --host."
        ) from None
    return listener


def run(service: Service, listener: socket.socket, stop: list[BaseException]) -> None:
    """Serve until a signal comes, or something is in ``stop``."""
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(service.options.grace_seconds) + 5,
        h11_max_incomplete_event_size=64 * 1024,
        http="h11",
        ws="none",
    )
    server = _Server(config, service)

    async def serve() -> None:
        watch = asyncio.create_task(_watch(server, stop))
        try:
            await server.serve([listener])
        finally:
            watch.cancel()

    asyncio.run(serve())


async def _watch(server: uvicorn.Server, stop: list[BaseException]) -> None:
    while not stop:
        await asyncio.sleep(0.1)
    server.should_exit = True
