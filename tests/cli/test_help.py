"""Help, version, wrong usage: what works without a model."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest

from llava_edge.cli import COMMANDS, main

HEAVY = ("numpy", "PIL", "llama_cpp", "rich", "jinja2", "torch", "transformers", "onnxruntime", "huggingface_hub")


def assert_usage_error(result, *words):
    lines = result.err.splitlines()
    assert result.code == 2, result
    assert result.out == ""
    assert len(lines) == 2, result.err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    for word in words:
        assert word in result.err


def test_help_lists_every_command(run):
    result = run("--help")
    assert result.code == 0
    assert result.err == ""
    for name, (_, line) in COMMANDS.items():
        assert re.search(rf"{name} +{re.escape(line)}", result.out)


def test_no_arguments_show_the_help(run):
    result = run()
    assert result.code == 2
    assert result.err.startswith("Usage: llava-edge")


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(args):
    code = (
        "import sys, llava_edge.cli as c\n"
        f"code = c.run({args!r})\n"
        f"print('loaded', [m for m in {HEAVY!r} if m in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_command_says_of_itself(run, name):
    assert run(name, "--help").out.startswith(f"Usage: llava-edge {name} ")


def test_version_is_that_of_the_installed_package(run):
    assert run("--version").out == f"llava-edge {version('llava-edge')}\n"


def test_the_installed_script_is_this_command_line():
    (script,) = entry_points(group="console_scripts", name="llava-edge")
    assert script.load() is main


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["chat", "--temprature", "1"], ["--temprature", "Did you mean --temperature?"]),
        (["chat", "--imgae", "x.jpg"], ["Did you mean --image?"]),
        (["chat", "--zzz"], ["no such option: --zzz"]),
        (["chta"], ["no such command: chta", "did you mean chat?"]),
        (["--vresion"], ["Did you mean --version?"]),
        (["chat", "surplus"], ["surplus"]),
        (["chat", "--top-p", "7"], ["--top-p", "7.0", "0<=x<=1"]),
        (["chat", "--max-tokens", "many"], ["--max-tokens", "many"]),
        (["chat", "--max-tokens", "0"], ["--max-tokens"]),
        (["chat", "--seed", "-1"], ["--seed"]),
        (["chat", "-p"], ["-p"]),
        (["chat", "-p", "  "], ["question", "empty"]),
        (["chat", "--json"], ["--json", "-p"]),
        (["chat", "--llm", "x.gguf"], ["--llm", "--mmproj"]),
        (["chat", "--mmproj", "x.gguf"], ["--mmproj", "--llm"]),
        (["chat", "--model", "nano", "--llm", "x", "--mmproj", "y"], ["--model", "--llm"]),
        (["convert"], ["CHECKPOINT"]),
        (["convert", "somewhere"], ["--output"]),
    ],
)
def test_wrong_usage_is_one_line_with_a_hint_and_exit_code_two(run, args, words):
    assert_usage_error(run(*args), *words)


def test_the_hint_names_the_help_of_the_command(run):
    assert "llava-edge chat --help" in run("chat", "--zzz").err


def test_a_defect_is_one_line_unless_debugging(run):
    broken = "import llava_edge.cli as c; c.COMMANDS['chat'] = ('llava_edge.cli.chat:gone', ''); c.main({!r})"

    def stderr(args):
        return subprocess.run([sys.executable, "-c", broken.format(args)], capture_output=True, text=True).stderr

    assert stderr(["chat"]).splitlines()[0].startswith("error: unexpected AttributeError")
    assert "Traceback" not in stderr(["chat"])
    assert "Traceback" in stderr(["--debug", "chat"])
