"""From the pictures in a request to pixels: data URIs are unpacked, and files decoded in processes of their own."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import os
import re
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from PIL import Image

from llava_edge.errors import ImageError
from llava_edge.model import Picture, arrange
from llava_edge.server.errors import ApiError
from llava_edge.server.image_process import LENGTH

if TYPE_CHECKING:
    from llava_edge.types import ImageSpec

DECODERS = 2
DECODE_SECONDS = 20.0
KEPT_BYTES = 64 * 1024 * 1024
_DATA_URI = re.compile(r"data:(?:image/[\w.+-]+)?(?:;[\w.+=-]+)*?;base64,", re.ASCII | re.IGNORECASE)

Fetch = Callable[[str], Awaitable[bytes]]


class Decoder:
    """A process that decodes one picture at a time. One that takes too long, or dies, is replaced."""

    def __init__(self, spec: ImageSpec | None, pad_color: tuple[int, int, int]) -> None:
        self._spec = spec
        self._settings = json.dumps({"spec": None if spec is None else asdict(spec), "pad_color": pad_color})
        self._process: Process | None = None

    async def decode(self, data: bytes) -> Picture:
        """The picture of a file's bytes; ImageError says what is wrong with it."""
        if self._process is None or self._process.returncode is not None:
            self._process = await self._start()
        try:
            async with asyncio.timeout(DECODE_SECONDS):
                head, pixels = await self._ask(self._process, data)
        except TimeoutError:
            self.close()
            raise ImageError(f"the picture takes more than {DECODE_SECONDS:.0f} s to decode") from None
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            raise ImageError("the picture can't be decoded within the limits of memory") from None
        except BaseException:
            self.close()  # half a reply may lie in the pipe
            raise
        if "error" in head:
            raise ImageError(head["error"], hint=head["hint"])
        image = Image.frombytes("RGB", tuple(head["size"]), pixels)
        return await asyncio.to_thread(arrange, "", image, self._spec)  # cutting tiles takes a while

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()

    async def _start(self) -> Process:
        command = [sys.executable, "-P", "-m", "llava_edge.server.image_process", self._settings]
        keep = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT")
        environment = {name: os.environ[name] for name in keep if name in os.environ}
        environment["OPENBLAS_NUM_THREADS"] = "1"  # each of its threads would reserve memory
        return await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment)

    async def _ask(self, process: Process, data: bytes) -> tuple[dict[str, Any], bytes]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(LENGTH.pack(len(data)) + data)
        await process.stdin.drain()
        parts = []
        for _ in range(2):
            (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
            parts.append(await process.stdout.readexactly(length))
        return json.loads(parts[0]), parts[1]


class Pictures:
    """Opens the pictures of requests. The latest are kept, because a conversation sends its pictures every time.

    ``fetch`` gets the bytes behind an http(s) address; None allows none.
    """

    def __init__(self, spec: ImageSpec | None, pad_color: tuple[int, int, int], fetch: Fetch | None = None) -> None:
        self._fetch = fetch
        self._decoders = [Decoder(spec, pad_color) for _ in range(DECODERS)]
        self._idle: asyncio.Queue[Decoder] = asyncio.Queue()
        for decoder in self._decoders:
            self._idle.put_nowait(decoder)
        self._kept: OrderedDict[bytes, Picture] = OrderedDict()

    async def open(self, url: str, where: str) -> Picture:
        """The picture of a data URI or an address; ``where`` names it in the error."""
        try:
            data = await self._read(url)
            key = hashlib.sha256(data).digest()
            picture = self._kept.get(key)
            if picture is None:
                picture = self._kept[key] = await self._decode(data)
                while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return picture
        except ImageError as error:
            raise ApiError(400, f"'{where}': {error}.", param=where, code="invalid_image", hint=error.hint) from None

    def close(self) -> None:
        """End the processes."""
        for decoder in self._decoders:
            decoder.close()

    async def _read(self, url: str) -> bytes:
        head = _DATA_URI.match(url[:256])
        if head is not None:
            try:
                return base64.b64decode(url[head.end() :], validate=True)
            except (binascii.Error, ValueError):
                raise ImageError("the data URI is not valid base64") from None
        if url[:8].lower().startswith(("http://", "https://")):
            if self._fetch is None:
                raise ImageError(
                    "this server fetches no pictures from the net",
                    hint="Send it as a data URI, or start the server with --allow-image-urls.",
                )
            return await self._fetch(url)
        raise ImageError("expected a data URI: data:image/jpeg;base64,…")

    async def _decode(self, data: bytes) -> Picture:
        decoder = await self._idle.get()
        try:
            return await decoder.decode(data)
        finally:
            self._idle.put_nowait(decoder)


def _bytes(picture: Picture) -> int:
    return sum(image.width * image.height * 3 for image in (picture.image, *picture.tiles))
