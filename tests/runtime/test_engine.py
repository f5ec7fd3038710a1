from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.engine import Engine, EngineError
from llava_edge.errors import LlavaEdgeError, ModelError
from llava_edge.native import Worker, default_threads

TOKENS = [5, 40, 77, 120, 33, 60, 61, 62, 90, 14, 200, 201]


def logits_of(engine: Engine, *runs: Any) -> np.ndarray[Any, Any]:
    """Evaluate runs of tokens or embeddings from the start, and give the last logits."""
    engine.truncate(0)
    for run in runs:
        if isinstance(run, np.ndarray):
            engine.decode_embeddings(run, logits=True)
        else:
            engine.decode_tokens(run)
    return engine.logits()


def embeddings(count: int, width: int = 64) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).standard_normal((count, width)).astype(np.float32)


def test_the_same_split_gives_the_same_bits(engine: Engine) -> None:
    first = logits_of(engine, TOKENS[:5], embeddings(9), TOKENS[5:])
    second = logits_of(engine, TOKENS[:5], embeddings(9), TOKENS[5:])
    assert first.tobytes() == second.tobytes()
    assert first.shape == (engine.n_vocab,)


def test_another_split_gives_nearly_the_same(engine: Engine) -> None:
    whole = logits_of(engine, TOKENS)
    single = logits_of(engine, *([token] for token in TOKENS))
    np.testing.assert_allclose(single, whole, atol=2e-2 * np.abs(whole).max())


def test_a_kept_prefix_gives_the_bits_of_a_fresh_start(engine: Engine) -> None:
    fresh = logits_of(engine, TOKENS[:5], embeddings(9), TOKENS[5:])
    logits_of(engine, TOKENS[:5], embeddings(9), [7, 8, 9], [10], [11])
    engine.truncate(14)
    assert engine.n_past == 14
    engine.decode_tokens(TOKENS[5:])
    assert engine.logits().tobytes() == fresh.tobytes()


def test_prefill_without_logits_changes_nothing_but_that(engine: Engine) -> None:
    expected = logits_of(engine, TOKENS[:5], TOKENS[5:])
    engine.truncate(0)
    engine.decode_tokens(TOKENS[:5], logits=False)
    with pytest.raises(EngineError, match="no logits"):
        engine.logits()
    engine.decode_tokens(TOKENS[5:])
    assert engine.logits().tobytes() == expected.tobytes()


def test_long_runs_are_cut_at_the_same_places(engine: Engine) -> None:
    long = [20 + i % 200 for i in range(150)]
    assert engine.n_batch == 64
    cut = logits_of(engine, long[:64], long[64:128], long[128:])
    assert logits_of(engine, long).tobytes() == cut.tobytes()
    rows = embeddings(100)
    cut = logits_of(engine, rows[:64], rows[64:])
    assert logits_of(engine, rows).tobytes() == cut.tobytes()


def test_pictures_may_see_all_of_themselves(engine: Engine) -> None:
    def evaluate(causal: bool) -> Any:
        engine.truncate(0)
        engine.decode_embeddings(embeddings(9), causal=causal)
        engine.decode_tokens(TOKENS)
        return engine.logits()

    assert not np.allclose(evaluate(True), evaluate(False), atol=1e-3)
    assert evaluate(True).tobytes() == logits_of(engine, embeddings(9), TOKENS).tobytes()
    with pytest.raises(EngineError, match="n_batch = 65"):
        engine.decode_embeddings(embeddings(65), causal=False)


def test_a_failed_call_leaves_the_cache_as_it_was(engine: Engine) -> None:
    fresh = logits_of(engine, TOKENS[:5], TOKENS[5:])
    engine.truncate(0)
    engine.decode_tokens(TOKENS[:5])
    for wrong in ([], [-1], [engine.n_vocab], [1] * engine.n_ctx):
        with pytest.raises(EngineError):
            engine.decode_tokens(wrong)
    with pytest.raises(EngineError, match=r"\[tokens, 64\]"):
        engine.decode_embeddings(embeddings(3, width=60))
    assert engine.n_past == 5
    engine.decode_tokens(TOKENS[5:])
    assert engine.logits().tobytes() == fresh.tobytes()


def test_tokens_and_texts(engine: Engine) -> None:
    assert engine.tokenize("<|im_start|>", special=True) == [1]
    assert 1 not in engine.tokenize("<|im_start|>", special=False)
    assert engine.tokenize("", special=True) == []
    text = "What colour is Größe 🙂\n" * 30
    assert b"".join(engine.piece(token) for token in engine.tokenize(text, special=False)).decode() == text
    assert engine.piece(1) == b""
    assert engine.token_text(1) == "<|im_start|>"
    assert engine.is_end(2)
    assert engine.is_control(1)
    assert not engine.is_control(50)
    assert engine.chat_template is not None
    assert engine.bos == ""
    assert engine.eos == "<|im_end|>"


def test_the_context_has_the_asked_length(tiny_llm: Path) -> None:
    for asked, expected in ((None, 2048), (256, 256)):
        engine = Engine(tiny_llm, n_ctx=asked, n_threads=1)
        assert engine.n_ctx == expected
        engine.close()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a GGUF file"),
        (b"just a text, no model", "not a GGUF file"),
        (b"GGUF" + b"\xff" * 200, "version is 4294967295"),
        (b"GGUF\x03\0\0\0" + b"\0" * 16, "general.architecture is ''"),
    ],
)
def test_files_that_are_no_models_are_refused_in_words(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=says):
        Engine(path, n_threads=1)


def test_a_cut_file_is_refused(tmp_path: Path, tiny_llm: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_llm.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"tensor blk.1.ffn_down.weight ends at byte \d+; the file has"):
        Engine(path, n_threads=1)


def test_a_vision_tower_is_no_language_model(tiny_mmproj: Path) -> None:
    with pytest.raises(ModelError, match="'clip'; this file is to be a language model"):
        Engine(tiny_mmproj, n_threads=1)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such model file: .*missing\.gguf"):
        Engine(tmp_path / "missing.gguf")
    with pytest.raises(ModelError, match="is not a file"):
        Engine(tmp_path)


def test_a_closed_engine_says_so(tiny_llm: Path) -> None:
    engine = Engine(tiny_llm, n_threads=1, n_ctx=64)
    engine.close()
    engine.close()
    for call in (
        lambda: engine.decode_tokens([5]),
        lambda: engine.tokenize("a", special=False),
        lambda: engine.piece(5),
        lambda: engine.is_end(5),
        lambda: engine.chat_template,
        lambda: engine.truncate(0),
        lambda: engine.logits(),
        lambda: engine.decode_embeddings(embeddings(2)),
    ):
        with pytest.raises(LlavaEdgeError, match="closed"):
            call()


def test_llama_cpp_is_quiet(tiny_llm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = Engine(tiny_llm, n_threads=1, n_ctx=64)
    engine.decode_tokens(TOKENS)
    engine.close()
    assert capfd.readouterr() == ("", "")


def interrupt_soon(seconds: float, times: int = 1) -> threading.Thread:
    def strike() -> None:
        for _ in range(times):
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=strike)
    thread.start()
    return thread


def test_control_c_stops_a_prefill_and_leaves_the_cache_usable(make_llm: Callable[..., Path]) -> None:
    engine = Engine(make_llm(context=65536), n_ctx=60_000, n_threads=1)
    fresh = logits_of(engine, TOKENS[:5], TOKENS[5:])
    engine.truncate(0)
    engine.decode_tokens(TOKENS[:5])
    interrupt_soon(0.05)
    with pytest.raises(KeyboardInterrupt):
        engine.decode_tokens([50] * 59_000)
    assert engine.n_past == 5
    engine.decode_tokens(TOKENS[5:])
    assert engine.logits().tobytes() == fresh.tobytes()
    engine.close()


def test_a_call_is_not_left_while_it_runs() -> None:
    """The memory of a batch has to live until the call is over, however often Ctrl-C is struck."""
    worker = Worker()
    over: list[bool] = []

    def call() -> None:
        striker = interrupt_soon(0.05, times=3)
        while not worker.aborting or striker.is_alive():
            time.sleep(0.001)
        over.append(True)

    with pytest.raises(KeyboardInterrupt):
        worker.run(call)
    assert over == [True]
    assert not worker.aborting
    assert worker.run(lambda: 7) == 7
    worker.close()


def test_a_call_that_is_over_holds_nothing() -> None:
    """A vision tower that is closed must not wait in memory for the next call."""

    class Tower:
        def encode(self) -> int:
            return 7

    worker, tower = Worker(), Tower()
    alive = weakref.ref(tower)
    assert worker.run(tower.encode) == 7
    del tower
    assert alive() is None
    worker.close()


def test_errors_of_a_call_reach_the_caller() -> None:
    worker = Worker()
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 / 0)
    worker.close()


def test_a_call_after_the_end_is_refused_and_one_before_it_is_made() -> None:
    worker = Worker()
    going_on, results = threading.Event(), []
    asker = threading.Thread(target=lambda: results.append(worker.run(going_on.wait)), daemon=True)
    asker.start()
    late = threading.Thread(target=lambda: refused(worker, results), daemon=True)
    while worker._current is None:
        time.sleep(0.001)
    worker.close()
    late.start()
    late.join(30)
    going_on.set()
    asker.join(30)
    assert results == ["the model is closed", True]


def refused(worker: Worker, results: list[Any]) -> None:
    try:
        worker.run(lambda: 7)
    except ModelError as error:
        results.append(str(error))


def test_threads_are_within_the_machine() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
