"""Lines from the keyboard with editing, history and completion, or from a pipe."""

from __future__ import annotations

import glob
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType

from llava_edge.cli import terminal
from llava_edge.errors import InputError

PROMPT, MORE = "> ", ". "
HISTORY_LINES = 1000


@contextmanager
def reader(commands: Sequence[str]) -> Iterator[Callable[[], str]]:
    """A function that reads the next line; a line that ends with ``\\`` goes on in the next one.

    It raises EOFError at the end of the input, and KeyboardInterrupt on Ctrl-C. History is kept in a file while a
    person types, never for a pipe.
    """
    typed = sys.stdin.isatty()
    with _editing(commands) if typed else nullcontext():
        yield lambda: _read(typed)


def history_file() -> Path:
    """Where the lines of earlier conversations are kept."""
    home = os.environ.get("LLAVA_EDGE_HOME")
    if home:
        return Path(home) / "history"
    from platformdirs import user_state_path

    return user_state_path("llava-edge", appauthor=False) / "history"


def _read(typed: bool) -> str:
    line = _read_one(typed, PROMPT)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + _read_one(typed, MORE)
    return line


def _read_one(typed: bool, prompt: str) -> str:
    try:
        if not typed:
            return _read_piped()
        if sys.stdout.isatty():
            return input(prompt)
        sys.stderr.write(prompt)  # answers go to a file; input() would put the prompt there too
        sys.stderr.flush()
        return input()
    except UnicodeDecodeError:
        raise InputError("the line is not valid text") from None
    except EOFError:
        if typed:
            terminal.note("")
        raise


def _read_piped() -> str:
    """One line, decoded alone: text that is decoded in blocks would take the lines beside a bad one with it."""
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode(sys.stdin.encoding).rstrip("\r\n")


@contextmanager
def _editing(commands: Sequence[str]) -> Iterator[None]:
    try:
        readline = importlib.import_module("readline")
    except ImportError:  # not on every system; lines can be typed all the same
        yield
        return
    path = history_file()
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    _complete(readline, commands)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


def _complete(readline: ModuleType, commands: Sequence[str]) -> None:
    """Complete commands at the start of a line and files after them."""

    def candidates(word: str) -> list[str]:
        if readline.get_begidx() == 0 and word.startswith("/"):
            return [f"{name} " for name in commands if name.startswith(word)]
        found = sorted(glob.glob(glob.escape(os.path.expanduser(word)) + "*"))  # noqa: PTH207, PTH111
        return [f"{name}/" if os.path.isdir(name) else name for name in found]  # noqa: PTH112

    def complete(word: str, state: int) -> str | None:
        return dict(enumerate(candidates(word))).get(state)

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
