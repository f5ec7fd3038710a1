"""The command line. Data goes to stdout, everything else to stderr; exit codes are 0, 1 (failed), 2 (wrong usage)
and 130 (stopped with Ctrl-C).

Commands are loaded by name when they run, so that ``--help`` is quick.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from llava_edge.cli import terminal
from llava_edge.errors import LlavaEdgeError

# name -> (module:attribute, the line in the list of commands)
COMMANDS = {
    "chat": ("llava_edge.cli.chat:chat", "Ask about pictures: one question, or a conversation."),
    "serve": ("llava_edge.cli.serve:serve", "Answer programs (OpenAI's protocol) and people (a web page)."),
    "pull": ("llava_edge.cli.pull:pull", "Download a model by name, or from any repository of the hub."),
    "list": ("llava_edge.cli.models:list_models", "List the models that are here."),
    "show": ("llava_edge.cli.models:show", "Show what is known of a model."),
    "remove": ("llava_edge.cli.models:remove", "Delete a pulled model."),
    "verify": ("llava_edge.cli.models:verify", "Compare models' files with their checksums."),
    "cache": ("llava_edge.cli.cache:cache", "Show or delete what was computed once and kept on disk."),
    "doctor": ("llava_edge.cli.doctor:doctor", "Check this installation, its models and this machine."),
    "convert": ("llava_edge.cli.convert:convert", "Turn a checkpoint into a bundle that chat can run."),
    "quantize": ("llava_edge.cli.quantize:quantize", "Make a bundle smaller."),
    "imatrix": ("llava_edge.cli.imatrix:imatrix", "Learn from pictures and answers which weights matter most."),
    "train": ("llava_edge.cli.train:train", "Run one stage of training from a recipe."),
    "datagen": ("llava_edge.cli.datagen:datagen", "Make training data: instructions, captions, drawn pictures."),
    "eval": ("llava_edge.cli.evaluate:evaluate", "Score a model on pictures with known answers."),
    "native": ("llava_edge.cli.native:native", "Say where libllava_edge finds what it is built against."),
    "bench": ("llava_edge.cli.bench:bench", "Measure speed, memory and what quantisation costs."),
}
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

log = logging.getLogger("llava_edge")


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(f"no such command: {args[0]}{did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


def did_you_mean(word: str, choices: Sequence[str] | dict[str, Any]) -> str:
    """``; did you mean X?`` if one of the choices is close to the word, else nothing."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def debug_option(command: Any) -> Any:
    """Add ``--debug`` to a command: log everything, and show a traceback when something fails."""

    def enable(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            log.setLevel(logging.DEBUG)

    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=enable,
        help="Log everything to stderr, and show tracebacks.",
    )(command)


def show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the version of the installed package and leave."""
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"llava-edge {version('llava-edge')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Show the version and exit.",
)
@debug_option
def cli() -> None:
    """LLaVA on a laptop: ask a small vision-language model about your pictures, on this machine.

    \b
    llava-edge chat --image cat.jpg -p "What animal is this?"
    """


class _LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    _prepare_streams()
    _leave(run(args))


def _leave(code: int) -> NoReturn:
    """Exit, without taking the interpreter apart first where nothing waits for that: with NumPy and llama.cpp loaded it
    takes a twentieth of a second.
    """
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread()):
        sys.exit(code)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(code)  # Python has its own way with a reader that is gone
    os._exit(code)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; errors become lines on stderr."""
    try:
        code = cli.main(args=args, prog_name="llava-edge", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    except click.UsageError as error:
        _report(*_usage_message(error))
        return EXIT_USAGE
    except click.ClickException as error:
        _report(error.format_message())
        return EXIT_FAILED
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except LlavaEdgeError as error:
        _report(str(error), error.hint)
        return EXIT_FAILED
    except Exception as error:  # a defect: one line for the person, a traceback for who asks for it
        _report(f"unexpected {type(error).__name__}: {error}", "Run it again with --debug and report what it shows.")
        return EXIT_FAILED
    return code if isinstance(code, int) else 0


def _prepare_streams() -> None:
    # A terminal that can't show a character gets a "?" instead of an exception.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.WARNING)


def _usage_message(error: click.UsageError) -> tuple[str, str]:
    help_line = f"Try '{error.ctx.command_path} --help'." if error.ctx else "Try 'llava-edge --help'."
    if isinstance(error, click.NoSuchOption):
        close = f"Did you mean {error.possibilities[0]}? " if error.possibilities else ""
        return f"no such option: {error.option_name}", close + help_line
    message = error.format_message().rstrip(".")
    return message[:1].lower() + message[1:], help_line


def _report(message: str, hint: str | None = None) -> None:
    if log.isEnabledFor(logging.DEBUG):
        import traceback

        traceback.print_exc()
    terminal.error(message, hint)
