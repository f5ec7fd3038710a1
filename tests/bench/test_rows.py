from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from llava_edge.engine import Engine
from llava_edge.side_by_side import exact_rows


def test_a_batch_is_measured_against_each_of_its_rows_alone(tiny_llm: Path) -> None:
    command = [sys.executable, "-m", "llava_edge.bench.rows", str(tiny_llm), "--rows", "1,3", "--depth", "20"]
    done = subprocess.run([*command, "--trials", "3"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    one, three = found["rows"]
    assert one["rows_with_other_logits"] == 0
    assert three["row_ms"] == three["batch_ms"] / 3
    engine = Engine(tiny_llm, n_ctx=64, n_seq_max=3)
    try:
        assert (three["rows_with_other_logits"] == 0) == (exact_rows(engine) == 3)
    finally:
        engine.close()


def test_a_name_that_is_no_model_is_told() -> None:
    command = [sys.executable, "-m", "llava_edge.bench.rows", "no-such-model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
