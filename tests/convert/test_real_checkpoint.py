"""Parity of a real checkpoint. ``LLAVA_EDGE_TEST_CHECKPOINT`` names its directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llava_edge.convert import convert_checkpoint


@pytest.mark.slow
def test_a_real_checkpoint_passes_the_gate(tmp_path: Path) -> None:
    directory = os.environ.get("LLAVA_EDGE_TEST_CHECKPOINT")
    if not directory:
        pytest.skip("LLAVA_EDGE_TEST_CHECKPOINT is not set")
    figures = convert_checkpoint(Path(directory), tmp_path / "bundle")["parity"]
    assert figures["mmproj"]["F16"]["cosine_min"] >= 0.999
    assert figures["llm"]["F16"]["kl_mean"] < 1e-3
    assert figures["tokenizer"]["identical"] == figures["tokenizer"]["texts"]
