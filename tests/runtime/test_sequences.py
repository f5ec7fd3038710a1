"""Several sequences in one cache: none may feel the others."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.engine import Engine, EngineError
from llava_edge.kv_cache import KvCache
from llava_edge.prompt import TokenRun

PROMPTS = [[5, 40, 77, 120, 33], [60, 61, 62, 90, 14, 200, 201], [9, 8, 7]]
ANSWERS = [[11, 12, 13], [21, 22, 23], [31, 32, 33]]


@pytest.fixture(scope="module")
def shared(tiny_llm: Path) -> Iterator[Engine]:
    loaded = Engine(tiny_llm, n_ctx=256, n_threads=1, n_batch=64, n_seq_max=3)
    yield loaded
    loaded.close()


@pytest.fixture(autouse=True)
def empty(shared: Engine) -> None:
    for seq in range(3):
        shared.truncate(0, seq)


def alone(engine: Engine, number: int) -> list[bytes]:
    """Logits of a prompt and its answer, with nothing else in the cache."""
    engine.truncate(0)
    engine.decode_tokens(PROMPTS[number])
    seen = [engine.logits().tobytes()]
    for token in ANSWERS[number]:
        engine.decode_tokens([token])
        seen.append(engine.logits().tobytes())
    return seen


def test_every_sequence_has_the_whole_context(shared: Engine) -> None:
    assert shared.n_ctx == 256
    for seq in range(3):
        shared.decode_tokens([50] * 256, seq=seq)
        assert shared.position(seq) == 256


def test_a_prompt_beside_others_gives_the_bits_that_it_gives_alone(shared: Engine, engine: Engine) -> None:
    for seq in (0, 1, 2):
        shared.decode_tokens(PROMPTS[seq], seq=seq)
        assert shared.logits().tobytes() == alone(engine, seq)[0]


def test_tokens_of_several_sequences_are_evaluated_together(shared: Engine, engine: Engine) -> None:
    for seq in (0, 1, 2):
        shared.decode_tokens(PROMPTS[seq], seq=seq)
    for step in range(3):
        rows = shared.decode_each({seq: ANSWERS[seq][step] for seq in (2, 0, 1)})
        for row, seq in zip(rows, (2, 0, 1), strict=True):
            expected = np.frombuffer(alone(engine, seq)[step + 1], np.float32)
            np.testing.assert_allclose(row, expected, atol=1e-3 * np.abs(expected).max())
    assert [shared.position(seq) for seq in range(3)] == [8, 10, 6]


def test_a_wrong_token_leaves_all_sequences_as_they_were(shared: Engine) -> None:
    for seq in (0, 1):
        shared.decode_tokens(PROMPTS[seq], seq=seq)
    with pytest.raises(EngineError, match="expected numbers"):
        shared.decode_each({0: 5, 1: shared.n_vocab})
    assert (shared.position(0), shared.position(1)) == (5, 7)
    shared.decode_each({0: 5, 1: 6})


def test_truncating_one_sequence_leaves_the_others(shared: Engine, engine: Engine) -> None:
    for seq in (0, 1):
        shared.decode_tokens(PROMPTS[seq], seq=seq)
    shared.truncate(0, 0)
    shared.decode_tokens([ANSWERS[1][0]], seq=1)
    assert shared.logits().tobytes() == alone(engine, 1)[1]


def test_a_saved_state_goes_on_in_another_sequence_bit_for_bit(shared: Engine, engine: Engine) -> None:
    first = KvCache(shared, 0)
    first.prefill([TokenRun(tuple(PROMPTS[0])), TokenRun(tuple(PROMPTS[1]))], {})
    saved = first.save()
    first.clear()
    second = KvCache(shared, 2)
    second.prefill([TokenRun((1, 2, 3))], {})
    second.restore(saved)
    assert second.units == saved.units
    assert second.tokens == 12
    prefill = second.prefill([TokenRun(tuple(PROMPTS[0])), TokenRun(tuple(PROMPTS[2]))], {})
    assert prefill.cached == 5
    engine.truncate(0)
    engine.decode_tokens(PROMPTS[0])
    engine.decode_tokens(PROMPTS[2])
    assert shared.logits().tobytes() == engine.logits().tobytes()


def test_a_state_of_another_model_is_refused(shared: Engine) -> None:
    cache = KvCache(shared, 1)
    cache.prefill([TokenRun((1, 2, 3))], {})
    with pytest.raises(EngineError, match="does not belong"):
        shared.restore_state(1, (ctypes.c_uint8 * 100)(), 3)
    assert shared.position(1) == 0


def test_an_empty_cache_can_be_saved_too(shared: Engine) -> None:
    saved = KvCache(shared, 1).save()
    cache = KvCache(shared, 2)
    cache.prefill([TokenRun((1, 2, 3))], {})
    cache.restore(saved)
    assert (cache.tokens, shared.position(2)) == (0, 0)


def test_a_prefill_pauses_between_units_and_batches_and_can_be_given_up(shared: Engine) -> None:
    cache = KvCache(shared, 1)
    steps = cache.prefill_steps([TokenRun(tuple(range(5, 69))), TokenRun(tuple(range(5, 135)))], {})
    assert [next(steps) or shared.position(1) for _ in range(3)] == [64, 128, 192]
    steps.close()
    assert shared.position(1) == 64
    assert cache.tokens == 64


def test_another_thread_can_stop_an_evaluation(make_llm: Callable[..., Path]) -> None:
    engine = Engine(make_llm(context=65536), n_ctx=30_000, n_threads=1, n_seq_max=2)

    def stop() -> None:
        while engine.position(0) == 0 and not stopped.is_set():
            time.sleep(0.01)
            engine.stopping = True

    stopped = threading.Event()
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(EngineError, match="stopped"):
        engine.decode_tokens([50] * 29_000)
    stopped.set()
    thread.join()
    assert engine.position(0) == 0
    engine.stopping = False
    engine.decode_tokens([50])
    engine.close()


def test_a_context_without_sequences_is_refused(tiny_bundle: Path) -> None:
    import llava_edge

    wrong: dict[str, Any] = {"n_seq_max": 0}
    with pytest.raises(llava_edge.InputError, match="n_seq_max is 0"):
        llava_edge.load(tiny_bundle, **wrong)
