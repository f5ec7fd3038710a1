"""Beside llama.cpp's own program; what it says was recorded from the real one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_edge.bench.models import open_subject
from llava_edge.bench.record import Result, read_result
from llava_edge.bench.report import ttft as table
from llava_edge.bench.speed import peer
from llava_edge.bench.speed.ttft import TtftSettings, bench_ttft, default_counts
from llava_edge.cache import LIMIT_VARIABLE
from llava_edge.errors import InputError, LlavaEdgeError

# llama-mtmd-cli of llama.cpp 0c1e57098 with nano and one thread
SAID = """
0.01.507.689 I encoding mtmd batch, n_chunks = 1 (done = 1, total = 3)
0.02.230.689 I mtmd batch encoding done in 723 ms
0.02.240.180 I decoding image batch 1/1, n_tokens_batch = 256
0.05.983.166 I image decoded (batch 1/1) in 3743 ms
0.06.294.560 I llama_perf_context_print:        load time =     723.47 ms
0.06.294.599 I llama_perf_context_print: prompt eval time =    4713.19 ms /   266 tokens (   17.72 ms per token)
0.06.294.616 I llama_perf_context_print:        eval time =      88.06 ms /     2 runs   (   44.03 ms per token)
0.06.294.617 I llama_perf_context_print:       total time =    5022.64 ms /   268 tokens
"""


def test_the_peers_times_are_read() -> None:
    found = peer.parse(SAID, 7.0)
    assert found.encode_seconds == 0.723
    assert found.ttft_seconds == pytest.approx(4.71319 + 0.04403)
    assert found.read_tokens == 266


def test_times_that_lack_the_encoding_or_the_picture_get_them() -> None:
    without_encoding = SAID.replace("4713.19", "3990.00")
    assert peer.parse(without_encoding, 7.0).ttft_seconds == pytest.approx(3.99 + 0.723 + 0.04403)
    text_only = SAID.replace("4713.19", "247.00")
    assert peer.parse(text_only, 7.0).ttft_seconds == pytest.approx(0.247 + 3.743 + 0.723 + 0.04403)
    older = SAID.replace("mtmd batch encoding done", "image slice encoded")
    assert peer.parse(older, 7.0).encode_seconds == 0.723


def test_a_peer_without_times_is_an_error() -> None:
    with pytest.raises(LlavaEdgeError, match="says nothing of its times: error: unknown model"):
        peer.parse("error: unknown model", 1.0)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Says what llama-mtmd-cli has said."""
    path = tmp_path / "llama-mtmd-cli"
    path.write_text(f"#!{sys.executable}\nprint({SAID!r})\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def settings(pictures: list[Path]) -> Callable[..., TtftSettings]:
    def make(**changes: Any) -> TtftSettings:
        fields: dict[str, Any] = {"pairs": 1, "threads": 1, "counts": (16, 4), "questions": ("What", "Why"),
                                  "answer_tokens": 4, "processes": True}  # fmt: skip
        return TtftSettings(picture=pictures[0], **{**fields, **changes})

    return make


@pytest.fixture(autouse=True)
def cache_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMIT_VARIABLE)


def run(bundle: Path, program: Path, settings: TtftSettings, output: Path | None = None) -> Result:
    return bench_ttft(open_subject(bundle), program, None, settings, lambda _line: None, output)


@pytest.mark.slow
def test_a_record_is_gone_on_with(
    tiny_bundle: Path, program: Path, settings: Callable[..., TtftSettings], tmp_path: Path
) -> None:
    output = tmp_path / "ttft.json"
    first = run(tiny_bundle, program, settings(), output)
    metrics = first.rows[0].metrics
    named = {"load", "load_again", "encode", "ttft_16", "ttft_4", "second_question", "new_process", "decode"}
    assert named | {"process_cold", "process_warm", "peer_encode", "peer_ttft", "peer_process"} <= set(metrics)
    assert metrics["ratio_ttft_4"].value == pytest.approx(metrics["ttft_4"].value / metrics["peer_ttft"].value)
    assert metrics["ratio_new_process"].value == pytest.approx(metrics["new_process"].value / metrics["ttft_16"].value)
    assert read_result(output).rows[0].metrics == metrics
    second = run(tiny_bundle, program, settings(pairs=2), output)
    assert {len(metric.samples) for metric in second.rows[0].metrics.values()} == {2}
    assert second.rows[0].metrics["load"].samples[0] == metrics["load"].samples[0]
    with pytest.raises(InputError, match="of another model or other settings"):
        run(tiny_bundle, program, settings(answer_tokens=5), output)
    shown = table.markdown(second)
    assert "| TTFT cold, 16 tokens | " in shown
    assert "| whole process, picture in the cache | " in shown
    assert any("the peer reads 250 tokens of text" in warning for warning in json.loads(output.read_text())["warnings"])


def test_counts_are_the_grids(tiny_bundle: Path) -> None:
    assert default_counts(open_subject(tiny_bundle)) == (16, 4, 1)


def test_what_can_not_be_measured_is_said(
    tiny_bundle: Path, program: Path, settings: Callable[..., TtftSettings], tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(InputError, match="is not a program"):
        run(tiny_bundle, tmp_path / "nothing", settings())
    with pytest.raises(InputError, match="no such picture"):
        settings(pairs=1).__class__(tmp_path / "none.png", 1, 1, (16,), ("a", "b"))
    with pytest.raises(InputError, match="pairs is 0"):
        settings(pairs=0)
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    with pytest.raises(InputError, match="the cache is what is measured"):
        run(tiny_bundle, program, settings())
