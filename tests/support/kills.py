"""Run an action again and again, and kill it at every one of its writes: first at the first, then at the second ...

A process is forked for each run. An audit hook counts what Python is about to change below a directory (files opened
for writing, renames, links, deletions, new directories) and ends the process with SIGKILL, at once, at the chosen one.
"""

from __future__ import annotations

import os
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
