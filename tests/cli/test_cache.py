"""``llava-edge cache``, and ``--no-cache``."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def alone(run, tmp_path):
    """Runs the command line with a cache of its own."""
    return lambda *args, **env: run(*args, env={"LLAVA_EDGE_HOME": str(tmp_path / "home"), **env})


def usage(alone):
    result = alone("cache", "info", "--json")
    assert result.code == 0
    return json.loads(result.out)


def test_a_second_process_finds_the_picture(alone, cat, tmp_path):
    command = ("chat", "--image", cat, "-p", "What is it?", "--max-tokens", "4", "--json")
    first, second = (json.loads(alone(*command).out) for _ in range(2))
    assert first["usage"]["cached_tokens"] == 0
    assert second["usage"]["cached_tokens"] > second["usage"]["image_tokens"]
    assert second["text"] == first["text"]
    found = usage(alone)
    assert found["directory"].startswith(str(tmp_path))
    assert found["kinds"]["embeddings"]["entries"] == found["kinds"]["prefixes"]["entries"] == 1
    shown = alone("cache", "info").out.splitlines()
    assert shown[0] == found["directory"]
    assert any(line.startswith("prefixes") for line in shown)
    cleared = json.loads(alone("cache", "clear", "--json").out)
    assert cleared == {"removed_entries": 2, "removed_bytes": found["bytes"]}
    assert usage(alone)["bytes"] == 0


def test_no_cache_writes_nothing(alone, cat):
    command = ("chat", "--image", cat, "-p", "What is it?", "--max-tokens", "2")
    assert alone(*command, "--no-cache").code == 0
    assert alone(*command, LLAVA_EDGE_CACHE_MB="0").code == 0
    assert usage(alone)["bytes"] == 0


def test_a_wrong_limit_is_one_line(alone, cat):
    result = alone("chat", "--image", cat, "-p", "What is it?", LLAVA_EDGE_CACHE_MB="lots")
    assert result.code == 1
    assert "LLAVA_EDGE_CACHE_MB is 'lots'; expected a whole number of megabytes" in result.err
