"""The conversation of ``llava-edge chat``: a line is a question, a picture's path, or a command with a slash."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.cli import did_you_mean, line_input, terminal, transcript
from llava_edge.cli.chat import checked_text, context_is_full
from llava_edge.cli.dropped import picture_path, split_pictures, unquoted
from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.paths import exists
from llava_edge.types import Reply, SamplingParams

if TYPE_CHECKING:
    from llava_edge.model import Model
    from llava_edge.remote import RemoteChat, RemoteModel
    from llava_edge.session import ChatSession

HELP = """\
A line is a question; end it with \\ to go on in the next line. A picture that you drop on the window is added.

/image FILE...         add pictures; they go with your next question
/reset                 forget the conversation
/save FILE             write the conversation as Markdown (.md) or JSON (.json)
/settings [NAME VALUE] show the settings, or change one: /settings temperature 0.7
/help                  this text
/quit                  leave, as Ctrl-D does; Ctrl-C stops an answer"""

_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_WHOLE_NUMBERS = ("top_k", "seed", "max_tokens")


@dataclass(frozen=True)
class Settings:
    """What ``/settings`` can change."""

    sampling: SamplingParams
    max_tokens: int = 256
    stats: bool = False

    def values(self) -> dict[str, Any]:
        """The settings by name."""
        sampling = {name: getattr(self.sampling, name) for name in _SAMPLING}
        return {**sampling, "max_tokens": self.max_tokens, "stats": self.stats}

    def changed(self, name: str, text: str) -> Settings:
        """New settings with one value replaced.

        Raises
        ------
        InputError
            No such setting, or a value that it can't have.
        """
        name = name.replace("-", "_")
        if name not in self.values():
            names = list(self.values())
            raise InputError(
                f"no such setting: {name}{did_you_mean(name, names)}", hint=f"There are {', '.join(names)}."
            )
        value = _parse(name, text)
        if name in _SAMPLING:
            return replace(self, sampling=replace(self.sampling, **{name: value}))
        if name == "max_tokens" and value < 1:
            raise InputError(f"max_tokens is {value}; expected 1 or more")
        return replace(self, **{name: value})


class Repl:
    """Reads lines until the person leaves."""

    def __init__(
        self,
        model: Model | RemoteModel,
        session: ChatSession | RemoteChat,
        settings: Settings,
        *,
        system: str | None = None,
        quiet: bool = False,
    ) -> None:
        self.model = model
        self.session = session
        self.settings = settings
        self.system = system
        self.quiet = quiet
        self.saved: set[Path] = set()
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda rest: terminal.note(HELP),
            "/image": self.image,
            "/quit": self.quit,
            "/reset": self.reset,
            "/save": self.save,
            "/settings": self.show_or_set,
        }

    def run(self, images: Sequence[Path] = ()) -> int:
        """Add the pictures of the command line, then answer line by line.

        Returns the exit code: 1 if a line failed that nobody has typed, and so perhaps nobody has seen fail.
        """
        failed = False
        for path in images:
            self.session.add_image(path)
        self.session.read_ahead()
        if not self.quiet:
            pictures = f", {_pictures(len(images))} with your first question" if images else ""
            terminal.note(f"{self.model.name}{pictures}. Ask about a picture; /help tells more, Ctrl-D leaves.")
        with line_input.reader(list(self.commands)) as read_line:
            while True:
                try:
                    self.line(read_line())
                except EOFError:
                    return int(failed and not sys.stdin.isatty())
                except KeyboardInterrupt:
                    terminal.note("")
                except LlavaEdgeError as error:
                    failed = True
                    terminal.error(str(error), error.hint)

    def line(self, line: str) -> None:
        """Do what one line says. EOFError leaves."""
        line = checked_text(line).strip()
        pictures, question = split_pictures(line)
        for path in pictures:
            self.add(path)
        if question.startswith("/"):
            self.command(question)
        elif question:
            self.ask(question)
        elif pictures:
            self.session.read_ahead()

    def command(self, line: str) -> None:
        """Run a command with a slash."""
        name, _, rest = line.partition(" ")
        name = {"/exit": "/quit", "/?": "/help"}.get(name, name)
        if name not in self.commands:
            raise InputError(f"no such command: {name}{did_you_mean(name, self.commands)}", hint="/help lists them.")
        self.commands[name](rest.strip())

    def ask(self, question: str) -> None:
        """Stream an answer; Ctrl-C stops it and the conversation goes on."""
        sampling = {name: getattr(self.settings.sampling, name) for name in _SAMPLING}
        stream = self.session.stream(question, max_tokens=self.settings.max_tokens, **sampling)
        reply: Reply | None = None
        started = False
        try:
            for chunk in stream:
                reply = chunk.reply
                if chunk.text:
                    started = True
                    terminal.data(chunk.text)
        except KeyboardInterrupt:
            stream.close()
            terminal.note("\n(stopped)" if started else "(stopped)")
            return
        except LlavaEdgeError:
            if started:
                terminal.data("\n")
            raise
        terminal.data("\n")
        if reply is not None:
            self.after(reply)

    def after(self, reply: Reply) -> None:
        """What is worth saying about a finished answer."""
        if reply.finish_reason == "length" and not self.quiet:
            if context_is_full(reply, self.settings.max_tokens):
                n_ctx = self.model.describe()["n_ctx"]
                terminal.note(
                    f"(cut: the context of {n_ctx} tokens is full; /reset empties it, --n-ctx makes it larger)"
                )
            else:
                terminal.note(f"(cut after {self.settings.max_tokens} tokens; /settings max_tokens allows more)")
        if self.settings.stats:
            terminal.note(terminal.stats(reply))

    def image(self, rest: str) -> None:
        """``/image FILE...``; a name with spaces needs no quotes if it is the only one."""
        if not rest:
            raise InputError("/image needs a file", hint="For example: /image cat.jpg")
        if exists(picture_path(rest)):
            words = [rest]
        else:
            try:
                words = shlex.split(rest)
            except ValueError:
                words = [rest]
        for word in words:
            self.add(picture_path(word))
        self.session.read_ahead()

    def add(self, path: Path) -> None:
        """Put a picture beside the next question."""
        self.session.add_image(path)
        terminal.note(f"added {path.name}; it goes with your next question")

    def reset(self, rest: str) -> None:
        """``/reset``"""
        self.session.reset()
        terminal.note("The conversation is forgotten.")

    def save(self, rest: str) -> None:
        """``/save FILE``; only a file of this conversation is replaced."""
        if not rest:
            raise InputError("/save needs a file", hint="For example: /save talk.md")
        path = picture_path(unquoted(rest)).absolute()
        if exists(path) and path not in self.saved:
            raise InputError(f"{path} exists", hint="Choose another name.")
        record = {"model": self.model.name, "system": self.system, "settings": self.settings.values()}
        transcript.save(path, record, self.session.turns)
        self.saved.add(path)
        terminal.note(f"saved {path}")

    def show_or_set(self, rest: str) -> None:
        """``/settings``, or ``/settings NAME VALUE``."""
        if rest:
            name, _, value = rest.replace("=", " ", 1).partition(" ")
            self.settings = self.settings.changed(name, value.strip())
            shown = {name: self.settings.values()[name.replace("-", "_")]}
        else:
            shown = {**self.model.describe(), **self.settings.values()}
        for key, value in shown.items():
            terminal.note(f"{key.replace('_', '-')}: {_shown(value)}")

    def quit(self, rest: str) -> None:
        """``/quit``"""
        raise EOFError


def _parse(name: str, text: str) -> Any:
    if name == "stats":
        if text not in ("on", "off"):
            raise InputError(f"stats is {text!r}; expected on or off")
        return text == "on"
    if name == "seed" and text in ("", "none"):
        return None
    try:
        return int(text) if name in _WHOLE_NUMBERS else float(text)
    except ValueError:
        kind = "a whole number" if name in _WHOLE_NUMBERS else "a number"
        raise InputError(f"{name} is {text!r}; expected {kind}") from None


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
