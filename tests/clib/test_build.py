"""The library is built, installed and used from outside as its documentation says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clib import ROOT, command, tool

import llava_edge

CONSUMER = """
cmake_minimum_required(VERSION 3.23)
project(consumer C)
find_package(llava_edge 0.1 REQUIRED)
add_executable(consumer main.c)
target_link_libraries(consumer PRIVATE llava_edge::llava_edge)
"""
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
EXAMPLES = ROOT / "runtime" / "examples"


def describe(program: Path, environment: dict[str, str], *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, args)], capture_output=True, text=True, check=False, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def consumer(installed, tmp_path_factory) -> Path:
    """A project outside the tree, through find_package."""
    source = tmp_path_factory.mktemp("consumer")
    (source / "CMakeLists.txt").write_text(CONSUMER)
    (source / "main.c").write_text((EXAMPLES / "describe.c").read_text())
    command("cmake", "-S", source, "-B", source / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    command("cmake", "--build", source / "build")
    return source / "build" / "consumer"


@pytest.mark.parametrize("picture", ["cat.jpg", "astronaut.jpg"])
def test_the_example_answers_as_the_chat_does(consumer, environment, library_file, nano, picture, monkeypatch):
    monkeypatch.setenv("LLAVA_EDGE_LIBRARY", str(library_file))
    question = "Describe this picture."
    with llava_edge.load(nano, vision_backend="native") as model, model.chat() as chat:
        expected = chat.ask(question, [ROOT / "examples" / picture], temperature=0)
    found = describe(consumer, environment, nano, ROOT / "examples" / picture, question)
    assert (found.returncode, found.stdout, found.stderr) == (0, expected.text + "\n", "")


def test_one_frame_after_another(built, environment, nano):
    frames = [ROOT / "examples" / f"{name}.jpg" for name in ("cat", "cat", "missing", "rocket")]
    found = describe(built / "stream", environment, nano, "What is this?", *frames)
    lines = found.stdout.splitlines()
    assert found.returncode == 1
    assert "missing.jpg" in found.stderr
    assert lines[0] == lines[1]
    assert len(lines) == 3
    # The second frame is the first again: all but the last run of its prompt is known.
    known = [tuple(map(int, m)) for m in re.findall(r"(\d+) of (\d+) tokens were known", found.stderr)]
    assert known[1][0] > known[2][0] > known[0][0] == 0


def test_a_c99_compiler_takes_the_header_and_pkg_config_knows_it(installed, tmp_path):
    folder = next(installed.rglob("llava_edge.pc")).parent
    environment = {**os.environ, "PKG_CONFIG_PATH": str(folder)}
    flags = command(tool("pkg-config"), "--cflags", "--libs", "llava_edge", env=environment).stdout.split()
    for example in ("describe", "stream"):
        command(tool("cc", "gcc"), *STRICT, EXAMPLES / f"{example}.c", *flags, "-o", tmp_path / example)
    version = command(tool("pkg-config"), "--modversion", "llava_edge", env=environment).stdout.strip()
    assert version == re.search(r'VERSION_STRING "(.*)"', (ROOT / "runtime/include/llava_edge.h").read_text())[1]


def test_a_cpp_compiler_takes_the_header(compiler, tmp_path):
    source = tmp_path / "main.cpp"
    source.write_text('#include "llava_edge.h"\nint main() { return llava_edge_version_number() > 0 ? 0 : 1; }\n')
    command(compiler, "-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only",
            f"-I{ROOT}/runtime/include", source)  # fmt: skip


def test_the_example_is_short():
    assert len((EXAMPLES / "describe.c").read_text().splitlines()) < 80


@pytest.mark.skipif(sys.platform != "linux", reason="reads symbols with nm -D")
def test_nothing_but_the_headers_functions_is_visible(library_file):
    symbols = command(tool("nm"), "-D", "--defined-only", library_file).stdout
    visible = {line.split()[-1] for line in symbols.splitlines() if line.split()[-2] in "TBD"}
    header = (ROOT / "runtime/include/llava_edge.h").read_text()
    assert visible == set(re.findall(r"LLAVA_EDGE_API [^;]*?\*?(llava_edge_\w+)\(", header))


def test_the_header_names_nothing_of_llama_cpp():
    code = re.sub(r"/\*.*?\*/", "", (ROOT / "runtime/include/llava_edge.h").read_text(), flags=re.DOTALL)
    assert not re.search(r"\b(llama|ggml|gguf|mtmd)_", code)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_python_and_the_library_share_one_copy_of_llama_cpp(library_file, nano):
    code = (
        "import llava_edge, os, re\n"
        f"model = llava_edge.load({str(nano)!r}, vision_backend='native', n_ctx=512)\n"
        f"model.encode(model.open_picture({str(ROOT / 'examples' / 'cat.jpg')!r}))\n"
        "files = {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}\n"
        "ours = [os.path.basename(f) for f in files if 'libggml' in f or 'libllama' in f]\n"
        "names = sorted(re.sub(r'\\.so.*', '', name) for name in ours)\n"
        "print(model.vision_backend, *names)\n"
    )
    environment = {**os.environ, "LLAVA_EDGE_LIBRARY": str(library_file)}
    found = command(sys.executable, "-c", code, env=environment).stdout.split()
    assert found == ["native", "libggml", "libggml-base", "libggml-cpu", "libllama"]


def test_the_readers_of_pictures_are_compared(library_file):
    environment = {**os.environ, "LLAVA_EDGE_LIBRARY": str(library_file)}
    arguments = ["--shape", "nano", "--first", "mtmd:Q8_0", "--second", "native:Q8_0", "--pairs", "2"]
    found = json.loads(command(sys.executable, "-m", "llava_edge.bench.towers", *arguments, env=environment).stdout)
    assert found["ratio"]["least"] <= found["ratio"]["median"] <= found["ratio"]["most"]
    assert min(found[name]["seconds"] for name in ("mtmd:Q8_0", "native:Q8_0")) > 0
    assert 0.999 < found["cosine"]["mean"] < 1


def test_an_unknown_reader_is_named():
    arguments = [sys.executable, "-m", "llava_edge.bench.towers", "--shape", "nano", "--first", "onnx:F16"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no such reader: onnx:F16; expected mtmd|native:F16|Q8_0\n"
