"""How many contexts fit beside a model."""

from __future__ import annotations

import pytest

from llava_edge import memory
from llava_edge.bundle import resolve_model
from llava_edge.engine import Engine
from llava_edge.gguf_header import read_header


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_context_takes_what_llama_cpp_keeps_for_its_tokens(kv_type: str) -> None:
    path = resolve_model("nano").file("llm")
    engine = Engine(path, n_ctx=256, n_threads=1, kv_type=kv_type)
    sizes = []
    for _ in range(2):
        engine.decode_tokens(list(range(10, 110)))
        sizes.append(engine.state_size(0))
    engine.close()
    expected = memory.context_bytes(read_header(path), 100, kv_type)
    assert expected == pytest.approx(sizes[1] - sizes[0], rel=0.01)  # each token's position is kept, too


def test_no_more_contexts_than_three_quarters_of_the_memory_hold() -> None:
    total = memory.total_bytes()
    assert total is not None
    assert memory.contexts_that_fit(0, 1000, 4) == 4
    assert memory.contexts_that_fit(0, total * 0.3, 4) == 2
    assert memory.contexts_that_fit(total // 2, total * 0.1, 4) == 2
    assert memory.contexts_that_fit(total, total, 4) == 1
