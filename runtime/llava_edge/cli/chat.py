"""``llava-edge chat``: one question with ``-p``, otherwise a conversation."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli import debug_option, log, terminal
from llava_edge.cli.model_options import cache_options, how_it_runs, image_token_choice, which_model
from llava_edge.errors import InputError, ModelError
from llava_edge.paths import is_file
from llava_edge.types import SamplingParams

if TYPE_CHECKING:
    from llava_edge.model import Model
    from llava_edge.remote import RemoteChat, RemoteModel
    from llava_edge.session import ChatSession
    from llava_edge.types import Reply

MAX_STDIN_BYTES = 16 * 1024 * 1024


@click.command(short_help="Ask about pictures: one question, or a conversation.")
@click.option("-p", "--prompt", metavar="TEXT", help="Ask one question and exit; '-' reads it from standard input.")
@click.option(
    "--image",
    "images",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A picture to ask about; may be given several times.",
)
@which_model
@click.option("--server", metavar="URL", help="Ask a running `llava-edge serve` instead of loading a model.")
@click.option(
    "--api-key-file", metavar="FILE", type=click.Path(path_type=Path), help="With --server: its key, in the first line."
)
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option(
    "--temperature",
    metavar="N",
    type=click.FloatRange(0, 100),
    default=SamplingParams.temperature,
    show_default=True,
    help="0 is greedy: the same answer every time.",
)
@click.option(
    "--top-p",
    metavar="N",
    type=click.FloatRange(0, 1),
    default=SamplingParams.top_p,
    show_default=True,
    help="Keep the likeliest tokens that make up this share; 1 is off.",
)
@click.option(
    "--top-k",
    metavar="N",
    type=click.IntRange(0),
    default=SamplingParams.top_k,
    show_default=True,
    help="Keep so many of the likeliest; 0 is off.",
)
@click.option(
    "--min-p",
    metavar="N",
    type=click.FloatRange(0, 1),
    default=SamplingParams.min_p,
    show_default=True,
    help="Keep tokens at least this share as likely as the likeliest; 0 is off.",
)
@click.option("--seed", metavar="N", type=click.IntRange(0, 2**32 - 1), help="Makes sampled answers repeatable.")
@click.option(
    "--max-tokens", metavar="N", type=click.IntRange(1), default=256, show_default=True, help="Longest answer."
)
@how_it_runs
@image_token_choice
@cache_options
@click.option("--json", "as_json", is_flag=True, help="With -p: print one JSON object with text, usage and timings.")
@click.option("--stats", is_flag=True, help="Show times and speeds on stderr.")
@click.option("--quiet", is_flag=True, help="Show nothing but answers and errors.")
@debug_option
def chat(
    *,
    prompt: str | None,
    images: tuple[Path, ...],
    system: str | None,
    max_tokens: int,
    as_json: bool,
    stats: bool,
    quiet: bool,
    server: str | None,
    api_key_file: Path | None,
    **options: Any,
) -> int:
    """Ask a vision-language model about pictures.

    With -p the answer goes to stdout and the command ends. Without it a conversation starts; /help tells more.

    \b
    llava-edge chat --image cat.jpg -p "What animal is this?"
    llava-edge chat --image cat.jpg
    """
    if as_json and prompt is None:
        raise click.UsageError("--json needs a question with -p")
    if quiet and not log.isEnabledFor(logging.DEBUG):
        log.setLevel(logging.ERROR)
    sampling = {name: options.pop(name) for name in ("temperature", "top_p", "top_k", "min_p", "seed")}
    check_model_choice(options)
    check_server_choice(options, server, api_key_file)
    question = None if prompt is None else read_question(prompt)
    with (
        connect(server, api_key_file, options) if server else load_model(options) as model,
        model.chat(system=system) as session,
    ):
        if question is not None:
            n_ctx, shown = model.describe()["n_ctx"], {"as_json": as_json, "stats": stats, "quiet": quiet}
            ask_once(session, question, images, max_tokens, sampling, n_ctx=n_ctx, **shown)
            return 0
        from llava_edge.cli.repl import Repl, Settings

        settings = Settings(SamplingParams(**sampling), max_tokens, stats)
        return Repl(model, session, settings, system=system, quiet=quiet).run(images)


def check_model_choice(options: dict[str, Any]) -> None:
    """Refuse half a raw pair, a raw pair beside a name, and a file in place of a bundle."""
    llm, mmproj = options["llm"], options["mmproj"]
    if (llm or mmproj) and options["model"]:
        raise click.UsageError("--model and --llm/--mmproj exclude each other")
    if llm and not mmproj:
        raise click.UsageError("--llm needs --mmproj: a language model alone sees no pictures")
    if mmproj and not llm:
        raise click.UsageError("--mmproj needs --llm")
    if options["model"] and is_file(options["model"]):
        raise ModelError(
            f"{options['model']} is a file; a model is a directory with a manifest",
            hint="A GGUF file needs the one of its vision tower: --llm FILE --mmproj FILE.",
        )


def check_server_choice(options: dict[str, Any], server: str | None, api_key_file: Path | None) -> None:
    """Refuse options that a server has decided on already."""
    own = ("model", "llm", "mmproj", "n_ctx", "threads", "n_gpu_layers", "ttft_budget")
    given = [f"--{name.replace('_', '-')}" for name in own if options[name] is not None]
    defaults = {"vision_backend": "auto", "kv_type": "f16", "flash_attention": "auto", "no_cache": False}
    if options["image_tokens"] == "auto":
        given.append("--image-tokens auto")
    defaults["image_reduction"] = "pool"
    given += [f"--{name.replace('_', '-')}" for name, value in defaults.items() if options[name] != value]
    if server is not None and given:
        raise click.UsageError(f"--server excludes {given[0]}: the server has loaded its model already")
    if server is None and api_key_file is not None:
        raise click.UsageError("--api-key-file needs --server")


def connect(server: str, api_key_file: Path | None, options: dict[str, Any]) -> RemoteModel:
    """The model of a running server."""
    from llava_edge.remote import RemoteModel

    key = None
    if api_key_file is not None:
        try:
            lines = api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"can't read {api_key_file}: {getattr(error, 'strerror', None) or 'not text'}") from None
        key = next((line.strip() for line in lines if line.strip() and not line.startswith("#")), None)
        if key is None:
            raise InputError(f"{api_key_file} holds no API key")
    return RemoteModel(server, key, image_tokens=options["image_tokens"])


def load_model(options: dict[str, Any], n_seq_max: int = 1) -> Model:
    """Load what the model options name."""
    import llava_edge

    return llava_edge.load(
        options["model"] or (None if options["llm"] else "nano"),
        llm=options["llm"],
        mmproj=options["mmproj"],
        n_ctx=options["n_ctx"],
        n_threads=options["threads"],
        n_gpu_layers=options["n_gpu_layers"],
        image_tokens=options["image_tokens"],
        ttft_budget=options["ttft_budget"],
        image_reduction=options["image_reduction"],
        vision_backend=options["vision_backend"],
        n_seq_max=n_seq_max,
        kv_type=options["kv_type"],
        flash_attention={"auto": None, "on": True, "off": False}[options["flash_attention"]],
        cache=not options["no_cache"],
        verbose=log.isEnabledFor(logging.DEBUG),
    )


def read_question(prompt: str) -> str:
    """The question of ``-p``, from standard input if it is ``-``."""
    if prompt != "-":
        if not prompt.strip():
            raise click.UsageError("the question of -p is empty")
        return checked_text(prompt)
    raw = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(raw) > MAX_STDIN_BYTES:
        raise InputError(f"the question on standard input is longer than {MAX_STDIN_BYTES} bytes")
    try:
        question = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"the question on standard input is not UTF-8: byte {error.start} is wrong") from None
    if not question:
        raise InputError("the question on standard input is empty")
    return question


def checked_text(text: str) -> str:
    """The text, if it is valid Unicode; bytes that the locale can't decode arrive as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the question is not valid text: character {error.start + 1} can't be decoded") from None
    return text


def ask_once(
    session: ChatSession | RemoteChat,
    question: str,
    images: tuple[Path, ...],
    max_tokens: int,
    sampling: dict[str, Any],
    *,
    n_ctx: int | None,
    as_json: bool,
    stats: bool,
    quiet: bool,
) -> None:
    """Ask one question and write the answer, as it comes or as one JSON object at the end."""
    reply = None
    for chunk in session.stream(question, images=images, max_tokens=max_tokens, **sampling):
        reply = chunk.reply
        if chunk.text and not as_json:
            terminal.data(chunk.text)
    assert reply is not None
    terminal.data(json.dumps(reply.to_dict(), ensure_ascii=False) + "\n" if as_json else "\n")
    if stats:
        terminal.note(terminal.stats(reply))
    elif reply.finish_reason == "length" and not as_json and not quiet:
        if context_is_full(reply, max_tokens):
            terminal.note(f"note: the answer was cut: the context of {n_ctx} tokens is full; --n-ctx makes it larger")
        else:
            terminal.note(f"note: the answer was cut after {max_tokens} tokens; --max-tokens allows more")


def context_is_full(reply: Reply, max_tokens: int) -> bool:
    """Whether an answer that was cut ended before its own limit; a server that counts nothing tells of 0 tokens."""
    return 0 < reply.usage.completion_tokens < max_tokens
