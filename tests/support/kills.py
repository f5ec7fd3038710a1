"""Run an action again and again, and kill it at every one of its writes: first at the first, then at the second ...

A process is forked for each run. An audit hook counts what Python is about to change below a directory (files opened
for writing, renames, links, deletions, new directories) and ends the process with SIGKILL, at once, at the chosen one.
Native code that writes is killed inside a file: the kernel ends a process that writes beyond a limit on file sizes.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITES = {"os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"}


def _paths(event: str, arguments: tuple[Any, ...]) -> list[str]:
    if event == "open":
        path, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        named = isinstance(path, (str, bytes))
        return [os.fsdecode(path)] if named and (writes or (mode and set(mode) & set("wax+"))) else []
    return [os.fsdecode(a) for a in arguments[:2] if isinstance(a, (str, bytes))] if event in _WRITES else []


def _kill_at(root: Path, number: int) -> None:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if any(path.startswith(str(root)) or not Path(path).is_absolute() for path in _paths(event, arguments)):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def in_process(action: Callable[[], object]) -> int:
    """Run in a forked process; its exit status, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_everywhere(
    root: Path,
    prepare: Callable[[], object],
    action: Callable[[], object],
    check: Callable[[], object],
    check_complete: Callable[[], object],
) -> int:
    """Kill ``action`` at each write below ``root``; returns how many there are.

    After each kill ``check`` must find a good state, and after the action has run again ``check_complete`` the new one.
    """
    number = 1
    while True:
        prepare()

        def killed(number: int = number) -> None:
            _kill_at(root, number)
            action()

        status = in_process(killed)
        check()
        if status == 0:
            check_complete()
            return number - 1
        assert status == -signal.SIGKILL, f"write {number}: exit status {status}"
        assert in_process(action) == 0, f"the run after a kill at write {number} failed"
        check_complete()
        number += 1


def kill_inside_files(
    root: Path,
    prepare: Callable[[], object],
    action: Callable[[], object],
    check: Callable[[], object],
    check_complete: Callable[[], object],
) -> int:
    """Kill ``action`` at the first, a middle and the last byte of each file that it leaves below ``root``, and check.

    A file that is written before a smaller one is cut at that one's sizes instead. Returns the number of kills.
    """
    prepare()
    assert in_process(action) == 0
    sizes = {path.stat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink()}
    limits = sorted({limit for size in sizes if size for limit in (0, size // 2, size - 1)})
    kills = 0
    for limit in limits:
        prepare()

        def killed(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            action()

        status = in_process(killed)
        assert status == -signal.SIGXFSZ, f"at {limit} bytes: exit status {status}"
        kills += 1
        check()
        assert in_process(action) == 0, f"the run after a kill at {limit} bytes failed"
        check_complete()
    return kills
