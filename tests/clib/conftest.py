"""libllava_edge, built once against the llama.cpp that llama-cpp-python brought, and called through ctypes."""

from __future__ import annotations

import ctypes
import os
from importlib import resources
from pathlib import Path

import pytest
from clib import ROOT, command, tool

from llava_edge.cli.native import llama_prefix
from llava_edge.errors import LlavaEdgeError


@pytest.fixture(scope="session")
def compiler() -> str:
    return tool("c++", "g++", "clang++")


@pytest.fixture(scope="session")
def nano() -> Path:
    return Path(str(resources.files("llava_edge"))) / "models" / "nano"


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """OpenMP's threads wait briefly, as in Python: beside other work on the machine they would hold each other up."""
    return {**os.environ, "GOMP_SPINCOUNT": "1000"}


@pytest.fixture(scope="session")
def built(tmp_path_factory, compiler) -> Path:
    """The build tree of the shared library and its examples."""
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("the sources of the C library are not here")
    try:
        prefix = llama_prefix()
    except LlavaEdgeError as error:
        pytest.skip(str(error))
    cmake = tool("cmake")
    build = tmp_path_factory.mktemp("clib") / "build"
    # Without optimisation: what computes lies in ggml, and the build takes a third of the time.
    flags = ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DLLAVA_EDGE_CONFORMANCE=ON"]
    command(
        cmake,
        "-S",
        ROOT,
        "-B",
        build,
        f"-DLLAVA_EDGE_LLAMA_PREFIX={prefix}",
        "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
        *flags,
    )
    command(cmake, "--build", build, "--parallel", "2")
    return build


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory) -> Path:
    """Where the library was installed."""
    prefix = tmp_path_factory.mktemp("clib") / "installed"
    command("cmake", "--install", built, "--prefix", prefix)
    return prefix


@pytest.fixture(scope="session")
def library_file(installed) -> Path:
    return next(path for path in installed.rglob("libllava_edge.*") if path.suffix in (".so", ".dylib"))


@pytest.fixture(scope="session")
def library(library_file):
    """The library in this process."""
    from llava_edge import native

    native.llama()
    lib = ctypes.CDLL(str(library_file))
    lib.llava_edge_last_error.restype = ctypes.c_char_p
    lib.llava_edge_status_string.restype = ctypes.c_char_p
    return lib
