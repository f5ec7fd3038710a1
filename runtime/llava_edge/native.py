"""llama.cpp's libraries: loaded once, kept quiet, and called from one thread that Ctrl-C can stop.

All computing calls go through one worker thread. OpenMP then has a single pool of threads, and the caller's thread
waits where Python can deliver a KeyboardInterrupt; the worker is told to stop and the caller gets the exception.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import queue
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from llava_edge.errors import ModelError

log = logging.getLogger(__name__)

T = TypeVar("T")

_WARNING, _ERROR, _CONTINUED = 3, 4, 5
# Turns of a waiting thread of OpenMP; how often to look whether processors are idle, and how long between.
_SPINS_IDLE, _SPINS_BUSY = 100_000, 1_000
_LOOKS, _LOOK_SECONDS = 3, 0.003
_recent_errors: deque[str] = deque(maxlen=32)
_keep_alive: list[Any] = []
_listeners: list[Callable[[str], None]] = []


def spin_count() -> int:
    """How long a waiting thread of GNU's OpenMP is to spin before it sleeps, by whether the processors are idle now.

    Waking a thread costs more than most waits for one: with 100,000 turns nano reads a picture a quarter faster than
    with 1,000, and LLaVA-1.5-7B 8 % (two idle cores of a virtual machine). But beside a busy process, whose turn such a
    wait delays, it reads three times slower. OpenMP's own 300,000 are worse still beside two.
    """
    return _SPINS_IDLE if _cpus_are_idle() else _SPINS_BUSY


def _cpus_are_idle() -> bool:
    """Whether nothing runs but this thread, as Linux tells; elsewhere nobody knows."""
    for attempt in range(_LOOKS):
        if attempt:
            time.sleep(_LOOK_SECONDS)
        try:
            running, _, _ = Path("/proc/loadavg").read_text().split()[3].partition("/")
            if int(running) <= 1:
                return True
        except (OSError, ValueError, IndexError):
            return False
    return False


@contextmanager
def _patient_threads() -> Iterator[None]:
    """Let OpenMP's threads wait as :func:`spin_count` says, unless the environment says how. It is read once, when the
    library is loaded. To sleep at once (``OMP_WAIT_POLICY=passive``) would cost two thirds of the speed.
    """
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = str(spin_count())
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


@functools.cache
def llama() -> Any:
    """The module ``llama_cpp.llama_cpp``, initialised, its log sent to Python's."""
    with _patient_threads():
        import llama_cpp.llama_cpp as library

    callback = library.llama_log_callback(_on_log)
    _keep_alive.append(callback)
    library.llama_log_set(callback, None)
    library.llama_backend_init()
    return library


@functools.cache
def mtmd() -> Any:
    """The module ``llama_cpp.mtmd_cpp``, its log sent to Python's."""
    library = llama()
    import llama_cpp.mtmd_cpp as module

    callback = library.llama_log_callback(_on_log)
    _keep_alive.append(callback)
    module.mtmd_log_set(callback, None)
    return module


def version() -> str:
    """The version of llama-cpp-python, which stands for the llama.cpp that it holds."""
    import llama_cpp

    return str(llama_cpp.__version__)


@functools.cache
def multiplies_with_amx() -> bool:
    """Whether llama.cpp would take Intel's AMX (Sapphire Rapids and later) for weights that it may rearrange.

    It must not: compiled by GCC 12 and earlier, whose ``_tile_loadconfig`` says that it reads 8 of its 64 bytes, the
    first product of several rows ends in a segmentation fault
    (https://github.com/ggml-org/llama.cpp/issues/20824). How it was compiled can't be told from outside.
    """
    said: bytes = llama().llama_print_system_info()
    return b"AMX_INT8 = 1" in said


def _on_log(level: int, text: bytes, _data: Any) -> None:
    line = text.decode("utf-8", "replace").rstrip("\n")
    if level == _ERROR and line.strip():
        _recent_errors.append(line)
    for listen in _listeners:
        listen(line)
    if line.strip(" .") and log.isEnabledFor(logging.DEBUG):
        log.debug("%s", line)


@contextmanager
def listening(listen: Callable[[str], None]) -> Iterator[None]:
    """Hand over every line that llama.cpp logs, for progress that it tells in no other way."""
    _listeners.append(listen)
    try:
        yield
    finally:
        _listeners.remove(listen)


def forget_errors() -> None:
    """Start a call whose failure will be explained by :func:`errors`."""
    _recent_errors.clear()


def errors() -> list[str]:
    """What llama.cpp logged as errors since :func:`forget_errors`, without the names of its functions."""
    return [re.sub(r"^\w+: (error: )?", "", line) for line in _recent_errors]


class _Job:
    """A call, and what became of it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.cancelled = False
        self.result: Any = None
        self.failure: BaseException | None = None
        self._call = call
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        try:
            if not self.cancelled:
                self.result = self._call()
        except BaseException as error:
            self.failure = error
        del self._call  # what it holds may be a gigabyte, which goes when the caller wants it to
        self._running.release()

    def wait(self) -> None:
        self._running.acquire()


class Worker:
    """One thread that makes the calls, in the order in which they come.

    ``stop_flag`` is the address of a byte that is 1 while the call that runs now is to end, and of a 0 behind it.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._current: _Job | None = None
        self._stopping = False
        self._closed = False
        self._lock = threading.Lock()
        self._flag = (ctypes.c_uint8 * 2)()
        self.stop_flag = ctypes.c_void_p(ctypes.addressof(self._flag))
        self._thread = threading.Thread(target=self._work, name="llava-edge", daemon=True)
        self._thread.start()

    @property
    def aborting(self) -> bool:
        """Whether the call that runs now has been asked to stop."""
        return self._current is not None and self._current.cancelled

    @property
    def stopping(self) -> bool:
        """Whether somebody wants the calls to end; may be set from any thread."""
        return self._stopping

    @stopping.setter
    def stopping(self, wanted: bool) -> None:
        self._stopping = wanted
        self._raise_flag()

    def _raise_flag(self) -> None:
        with self._lock:  # the last one who comes sees what is true
            self._flag[0] = self._stopping or self.aborting

    def run(self, call: Callable[[], T]) -> T:
        """The call's result. An interruption of the waiting thread stops the call, then goes on to the caller.

        ModelError after :meth:`close`.
        """
        job = _Job(call)
        try:
            accepted = self._put(job)
            if accepted:
                job.wait()
        except BaseException:
            job.cancelled = True
            self._raise_flag()
            self._settle()
            raise
        if not accepted:
            raise ModelError("the model is closed")
        if job.failure is not None:
            raise job.failure
        result: T = job.result
        return result

    def close(self) -> None:
        """End the thread when its work is done."""
        with self._lock:
            self._closed = True
            self._jobs.put(None)

    def _put(self, job: _Job) -> bool:
        """Queue a job; False if no thread would ever come to it."""
        with self._lock:
            if not self._closed:
                self._jobs.put(job)
            return not self._closed

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._current = job
            self._raise_flag()
            job.run()
            self._current = None
            self._raise_flag()
            del job

    def _settle(self) -> None:
        """Wait for all calls before. They use the caller's memory, so further interruptions have to wait too."""
        idle: list[bool] = []
        while not idle:
            try:
                if not self._put(_Job(lambda: idle.append(True))):
                    self._thread.join()
                    return
                while not idle:
                    time.sleep(0.001)
            except KeyboardInterrupt:
                continue


def flag_reader() -> Any:
    """A C function that tells of a :attr:`Worker.stop_flag` whether it is set: the length of it as a string.

    llama.cpp asks after every tensor, with the other threads waiting. A Python function would have to wait for the
    interpreter's lock each time.
    """
    return ctypes.CDLL("msvcrt" if os.name == "nt" else None).strlen


def default_threads() -> int:
    """Threads that compute fastest: one a physical core (a performance core on Apple silicon) that may be used."""
    if sys.platform == "darwin":
        import subprocess

        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            found = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, check=False).stdout
            if found.strip().isdigit():
                return int(found)
        return os.cpu_count() or 1
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_siblings(cpu) for cpu in usable}
    return max(1, min(len(cores), _cpu_quota()))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _cpu_quota() -> int:
    """Whole CPUs that the container's limit allows."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):
        return 1 << 16
