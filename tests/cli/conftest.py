"""Runs the command line as a person does: in a process of its own, with an own home."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@dataclass(frozen=True)
class Result:
    """What a process left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the processes: own caches, no colours, no settings of the person who runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAVA_EDGE_")}
    home = str(tmp_path_factory.mktemp("home"))
    own = {"LLAVA_EDGE_HOME": home, "HOME": home, "TERM": "dumb", "PYTHONUTF8": "1"}
    return {**kept, **own}


@pytest.fixture(scope="session")
def command() -> list[str]:
    """How a process of the command line is started."""
    return [sys.executable, "-m", "llava_edge"]


@pytest.fixture
def run(command: list[str], environment: dict[str, str], tmp_path: Path) -> Run:
    """Run ``llava-edge`` with arguments and return its exit code, stdout and stderr."""

    def run(*args: object, stdin: str | bytes = b"", env: dict[str, str] | None = None) -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [*command, *(arg if isinstance(arg, bytes) else str(arg) for arg in args)],
            input=data,
            capture_output=True,
            cwd=tmp_path,
            env={**environment, **(env or {})},
            timeout=120,
            check=False,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture(scope="session")
def nano() -> Path:
    """The directory of the embedded model."""
    directory = Path(str(resources.files("llava_edge"))) / "models" / "nano"
    if not directory.is_dir():
        pytest.skip("this installation has no embedded model")
    return directory


@pytest.fixture(scope="session")
def cat() -> Path:
    """A photo of a cat."""
    return EXAMPLES / "cat.jpg"
