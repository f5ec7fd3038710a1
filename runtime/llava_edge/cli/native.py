"""``llava-edge native``: what a build of libllava_edge has to know."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from llava_edge.cli import debug_option, terminal
from llava_edge.errors import InputError


@click.command()
@click.option("--cmake-prefix", is_flag=True, help="Print the folder in which CMake finds llama.cpp.")
@debug_option
def native(*, cmake_prefix: bool) -> None:
    """Say where libllava_edge finds what it is built against.

    \b
    cmake -B build -DLLAVA_EDGE_LLAMA_PREFIX="$(llava-edge native --cmake-prefix)"
    """
    if not cmake_prefix:
        raise click.UsageError("nothing is asked for; give --cmake-prefix")
    terminal.data(f"{llama_prefix()}\n")


def llama_prefix() -> Path:
    """The folder that holds llama.cpp's headers, libraries and CMake packages; nothing is loaded to find it."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise InputError("llama-cpp-python is not installed", hint="Run: pip install llama-cpp-python")
    prefix = Path(spec.origin).parents[1]
    if not (prefix / "lib" / "cmake" / "llama" / "llama-config.cmake").is_file():
        raise InputError(
            f"llama-cpp-python in {prefix} brought no CMake package of llama.cpp",
            hint="Build it from source (pip install --no-binary llama-cpp-python), or name a source tree of llama.cpp.",
        )
    return prefix
