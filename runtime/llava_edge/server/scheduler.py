"""One thread that computes all answers: pieces of prompts for a moment, then a token for everyone, and again."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from llava_edge.model import arrange
from llava_edge.server.answer import AnswerMemory, Failed, Job, answer, history
from llava_edge.server.errors import ApiError
from llava_edge.server.lanes import Lane, Lanes
from llava_edge.side_by_side import exact_rows, groups, runs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llava_edge.model import Model
    from llava_edge.server.metrics import Metrics

log = logging.getLogger(__name__)

# Answers that are being written stand still while a piece of a prompt is read, and while further ones are begun within
# this time: so more of them come to be written together.
_PAUSE_SECONDS = 0.1


@dataclass(eq=False)
class _Active:
    """An answer that has a lane. ``token`` is to be evaluated next; None while the prompt is read."""

    job: Job
    lane: Lane
    steps: Generator[int | None, NDArray[np.float32], None]
    token: int | None = None


class Scheduler:
    """Computes answers for up to ``model.engine.n_seq_max`` jobs at a time, in the order in which they came.

    Parameters
    ----------
    model
        The model; nobody else may use it meanwhile.
    exact
        Evaluate only so many sequences together as gives each the bits that it has alone. Otherwise all of them,
        which is quicker, and where two words are nearly equally likely the other one may be taken.
    store_bytes
        Memory for conversations that have no lane.
    """

    def __init__(self, model: Model, metrics: Metrics, *, exact: bool, store_bytes: int) -> None:
        self.model = model
        self.metrics = metrics
        self._warm_up()
        self.rows = exact_rows(model.engine) if exact else model.engine.n_seq_max
        self._exact = exact
        self._lanes = Lanes(model.engine, store_bytes)
        self._memory = AnswerMemory()
        self._waiting: deque[Job] = deque()
        self._active: list[_Active] = []
        self._prefilling: Job | None = None
        self._lock = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="llava-edge-scheduler", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job in the queue."""
        with self._lock:
            if self._closing:
                raise ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=5)
            self._waiting.append(job)
            self._lock.notify()

    def cancel(self, job: Job) -> None:
        """Give a job up at once, in the middle of its prompt too; nothing is emitted any more."""
        with self._lock:
            job.cancelled_at = time.perf_counter()
            job.cancelled.set()
            if self._prefilling is job:
                self.model.engine.stopping = True
            self._lock.notify()

    def state(self) -> dict[str, int]:
        """Figures of this moment."""
        return {
            "running": len(self._active),
            "queued": len(self._waiting),
            "kv_cells_used": sum(lane.cache.tokens for lane in self._lanes.lanes),
            "kv_stored_bytes": self._lanes.stored_bytes,
        }

    def refuse_new(self) -> None:
        """Take no more jobs and refuse those that wait."""
        with self._lock:
            self._closing = True
            waiting, self._waiting = list(self._waiting), deque()
            self._lock.notify()
        for job in waiting:
            job.emit(Failed(ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=5)))

    def close(self, grace_seconds: float = 0.0) -> None:
        """Finish what runs within a time, give up the rest, and end the thread."""
        self.refuse_new()
        deadline = time.monotonic() + grace_seconds
        while self._active and time.monotonic() < deadline:
            time.sleep(0.02)
        for active in list(self._active):
            active.job.emit(Failed(ApiError(503, "The server is shutting down.", code="shutting_down")))
            self.cancel(active.job)
        self._thread.join()

    # The thread

    def _work(self) -> None:
        while self._wait():
            try:
                self._read_pieces()
                self._write_tokens()
            except Exception as error:  # a defect ends the answers that run, never the server
                # the error's own words may hold what people wrote
                log.error("the scheduler failed: %s", type(error).__name__, exc_info=log.isEnabledFor(logging.DEBUG))
                for active in list(self._active):
                    self._fail(active.job, error)
                    self._drop(active)

    def _wait(self) -> bool:
        """Wait for work; False when there will be none."""
        with self._lock:
            while not self._active and not self._waiting:
                if self._closing:
                    return False
                self._lock.wait()
        return True

    def _admit(self) -> None:
        """Give the next job a lane, once no other is reading: it may find what that one has read."""
        while self._waiting and self._lanes.free() and all(active.token is not None for active in self._active):
            with self._lock:
                job = self._next()
            if job is None or job.cancelled.is_set():
                continue
            try:
                segments = history(self.model, job, self._memory)
                lane = self._lanes.take(self.model.tokenizer.units(segments))
            except Exception as error:
                self._fail(job, error)
                continue
            steps = answer(self.model, job, lane, segments, self._memory, self.metrics)
            self._active.append(_Active(job, lane, steps))

    def _next(self) -> Job | None:
        """Who waits longest; those that only read ahead come last."""
        job = next((job for job in self._waiting if job.request.max_tokens), next(iter(self._waiting), None))
        if job is not None:
            self._waiting.remove(job)
        return job

    def _read_pieces(self) -> None:
        """What waits to be read, until the pause is over."""
        end = time.monotonic() + _PAUSE_SECONDS
        while True:
            self._drop_overdue()
            self._admit()
            if not self._read_a_piece() or time.monotonic() >= end:
                return

    def _read_a_piece(self) -> bool:
        """One picture, or one batch of the prompt, of the job that is being read; False if there is none."""
        reading = next((active for active in self._active if active.token is None), None)
        if reading is None:
            return False
        with self._lock:
            self._prefilling = reading.job
        try:
            if not reading.job.cancelled.is_set():
                self._advance(reading, None)
        finally:
            with self._lock:
                self._prefilling = None
                self.model.engine.stopping = False
        self._dropped(reading)
        return True

    def _write_tokens(self) -> None:
        """A token for every answer that is being written."""
        writing = [active for active in self._active if active.token is not None]
        for group in self._groups(writing):
            group = [active for active in group if not self._dropped(active)]
            tokens = {active.lane.seq: active.token for active in group if active.token is not None}
            if not tokens:
                continue
            try:
                rows = self.model.engine.decode_each(tokens)
            except Exception as error:
                for active in group:
                    self._fail(active.job, error)
                    self._drop(active)
                continue
            for active, logits in zip(group, rows, strict=True):
                active.lane.cache.appended(tokens[active.lane.seq])
                self._advance(active, logits)

    def _groups(self, writing: Sequence[_Active]) -> list[list[_Active]]:
        """Who is evaluated together."""
        by_seq = {active.lane.seq: active for active in writing}
        if not self._exact:
            found = runs(list(by_seq), self.rows)
        else:
            found = groups({seq: active.lane.cache.tokens for seq, active in by_seq.items()}, self.rows)
        return [[by_seq[seq] for seq in run] for run in found]

    def _advance(self, active: _Active, logits: Any) -> None:
        try:
            active.token = active.steps.send(logits)
        except StopIteration:
            self._drop(active)
        except Exception as error:
            self._fail(active.job, error)
            self._drop(active)

    def _dropped(self, active: _Active) -> bool:
        """Whether an answer is over; if its client has left, it is from now on."""
        if active.job.cancelled.is_set():
            self._drop(active)
        return active not in self._active

    def _drop(self, active: _Active) -> None:
        """Free the lane; what was evaluated stays there."""
        if active in self._active:
            active.steps.close()
            self._lanes.release(active.lane)
            if active.job.cancelled.is_set():
                self.metrics.freed(time.perf_counter() - active.job.cancelled_at)
            self._active.remove(active)

    def _drop_overdue(self) -> None:
        """End what nobody waits for any more, before the next piece of work is done for the others."""
        for active in list(self._active):
            self._dropped(active)
        now = time.perf_counter()
        overdue = ApiError(504, "The answer took longer than the server allows.", code="timeout")
        for active in [active for active in self._active if active.job.deadline < now]:
            self._fail(active.job, overdue)
            self._drop(active)
        with self._lock:
            late = [job for job in self._waiting if job.deadline < now or job.cancelled.is_set()]
            for job in late:
                self._waiting.remove(job)
        for job in late:
            self._fail(job, overdue)

    def _fail(self, job: Job, error: BaseException) -> None:
        if not job.cancelled.is_set():
            job.emit(Failed(error))

    def _warm_up(self) -> None:
        """Load the vision tower now, and learn how this model marks its pictures."""
        self.model.open_vision()
        spec, _ = self.model.picture_settings
        side = spec.size if spec else 224
        image = Image.new("RGB", (side, side), (128, 128, 128))
        self.model.encode(arrange("warm-up", image, spec))
