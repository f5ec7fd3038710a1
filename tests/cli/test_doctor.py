"""The doctor finds what is wrong, says what to do, and tells nothing private."""

from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def home(tmp_path: Path, tiny_bundle: Path) -> Path:
    """A home in which a tiny bundle lies as if it had been pulled."""
    place = tmp_path / "home" / "models" / "tiny"
    place.mkdir(parents=True)
    for path in tiny_bundle.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return tmp_path / "home"


def test_a_good_installation(run: Any, home: Path) -> None:
    done = run("doctor", "--json", env={"LLAVA_EDGE_HOME": str(home)})
    report = json.loads(done.out)
    found = {finding["topic"]: finding for finding in report["findings"]}
    assert found["model tiny"]["level"] == "good"
    assert "checksums right" in found["model tiny"]["text"]
    assert found["self-check tiny"]["facts"]["cosine"] > 0.99
    assert found["cpu"]["facts"]["threads"] >= 1
    assert found["packages"]["level"] == "good"


def test_nothing_private_is_in_the_report(run: Any, home: Path, tmp_path: Path) -> None:
    (home / "models" / "tiny" / "tiny.gguf").write_bytes(b"GGUF")
    done = run("doctor", "--json", "--quick", env={"LLAVA_EDGE_HOME": str(home), "HF_TOKEN": "hf_secret"})
    assert done.code == 1
    for secret in (str(tmp_path), str(home), str(Path.home()) + "/", platform.node(), "hf_secret"):
        assert secret not in done.out, secret
    user = getpass.getuser()
    assert user == "root" or user not in done.out


def test_a_damaged_model_is_found_with_advice(run: Any, home: Path) -> None:
    path = home / "models" / "tiny" / "mmproj.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    done = run("doctor", env={"LLAVA_EDGE_HOME": str(home)})
    assert done.code == 1
    assert "BAD  model tiny: tiny: mmproj.gguf is damaged" in done.out
    assert "->" in done.out
    assert "Traceback" not in done.err


def test_unfinished_downloads_are_told(run: Any, home: Path) -> None:
    (home / "models" / ".partial").mkdir()
    (home / "models" / ".partial" / "abc.partial").write_bytes(bytes(2_000_000))
    done = run("doctor", "--quick", env={"LLAVA_EDGE_HOME": str(home)})
    assert "unfinished downloads: 1 files, 2.0 MB" in done.out
