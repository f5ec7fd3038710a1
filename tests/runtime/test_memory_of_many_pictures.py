from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
import numpy as np
import llava_edge
from llava_edge.bench.speed.cold import peak_memory_bytes

random = np.random.default_rng(0)
with llava_edge.load(sys.argv[1], n_threads=1, n_ctx=512, image_tokens=16) as model:
    for number in range(1, 1001):
        picture = random.integers(0, 256, (48, 64, 3), np.uint8)
        model.chat().ask("What is it?", [picture], max_tokens=4)
        if number in (100, 1000):
            print(peak_memory_bytes())
"""


@pytest.mark.slow
def test_a_thousand_pictures_take_no_more_memory_than_a_hundred(
    tiny_bundle: Path,
) -> None:
    command = [sys.executable, "-c", CODE, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    hundred, thousand = map(int, done.stdout.split())
    assert thousand < 1.02 * hundred
