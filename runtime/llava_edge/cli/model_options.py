"""The options of every command that loads a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llava_edge.cli.chat import vision_backend_option

PATH = click.Path(path_type=Path)


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One decorator for several options, in their order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


which_model = together(
    click.option("--model", metavar="NAME|DIR", help="A model's name or a bundle's directory.  [default: nano]"),
    click.option("--llm", metavar="GGUF", type=PATH, help="A language model; needs --mmproj."),
    click.option("--mmproj", metavar="GGUF", type=PATH, help="Its vision tower and projector."),
)
threads_option = click.option(
    "--threads", metavar="N", type=click.IntRange(1, 1024), help="CPU threads.  [default: the machine's cores]"
)
image_tokens_option = click.option(
    "--image-tokens", metavar="N", type=click.IntRange(1), help="Tokens per picture.  [default: the model's]"
)
how_it_runs = together(
    click.option(
        "--n-ctx", metavar="N", type=click.IntRange(1), help="Context in tokens.  [default: the model's, at most 4096]"
    ),
    threads_option,
    click.option("--n-gpu-layers", metavar="N", type=click.IntRange(-1), help="Layers on the GPU, -1 for all."),
    image_tokens_option,
    vision_backend_option,
)
