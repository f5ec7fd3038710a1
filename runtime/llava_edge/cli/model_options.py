"""The options of every command that loads a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One decorator for several options, in their order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


class _ImageTokens(click.ParamType[Any]):
    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto" or isinstance(value, int):
            return value
        if not value.isascii() or not value.isdigit() or int(value) < 1:
            self.fail(f"{value!r} is neither a whole number from 1 on nor auto", param, ctx)
        return int(value)


which_model = together(
    click.option("--model", metavar="NAME|DIR", help="A model's name or a bundle's directory.  [default: nano]"),
    click.option("--llm", metavar="GGUF", type=PATH, help="A language model; needs --mmproj."),
    click.option("--mmproj", metavar="GGUF", type=PATH, help="Its vision tower and projector."),
)
threads_option = click.option(
    "--threads", metavar="N", type=click.IntRange(1, 1024), help="CPU threads.  [default: the machine's cores]"
)
vision_backend_option = click.option(
    "--vision-backend",
    metavar="NAME",
    type=click.Choice(["auto", "onnx", "coreml", "mtmd", "native"]),
    default="auto",
    show_default=True,
    help="What reads pictures: auto, onnx, coreml (a Mac), mtmd or native (libllava_edge, if it is installed).",
)
how_it_runs = together(
    click.option(
        "--n-ctx", metavar="N", type=click.IntRange(1), help="Context in tokens.  [default: the model's, at most 4096]"
    ),
    threads_option,
    click.option(
        "--n-gpu-layers",
        metavar="N",
        type=click.IntRange(-1),
        help="Layers on the GPU, -1 for all.  [default: all where llama.cpp has a GPU, else none]",
    ),
    vision_backend_option,
)
image_tokens_option = click.option(
    "--image-tokens", metavar="N", type=click.IntRange(1), help="Tokens per picture.  [default: the model's]"
)
image_reduction_option = click.option(
    "--image-reduction",
    type=click.Choice(["pool", "grid", "random", "diversity"]),
    default="pool",
    show_default=True,
    help="How a picture's tokens become fewer; models are trained for pool.",
)
image_token_choice = together(
    click.option(
        "--image-tokens",
        metavar="N|auto",
        type=_ImageTokens(),
        help="Tokens per picture; auto: as many as are read in time, all of a page of text.  [default: the model's]",
    ),
    click.option(
        "--ttft-budget",
        metavar="S",
        type=click.FloatRange(0, min_open=True),
        help="Seconds until the first token, for --image-tokens auto.  [default: 3]",
    ),
    image_reduction_option,
)
cache_options = together(
    click.option(
        "--kv-type",
        type=click.Choice(["f16", "q8_0"]),
        default="f16",
        show_default=True,
        help="What the KV cache holds; q8_0 takes half the memory and changes answers a little.",
    ),
    click.option(
        "--flash-attention",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        show_default=True,
        help="Attention in one pass; auto leaves it to llama.cpp.",
    ),
    click.option("--no-cache", is_flag=True, help="Neither read nor write the cache on disk."),
)
