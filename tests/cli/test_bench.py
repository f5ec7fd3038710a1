"""``llava-edge bench`` as a person runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

QUICK = ("--pp", "16", "--tg", "4", "--depth", "0", "--repetitions", "2", "--cold-starts", "0", "--threads", "1")


def test_speed_prints_a_table_and_keeps_the_record(run, tiny_bundle, tmp_path):
    result = run("bench", "speed", tiny_bundle, *QUICK, "-o", "speed.json")
    assert result.code == 0, result.err
    assert result.out.startswith("| model")
    assert "tiny F32/F32: encode" in result.err
    assert json.loads((tmp_path / "speed.json").read_text())["kind"] == "speed"
    same = run("bench", "compare", "speed.json", "speed.json")
    assert (same.code, same.err) == (0, "")
    assert all("differs" not in line for line in same.out.splitlines())
    (tmp_path / "other.json").write_text("{}")
    wrong = run("bench", "compare", "speed.json", "other.json")
    assert (wrong.code, wrong.out) == (1, "")
    assert "other.json is not a result of llava-edge bench: missing key schema" in wrong.err


def test_quiet_and_json_leave_nothing_but_the_record(run, tiny_bundle):
    result = run("bench", "speed", tiny_bundle, *QUICK, "--quiet", "--json")
    assert json.loads(result.out)["rows"][0]["metrics"]["pp16"]["unit"] == "tokens/s"
    assert not [line for line in result.err.splitlines() if not line.startswith("warning: ")]


def test_bad_input_is_one_line_before_anything_is_measured(run, tiny_bundle):
    for args, words in (
        (("speed", "nanoo"), "no model 'nanoo'"),
        (("speed", tiny_bundle, "--image-tokens", "5"), "image_tokens is 5"),
        (("speed", tiny_bundle, "-o", "missing/x.json"), "can't write missing"),
    ):
        result = run("bench", *args, *QUICK)
        assert result.code == 1
        assert words in result.err.splitlines()[0]
        assert result.out == ""
    assert run("bench", "speed", tiny_bundle, "--depth", "0,x").code == 2


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder here that says it can be written and can't")
def test_figures_are_shown_where_the_record_cannot_be_written(run, tiny_bundle):
    result = run("bench", "speed", tiny_bundle, *QUICK, "-o", "/proc/speed.json")
    assert result.code == 1
    assert "error: can't write /proc/speed.json" in result.err
    assert "Traceback" not in result.err
    if os.access("/proc", os.W_OK):
        assert result.out.startswith("| model")


def test_quality_says_what_is_missing(run, tiny_bundle):
    result = run("bench", "quality", tiny_bundle, "--reference", tiny_bundle)
    assert result.code == 2
    assert "--data" in result.err
    result = run("bench", "quality", tiny_bundle, "--reference", tiny_bundle, "--data", "gone.json")
    assert (result.code, result.err.splitlines()[0]) == (1, "error: no such file: gone.json")
