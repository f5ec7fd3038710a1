"""Killed at any write, every writer leaves the old or the new state, and completes when it is run again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import fake_hub

WRITERS = Path(__file__).resolve().parent / "support" / "kill_writers.py"


def kill_everywhere(writer: str, directory: Path, **env: str) -> int:
    """How many writes there were; the script fails on the first bad state."""
    done = subprocess.run(
        [sys.executable, str(WRITERS), writer, str(directory)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_a_pull(tiny_llm: Path, tiny_mmproj: Path, tmp_path: Path) -> None:
    with fake_hub() as hub:
        files = {"tiny-Q4_K_M.gguf": tiny_llm.read_bytes(), "mmproj-f16.gguf": tiny_mmproj.read_bytes()}
        hub.repositories = {"someone/Tiny-GGUF": files}
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        assert kill_everywhere("pull", tmp_path / "home", **settings) >= 10


def test_the_removal_of_a_model(tmp_path: Path) -> None:
    assert kill_everywhere("remove", tmp_path / "home") >= 4


def test_the_publication_of_a_converted_bundle(tmp_path: Path) -> None:
    assert kill_everywhere("publish", tmp_path / "root") >= 8


@pytest.mark.slow
def test_a_conversion(tmp_path: Path) -> None:
    assert kill_everywhere("convert", tmp_path) >= 20


@pytest.mark.slow
def test_a_quantisation(tmp_path: Path) -> None:
    assert kill_everywhere("quantize", tmp_path) >= 15


def test_a_training_checkpoint(tmp_path: Path) -> None:
    assert kill_everywhere("checkpoint", tmp_path / "root") >= 20


def test_entries_of_the_cache_on_disk(tmp_path: Path) -> None:
    assert kill_everywhere("cache", tmp_path / "root") >= 5
