from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava_edge.bench.http_client import Answer, quantiles
from llava_edge.bench.load import make_scripts, messages_of, parted_at_tie


def test_texts_that_part_at_a_tie_are_told_from_wrong_ones() -> None:
    serial = Answer(200, "It is a cat.", pieces=[("It", 2.0), (" is", 0.04), (" a", 3.0), (" cat", 0.06), (".", 4.0)])
    assert parted_at_tie("It was a dog.", serial)
    assert not parted_at_tie("It is a dog.", serial)
    assert not parted_at_tie("This is a cat.", serial)


def test_quantiles_are_of_the_values() -> None:
    assert quantiles([]) is None
    assert quantiles([float(value) for value in range(1, 101)]) == {"p50": 51.0, "p95": 96.0, "p99": 100.0}


def test_a_conversation_carries_its_picture_and_answers(pictures: list[Path]) -> None:
    script = make_scripts(pictures, 1)[0]
    assert script == make_scripts(pictures, 1)[0]
    first, *rest = messages_of(script, ["An answer."])
    assert first["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    if len(script.questions) > 1:
        assert [message["role"] for message in rest] == ["assistant", "user"]


@pytest.mark.slow
def test_a_short_run_against_a_server_of_its_own(tiny_bundle: Path, pictures: list[Path]) -> None:
    command = [sys.executable, "-m", "llava_edge.bench.load", "--clients", "1,3", "--seconds", "2", "--cancels", "2"]
    command += [*map(str, pictures), "--model", str(tiny_bundle), "--threads", "1", "--parallel", "2", "--leave", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [run["clients"] for run in result["runs"]] == [1, 3]
    for run in result["runs"]:
        assert set(run["statuses"]) == {"200"}
        assert run["texts"]["compared"] == run["texts"]["same"] == run["answers"] > 0
        assert run["health_seconds"]["p50"] > 0
    for kind in ("decode", "prefill", "picture"):
        assert result["cancels"][f"{kind}_seconds_until_free"]["p50"] > 0
