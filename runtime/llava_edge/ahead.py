"""Work that is done before it is asked for: a picture is read while the question about it is typed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from llava_edge.errors import LlavaEdgeError

if TYPE_CHECKING:
    from llava_edge.engine import Engine

log = logging.getLogger(__name__)


class Ahead:
    """One piece of work in a thread. Until :meth:`wait` or :meth:`cancel` returns nobody else may use the engine.

    Ctrl-C may come at any moment, in :meth:`start` too: keep the object where it is found before it is started.
    """

    def __init__(self, engine: Engine, work: Callable[[], None]) -> None:
        self._engine = engine
        self._work = work
        self._busy = threading.Lock()  # held from the start until the work is over
        self._gate = threading.Lock()
        self._entered = self._given_up = False

    def start(self) -> None:
        """Begin the work."""
        thread = threading.Thread(target=self._run, name="llava-edge-ahead", daemon=True)
        self._busy.acquire()
        try:
            thread.start()
        except BaseException:
            with self._gate:
                self._given_up = True
                if not self._entered:
                    self._busy.release()
            raise

    def wait(self) -> None:
        """Return when it is done."""
        with self._busy:
            pass

    def cancel(self) -> None:
        """Stop the work where it is. What was evaluated whole stays."""
        self._engine.stopping = True
        try:
            while True:
                try:
                    self.wait()
                    return
                except KeyboardInterrupt:  # the engine must be free before anybody goes on
                    continue
        finally:
            self._engine.stopping = False

    def _run(self) -> None:
        with self._gate:
            if self._given_up:
                return
            self._entered = True
        try:
            self._work()
        except LlavaEdgeError as error:  # the question will meet it again, where it can be told
            log.debug("reading ahead ended: %s", error)
        finally:
            self._busy.release()
