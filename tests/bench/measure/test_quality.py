from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_edge
from llava_edge.bench.models import Subject, open_subject
from llava_edge.bench.quality import scores
from llava_edge.bench.quality.cases import make_cases
from llava_edge.bench.quality.data import read_data
from llava_edge.bench.quality.measure import QualitySettings, bench_quality
from llava_edge.bench.quality.store import LogitStore, compact, versions
from llava_edge.bench.record import Result
from llava_edge.bench.report.compare import compare
from llava_edge.bundle import open_bundle
from llava_edge.engine import Engine
from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.vision import native as native_library

QUICK = QualitySettings(threads=1, answer_tokens=12, own_answer_tokens=6)


def run(subjects: list[Path], reference: Path, captions: Path, cache: Path) -> Result:
    data = read_data(captions, None)
    return bench_quality([open_subject(s) for s in subjects], open_subject(reference), data, QUICK, cache)


@pytest.fixture(scope="module")
def measured(
    f16_bundle: Path, make_variant: Callable[[str], Path], captions: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, Path]:
    cache = tmp_path_factory.mktemp("cache")
    return run([f16_bundle, make_variant("Q8_0"), make_variant("Q4_0")], f16_bundle, captions, cache), cache


def test_a_bundle_does_not_diverge_from_itself(measured: tuple[Result, Path]) -> None:
    metrics = measured[0].rows[0].metrics
    assert metrics["kl_mean"].value == metrics["kl_p99"].value == 0
    assert metrics["top1_agreement"].value == metrics["perplexity_ratio"].value == metrics["same_text"].value == 1


def test_the_record_names_the_references_files(measured: tuple[Result, Path]) -> None:
    result = measured[0]
    files = {file.role: file.sha256 for file in result.rows[0].files}
    assert result.settings["reference_sha256"] == files
    other = replace(result, settings={**result.settings, "reference_sha256": {**files, "llm": "0" * 64}})
    assert any("reference_sha256" in difference for difference in compare(result, other).differences)


def test_fewer_bits_diverge_more(measured: tuple[Result, Path]) -> None:
    _, q8, q4 = [row.metrics["kl_mean"].value for row in measured[0].rows]
    assert 0 < q8 < q4
    for row in measured[0].rows[1:]:
        for name in ("kl_mean", "kl_median", "kl_p99", "top1_agreement", "perplexity", "perplexity_ratio", "cider_d"):
            metric = row.metrics[name]
            assert metric.interval is not None
            assert metric.interval[0] <= metric.value <= metric.interval[1]


def test_pictures_are_encoded_once_for_bundles_with_the_same_tower(measured: tuple[Result, Path]) -> None:
    towers = list((measured[1] / "embeddings").iterdir())
    assert sorted(len(list(tower.iterdir())) for tower in towers) == [3, 3]  # F16 and float32


def test_the_reference_is_not_computed_again(
    measured: tuple[Result, Path], f16_bundle: Path, make_variant: Callable[[str], Path], captions: Path
) -> None:
    result, cache = measured
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.logits")}
    assert len(before) == 3
    again = run([make_variant("Q4_0")], f16_bundle, captions, cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.logits")} == before
    assert again.rows[0].metrics == result.rows[2].metrics


def test_the_divergence_is_that_of_the_raw_logits(engine: Engine) -> None:
    random = np.random.default_rng(5)
    first = (random.standard_normal((40, 500)) * 4).astype(np.float32)
    second = first + (random.standard_normal((40, 500)) * 0.1).astype(np.float32)
    tokens = [int(token) for token in random.integers(0, 500, 40)]
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True) for x in (first, second))
    found = scores.compare(compact(first), compact(second), tokens)
    np.testing.assert_allclose(found[:, scores.KL], (p * np.log(p / q)).sum(1), atol=2e-5)
    # float16 has steps of 1/64 from 16 on, so that the surprise at an unlikely token is off by half of that at most
    np.testing.assert_allclose(found[:, scores.NLL], -np.log(q[np.arange(40), tokens]), atol=1 / 128)
    assert (found[:, scores.AGREES] == (first.argmax(1) == second.argmax(1))).all()


def test_logits_come_back_from_disk_or_are_missing(tmp_path: Path) -> None:
    store = LogitStore(tmp_path)
    rows = compact(np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32))
    store.save(3, rows)
    loaded = store.load(3, (5, 300))
    assert loaded is not None
    assert loaded.tobytes() == rows.tobytes()
    assert store.load(3, (5, 301)) is None
    assert store.load(4, (5, 300)) is None
    (tmp_path / "00003.logits").write_bytes((tmp_path / "00003.logits").read_bytes()[:-9])
    assert store.load(3, (5, 300)) is None


def test_damaged_logits_are_said(f16_bundle: Path, captions: Path, tmp_path: Path) -> None:
    run([f16_bundle], f16_bundle, captions, tmp_path)
    next(tmp_path.rglob("*.logits")).write_bytes(b"nonsense")
    with pytest.raises(LlavaEdgeError, match=r"logits in .* are damaged"):
        run([f16_bundle], f16_bundle, captions, tmp_path)


def test_the_scored_tokens_are_the_answer_and_its_end(tiny_model: llava_edge.Model, captions: Path) -> None:
    cases = make_cases(tiny_model, read_data(captions, None), answer_tokens=99, chunks=None)
    assert len(cases) == 3
    text = b"".join(tiny_model.engine.piece(token) for token in cases[0].answer[:-1]).decode()
    assert text == "A cat is sleeping on the table."
    assert cases[0].answer[-1] in tiny_model.stop_tokens


def test_conversations_are_scored_turn_by_turn(tiny_model: llava_edge.Model, pictures: list[Path]) -> None:
    turns = ["<image>\nWhat is it?", "A cat.", "What colour?", "It is red."]
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    file = pictures[0].parent / "llava.json"
    file.write_text(json.dumps([{"id": "a", "image": pictures[0].name, "conversations": said}]))
    data = read_data(file, None)
    assert data.samples[0].turns == (("What is it?", "A cat."), ("What colour?", "It is red."))
    first, second = make_cases(tiny_model, data, answer_tokens=99, chunks=None)
    assert second.units[: len(first.units)] == first.units
    assert (first.asks, second.asks) == (True, False)
    assert b"".join(map(tiny_model.engine.piece, second.answer)) == b"It is red."


def test_short_answers_are_right_or_wrong(f16_bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    file = pictures[0].parent / "short.json"
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Yes."}]
    file.write_text(json.dumps([{"id": p.name, "image": p.name, "conversations": said} for p in pictures]))
    metrics = run([f16_bundle], f16_bundle, file, tmp_path).rows[0].metrics
    assert 0 <= metrics["accuracy"].value <= 1
    assert "cider_d" not in metrics
    found = scores.accuracy(["yes", "No!", "a cat"], [["Yes."], ["Yes."], ["dog", "A cat"]], ["1", "2", "3"])
    assert found.value == 2 / 3


def test_questions_about_one_picture_are_one_observation(
    f16_bundle: Path, tiny_model: llava_edge.Model, pictures: list[Path], tmp_path: Path
) -> None:
    file = pictures[0].parent / "shared.json"
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Yes."}]
    shown = [picture.name for picture in pictures[:2] for _ in range(8)]
    file.write_text(json.dumps([{"id": n, "image": name, "conversations": said} for n, name in enumerate(shown)]))
    cases = make_cases(tiny_model, read_data(file, None), answer_tokens=9, chunks=None)
    assert [case.sample for case in cases] == list(range(16))
    assert len({case.group for case in cases}) == 2
    found = run([f16_bundle], f16_bundle, file, tmp_path).rows[0].metrics["same_text"]
    assert found.value == 1
    # two of two, not sixteen of sixteen, and not certain: Wilson's
    assert found.interval == pytest.approx((0.3424, 1), abs=1e-3)


def test_the_library_that_reads_pictures_is_part_of_a_cache_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_library, "version", lambda: "libllava_edge 2")
    assert "libllava_edge 2" in versions(["native"])
    assert "libllava_edge 2" not in versions(["mtmd"])
    assert len(versions(["mtmd"])) == 5


def test_what_cannot_be_compared_is_refused_before_the_first_is_measured(
    f16_bundle: Path, make_variant: Callable[[str], Path], captions: Path, tmp_path: Path
) -> None:
    reference, good = open_subject(f16_bundle), open_subject(make_variant("Q8_0"))
    broken = replace(reference, label="broken", vision_backend="onnx")
    with pytest.raises(LlavaEdgeError, match="no file for the vision backend onnx"):
        bench_quality([good, broken], reference, read_data(captions, None), QUICK, tmp_path)
    assert len(list((tmp_path / "embeddings").iterdir())) == 1  # the reference's


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    store = LogitStore(tmp_path / "logits")
    (tmp_path / "logits").rmdir()
    with pytest.raises(InputError, match=r"can't write .*00003\.logits: No such file"):
        store.save(3, compact(np.zeros((2, 4), np.float32)))


def test_texts_are_scored_in_halves_of_512_tokens(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The dog runs in the snow. " * 200)
    subject, settings = open_subject(tiny_bundle), replace(QUICK, text_chunks=2)
    with llava_edge.load(tiny_bundle, n_threads=1) as model:
        cases = make_cases(model, read_data(file, None), answer_tokens=1, chunks=2)
        tokens = model.engine.tokenize(file.read_text(), special=False)
    assert [(*c.units[0].ids, *c.answer) for c in cases] == [tuple(tokens[:512]), tuple(tokens[512:1024])]  # type: ignore[union-attr]
    assert [len(case.answer) for case in cases] == [255, 255]
    metrics = bench_quality([subject], subject, read_data(file, None), settings, tmp_path / "cache").rows[0].metrics
    assert metrics["kl_mean"].value == 0
    assert "same_text" not in metrics


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"family": "synthetic"}, "has random weights"),
        ({"family": "other"}, r"its family is another one \(other, not llava\)"),
        ({"prompt": None}, "its prompt format is another one"),
        ({"image": None}, r"its picture size is another one \(64, not 32\)"),
    ],
)
def test_bundles_that_are_no_variants_are_refused(
    f16_bundle: Path, captions: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    manifest = open_bundle(f16_bundle).manifest
    if "prompt" in change:
        change = {"prompt": replace(manifest.prompt, user_suffix="\n")}
    if "image" in change:
        change = {"image": replace(manifest.image, size=64)}
    reference = open_subject(f16_bundle)
    bundle = replace(reference.bundle, manifest=replace(manifest, **change))
    other = Subject(bundle, "other", reference.image_tokens)
    with pytest.raises(InputError, match=says):
        bench_quality([other], reference, read_data(captions, None), QUICK, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": 3}, r"its number of layers is another one \(3, not 2\)"),
        ({"width": 128}, r"its width is another one \(128, not 64\)"),
    ],
)
def test_a_language_model_of_another_size_is_no_variant(
    f16_bundle: Path,
    make_bundle: Callable[..., Path],
    make_llm: Callable[..., Path],
    make_mmproj: Callable[..., Path],
    captions: Path,
    tmp_path: Path,
    change: dict[str, int],
    says: str,
) -> None:
    other = open_subject(make_bundle(make_llm(**change), make_mmproj(width=change.get("width", 64))))
    with pytest.raises(InputError, match=says):
        bench_quality([other], open_subject(f16_bundle), read_data(captions, None), QUICK, tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "Expecting"),
        ('{"train": {}}', "no split 'dev'"),
        ('{"dev": {"picture0.png": "A cat"}}', "not a list of texts"),
        ('{"dev": {"gone.png": ["A cat"]}}', r"the picture of sample gone\.png is missing: .*gone\.png"),
        ("[]", "has no samples"),
        ('[{"id": "x"}]', "entry 0 has no list 'conversations'"),
        ('[{"id": "x", "conversations": [{"from": "gpt", "value": "A"}]}]', "turn 0 is not a text from 'human'"),
        ('[{"id": "x", "conversations": [{"from": "human", "value": "A"}]}]', "empty question or answer"),
    ],
)
def test_wrong_data_is_named(pictures: list[Path], content: str, says: str) -> None:
    file = pictures[0].parent / "wrong.json"
    file.write_text(content)
    with pytest.raises(InputError, match=says):
        read_data(file, None)
    with pytest.raises(InputError, match="no such file"):
        read_data(file.with_name("missing.json"), None)
