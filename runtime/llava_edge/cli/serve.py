"""``llava-edge serve``: the OpenAI protocol and a page, on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli import debug_option, log, terminal
from llava_edge.cli.chat import check_model_choice, load_model
from llava_edge.cli.model_options import cache_options, how_it_runs, image_token_choice, which_model
from llava_edge.errors import require_extra

if TYPE_CHECKING:
    from llava_edge.server.guard import Access
    from llava_edge.server.scheduler import Scheduler

_MEBIBYTE = 1024 * 1024
_PARALLEL = 4


@click.command(short_help="Answer programs (OpenAI's protocol) and people (a web page).")
@which_model
@click.option(
    "--host", metavar="ADDRESS", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in."
)
@click.option("--port", metavar="N", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 is any.")
@click.option(
    "--parallel",
    metavar="N",
    type=click.IntRange(1, 64),
    help=f"Answers at a time; each has a context of its own in memory.  [default: {_PARALLEL}, or as many as fit]",
)
@click.option(
    "--queue",
    metavar="N",
    type=click.IntRange(0, 10000),
    default=32,
    show_default=True,
    help="Requests that may wait; more are sent away with status 429.",
)
@click.option(
    "--timeout",
    metavar="S",
    type=click.FloatRange(0, min_open=True),
    default=300,
    show_default=True,
    help="Seconds that a request may take, waiting included.",
)
@click.option(
    "--grace",
    metavar="S",
    type=click.FloatRange(0),
    default=10,
    show_default=True,
    help="Seconds that running answers get when the server is stopped.",
)
@click.option("--api-key-file", metavar="FILE", type=click.Path(path_type=Path), help="Keys that are let in, by line.")
@click.option("--cors-origin", "cors", metavar="URL", multiple=True, help="Pages of this site may use the server.")
@click.option("--allow-image-urls", is_flag=True, help="Fetch pictures by http(s) from public addresses.")
@click.option(
    "--max-body",
    metavar="MB",
    type=click.IntRange(1, 1024),
    default=32,
    show_default=True,
    help="Largest request, pictures included.",
)
@click.option(
    "--store",
    metavar="MB",
    type=click.IntRange(0),
    default=256,
    show_default=True,
    help="Memory for conversations that wait for their next question.",
)
@click.option(
    "--batching",
    type=click.Choice(["exact", "full"]),
    default="exact",
    show_default=True,
    help="exact: every answer is what it would be alone. full: quicker under load.",
)
@how_it_runs
@image_token_choice
@cache_options
@click.option("--quiet", is_flag=True, help="Show nothing but warnings and errors.")
@debug_option
def serve(
    *,
    host: str,
    port: int,
    parallel: int | None,
    queue: int,
    timeout: float,
    grace: float,
    api_key_file: Path | None,
    cors: tuple[str, ...],
    allow_image_urls: bool,
    max_body: int,
    store: int,
    batching: str,
    quiet: bool,
    **options: Any,
) -> None:
    """Serve OpenAI's chat completions and a web page until Ctrl-C.

    \b
    llava-edge serve
    curl http://127.0.0.1:8080/v1/models
    """
    require_extra("serve", "starlette", "uvicorn", "prometheus_client")
    check_model_choice(options)
    from llava_edge.server.run import listen, run
    from llava_edge.server.service import Options, Service

    if not quiet and not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("llava_edge.server").setLevel(logging.INFO)
    access, key = _access(host, api_key_file, cors)
    parallel = parallel or _parallel(options)
    limits = Options(
        parallel=parallel,
        queue=queue,
        timeout_seconds=timeout,
        grace_seconds=grace,
        max_body_bytes=max_body * _MEBIBYTE,
        store_bytes=store * _MEBIBYTE,
        exact=batching == "exact",
        access=access,
    )
    listener = listen(host, port)
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{listener.getsockname()[1]}/{f'#key={key}' if key else ''}"
    failure: list[BaseException] = []

    def ready(scheduler: Scheduler) -> None:
        if not quiet:
            n_ctx = scheduler.model.engine.n_ctx
            together = "" if scheduler.rows == 1 else f" ({scheduler.rows} in a batch)"
            terminal.note(
                f"ready: {scheduler.model.name}, {parallel} answers at a time{together}, context {n_ctx}, {url}"
            )

    service = Service(
        lambda: load_model(options, n_seq_max=parallel),
        limits,
        fetch=_fetch() if allow_image_urls else None,
        on_ready=ready,
        on_failure=failure.append,
    )
    run(service, listener, failure)
    if failure:
        raise failure[0]


def _parallel(options: dict[str, Any]) -> int:
    """How many contexts the memory holds, at most the usual number."""
    from llava_edge import memory
    from llava_edge.engine import DEFAULT_CTX
    from llava_edge.gguf_header import read_header
    from llava_edge.parts import llm_file

    path = llm_file(options["model"], options["llm"])
    needed = memory.context_bytes(read_header(path), options["n_ctx"] or DEFAULT_CTX, options["kv_type"])
    if needed is None:
        return _PARALLEL
    fitting = memory.contexts_that_fit(path.stat().st_size, needed, _PARALLEL)
    if fitting < _PARALLEL:
        log.warning(
            "a context takes %.1f GiB of memory; answers at a time: %d (--n-ctx and --kv-type q8_0 make it smaller)",
            needed / memory.GIB, fitting,
        )  # fmt: skip
    return fitting


def _access(host: str, api_key_file: Path | None, cors: tuple[str, ...]) -> tuple[Access, str | None]:
    """Who may ask, and the key that was made if one had to be."""
    from llava_edge.server.guard import Access, is_loopback, new_key, origins, read_keys

    loopback = is_loopback(host)
    keys = read_keys(api_key_file) if api_key_file else ()
    made = None
    if not loopback:
        log.warning("other machines can reach %s, and nothing is encrypted: use it in a network that you trust", host)
        if not keys:
            made = new_key()
            keys = (made,)
            log.warning("a key is needed there; this one was made for this run: %s (or name an --api-key-file)", made)
    return Access(keys, loopback, origins(cors)), made


def _fetch() -> Any:
    from llava_edge.server.fetch import fetch

    return fetch
