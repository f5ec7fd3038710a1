"""Runs: stopped and resumed, split and joined, compared, and what malformed data does to them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llava_edge import store
from llava_edge.bench.models import open_subject
from llava_edge.bench.tasks.compare import compare
from llava_edge.bench.tasks.models import ModelChoice
from llava_edge.bench.tasks.run import merge, open_run, writing
from llava_edge.bench.tasks.samples import read_records, write_records
from llava_edge.bundle import MANIFEST_NAME, open_bundle
from llava_edge.errors import ContextFullError, ImageError, InputError, ModelError


def summary(folder: Path) -> str:
    return (folder / "summary.json").read_text()


def test_every_sample_is_a_line_with_what_can_be_traced(evaluate_tiny, pope_data):
    outcome = evaluate_tiny("pope", pope_data)
    records = open_run(outcome.folder).records
    assert len(records) == outcome.summary["asked"] == outcome.summary["samples"] == 18
    assert [r.index for r in records] == list(range(18))
    assert len({r.prompt_sha256 for r in records}) == 12  # "Is there a dog?" comes three times a picture
    assert all(r.seconds > 0 and r.score in (0, 1) for r in records)


def test_questions_on_one_picture_follow_each_other(evaluate_tiny, pope_data):
    outcome = evaluate_tiny("pope", pope_data)
    images = [record.image for record in open_run(outcome.folder).records]
    assert images == [f"p{n}.png" for n in range(3) for _ in range(6)]


def test_a_picture_is_read_once_for_all_its_questions(tiny_model, pope_data):
    from llava_edge.bench.tasks.asking import Asker

    asker = Asker(tiny_model)
    tiny_model.forget()
    image = pope_data / "images" / "p0.png"
    decoded = []
    engine = tiny_model.engine
    evaluate_embeddings = engine.decode_embeddings
    engine.decode_embeddings = lambda *args, **options: (decoded.append(1), evaluate_embeddings(*args, **options))
    try:
        shared = [asker.say([f"Is there a {noun}?"], image, max_tokens=4) for noun in ("dog", "cat", "car")]
        assert len(decoded) == 1
        alone = Asker(tiny_model, share=False)
        separate = [alone.say([f"Is there a {noun}?"], image, max_tokens=4) for noun in ("dog", "cat", "car")]
        assert len(decoded) == 4
    finally:
        del engine.decode_embeddings
    assert shared == separate


def test_a_torn_line_is_asked_again_and_the_summary_is_the_same(evaluate_tiny, pope_data, tmp_path):
    whole = evaluate_tiny("pope", pope_data).folder
    torn = tmp_path / "torn"
    shutil.copytree(whole, torn)
    (torn / "summary.json").unlink()
    samples = torn / "samples.jsonl"
    samples.write_bytes(samples.read_bytes()[:-40])
    evaluate_tiny("pope", pope_data, "torn", resume=True)
    assert summary(torn) == summary(whole)
    assert [r.answer for r in open_run(torn).records] == [r.answer for r in open_run(whole).records]


def test_killed_in_the_middle_and_resumed(evaluate_tiny, tiny_bundle, files, tmp_path):
    data = tmp_path / "many"
    rows = []
    for n in range(120):
        files.picture(data / "images" / f"{n}.png", n)
        rows.append({"image": f"{n}.png", "question": "What is it?", "choices": ["A cat", "The dog"], "answer": n % 2})
    files.jsonl(data / "choices.jsonl", rows)
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "llava_edge", "eval", "choices", "--by", "text", "--data", data]
    command += ["--model", tiny_bundle, "--threads", "1", "--n-ctx", "1024", "-o", folder, "--quiet"]
    process = subprocess.Popen([str(part) for part in command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    samples = folder / "samples.jsonl"
    while process.poll() is None and not (samples.exists() and samples.read_bytes().count(b"\n") >= 5):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = samples.read_bytes()
    assert 5 <= before.count(b"\n") < 120
    assert not (folder / "summary.json").exists()
    options = {"options": {"by": "text"}, "max_tokens": None}
    evaluate_tiny("choices", data, "killed", resume=True, **options)
    whole = evaluate_tiny("choices", data, "whole", **options).folder
    assert summary(folder) == summary(whole)
    assert samples.read_bytes().startswith(before[: before.rfind(b"\n") + 1])


def test_a_run_is_not_overwritten_by_accident(evaluate_tiny, pope_data):
    evaluate_tiny("pope", pope_data, limit=2)
    with pytest.raises(InputError, match="has a run already") as error:
        evaluate_tiny("pope", pope_data, limit=2)
    assert "--resume" in error.value.hint
    assert evaluate_tiny("pope", pope_data, limit=4, overwrite=True).summary["asked"] == 4


def test_answers_of_an_unknown_run_stay(evaluate_tiny, pope_data):
    folder = evaluate_tiny("pope", pope_data, limit=2).folder
    (folder / "run.json").unlink()
    before = (folder / "samples.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"has summary\.json, samples\.jsonl, and no run\.json"):
        evaluate_tiny("pope", pope_data, limit=2)
    assert (folder / "samples.jsonl").read_bytes() == before
    assert evaluate_tiny("pope", pope_data, limit=2, overwrite=True).summary["asked"] == 2


def test_what_is_wrong_with_every_question_is_not_passed_as_a_bad_one(evaluate_tiny, pope_data, tiny_bundle):
    choice = ModelChoice(
        model=str(tiny_bundle), threads=1, n_ctx=1024, prompt_format="mistral_instruct", system="Be brief."
    )
    with pytest.raises(InputError, match="no place for a system message") as error:
        evaluate_tiny("pope", pope_data, skip_bad=True, choice=choice)
    assert "--skip-bad" not in (error.value.hint or "")


def test_other_settings_don_t_go_on_with_a_run(evaluate_tiny, pope_data):
    evaluate_tiny("pope", pope_data, limit=2)
    with pytest.raises(InputError, match="its limit is 2, this one's 3"):
        evaluate_tiny("pope", pope_data, limit=3, resume=True)
    questions = pope_data / "coco_pope_random.json"
    questions.write_text(questions.read_text().replace("a dog", "a hog"))
    with pytest.raises(InputError, match="its data_sha256"):
        evaluate_tiny("pope", pope_data, limit=2, resume=True)


def test_a_run_tells_what_read_its_pictures_and_goes_on_with_nothing_else(evaluate_tiny, pope_data):
    outcome = evaluate_tiny("pope", pope_data, limit=6)
    assert outcome.summary["vision_backend"] == "mtmd"
    assert outcome.summary["model"]["vision_backend"] == "auto"
    settings = outcome.folder / "run.json"
    settings.write_text(settings.read_text().replace('"vision_backend": "mtmd"', '"vision_backend": "onnx"'))
    samples = outcome.folder / "samples.jsonl"
    samples.write_bytes(b"".join(samples.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(InputError, match="were read by onnx so far, and would now be by mtmd"):
        evaluate_tiny("pope", pope_data, limit=6, resume=True)


def test_a_backend_without_a_file_is_refused_before_anything_is_asked(evaluate_tiny, pope_data, tiny_bundle):
    choice = ModelChoice(model=str(tiny_bundle), vision_backend="onnx")
    with pytest.raises(ModelError, match="has no file for the vision backend onnx"):
        evaluate_tiny("pope", pope_data, choice=choice)


def test_a_pulled_pair_of_files_is_asked_too(evaluate_tiny, pope_data, tiny_bundle, tmp_path):
    pulled = tmp_path / "pulled"
    shutil.copytree(tiny_bundle, pulled)
    (pulled / MANIFEST_NAME).unlink()
    files = open_bundle(tiny_bundle).manifest.files
    (pulled / store.PAIR_NAME).write_text(store.Pair("pulled", "a/b", "c", "none", files).to_json())
    choice = ModelChoice(model=str(pulled), threads=1, n_ctx=1024)
    outcome = evaluate_tiny("pope", pope_data, choice=choice, limit=2)
    assert outcome.summary["model"]["files"] == {file.path: file.sha256 for file in files}
    assert outcome.summary["vision_backend"] == "mtmd"
    with pytest.raises(InputError, match="need a bundle"):
        evaluate_tiny("pope", pope_data, "crop", choice=replace(choice, image_mode="crop"))
    with pytest.raises(InputError, match="is a pair of GGUF files without a manifest; bench measures bundles"):
        open_subject(pulled)


def test_parts_joined_are_the_run_in_one_piece(evaluate_tiny, pope_data, tmp_path):
    whole = evaluate_tiny("pope", pope_data).folder
    parts = [evaluate_tiny("pope", pope_data, f"part{k}", part=(k, 2)).folder for k in (1, 2)]
    assert sorted(len(open_run(part).records) for part in parts) == [6, 12]
    merge(parts[::-1], tmp_path / "joined")
    assert summary(tmp_path / "joined") == summary(whole)
    with pytest.raises(InputError, match="expected each of 1/2 to 2/2 once"):
        merge(parts[:1], tmp_path / "half")
    write_records(parts[0] / "samples.jsonl", open_run(parts[0]).records[:-1])
    with pytest.raises(InputError, match="17 of 18 samples"):
        merge(parts, tmp_path / "unfinished")


def test_a_malformed_line_is_named_and_skipped_only_if_asked(evaluate_tiny, pope_data):
    questions = pope_data / "coco_pope_popular.json"
    lines = questions.read_text().splitlines()
    lines[1] = lines[1].replace('"no"', '"maybe"')
    lines[3] = lines[3][:-5]
    questions.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"coco_pope_popular\.json:2: label is 'maybe'") as error:
        evaluate_tiny("pope", pope_data)
    assert "--skip-bad" in error.value.hint
    outcome = evaluate_tiny("pope", pope_data, skip_bad=True)
    assert outcome.summary["skipped"] == 2
    assert outcome.summary["asked"] == 16
    assert "coco_pope_popular.json:4: not JSON" in outcome.skipped[1]


def test_a_picture_that_is_not_there_is_named_with_its_line(evaluate_tiny, pope_data):
    (pope_data / "images" / "p1.png").unlink()
    with pytest.raises(InputError, match=r"coco_pope_random\.json:3: no picture p1\.png in"):
        evaluate_tiny("pope", pope_data)
    assert evaluate_tiny("pope", pope_data, skip_bad=True).summary["skipped"] == 6


def test_a_damaged_picture_ends_the_run_or_is_counted(evaluate_tiny, pope_data):
    (pope_data / "images" / "p1.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"sample random-2: .*p1\.png is not a picture") as error:
        evaluate_tiny("pope", pope_data)
    assert "--resume --skip-bad" in error.value.hint
    outcome = evaluate_tiny("pope", pope_data, resume=True, skip_bad=True)
    assert (outcome.summary["asked"], outcome.summary["unreadable"], outcome.summary["samples"]) == (12, 6, 18)
    run = open_run(outcome.folder)
    assert compare(run, run)["samples"] == 12


def test_a_picture_s_name_can_t_leave_the_folder(evaluate_tiny, pope_data, files):
    files.jsonl(
        pope_data / "coco_pope_random.json",
        [{"question_id": 1, "image": "../secret.png", "text": "Is there a cat?", "label": "no"}],
    )
    with pytest.raises(InputError, match="inside the folder of pictures"):
        evaluate_tiny("pope", pope_data)


def test_half_characters_and_other_bytes_are_malformed_lines(evaluate_tiny, pope_data):
    path = pope_data / "coco_pope_random.json"
    with path.open("ab") as file:
        file.write(b'{"question_id": 91, "image": "0.png", "text": "\\ud800?", "label": "no"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"coco_pope_random\.json:\d+: holds half a character"):
        evaluate_tiny("pope", pope_data)
    outcome = evaluate_tiny("pope", pope_data, skip_bad=True)
    assert outcome.summary["skipped"] == 2
    assert "is not UTF-8" in outcome.skipped[1]


def test_a_question_that_does_not_fit_is_named_and_can_be_passed(evaluate_tiny, files, pope_data):
    long = {"question_id": 90, "image": "0.png", "text": "Is there a cat? " * 2000, "label": "no"}
    path = pope_data / "coco_pope_random.json"
    lines = [*map(json.loads, path.read_text().splitlines()), {**long, "image": None}]
    lines[-1]["image"] = lines[0]["image"]
    files.jsonl(path, lines)
    with pytest.raises(ContextFullError, match="sample random-90: ") as error:
        evaluate_tiny("pope", pope_data)
    assert "--n-ctx" in error.value.hint
    assert "--skip-bad" in error.value.hint
    outcome = evaluate_tiny("pope", pope_data, resume=True, skip_bad=True)
    assert outcome.summary["unreadable"] == 1


def test_a_part_without_a_sample_is_joined_too(evaluate_tiny, pope_data, tmp_path):
    parts = [evaluate_tiny("pope", pope_data, name, limit=1, part=part).folder for name, part in
             (("one", (1, 2)), ("two", (2, 2)))]  # fmt: skip
    summary = merge(parts, tmp_path / "joined")
    assert summary["asked"] == 1
    assert summary["vision_backend"]


def test_two_programs_do_not_write_one_run(evaluate_tiny, pope_data):
    folder = evaluate_tiny("pope", pope_data).folder
    with writing(folder), pytest.raises(InputError, match="another program is writing"):
        evaluate_tiny("pope", pope_data, resume=True)
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join([*lines, lines[-1]]))
    with pytest.raises(InputError, match="twice or out of order"):
        open_run(folder)


def test_a_damaged_run_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"index": 0}\n')
    with pytest.raises(InputError, match=r"samples\.jsonl:1: not a record"):
        read_records(path)
    with pytest.raises(InputError, match="is not a run"):
        open_run(tmp_path)


class TestCompare:
    def test_a_run_is_no_better_than_itself(self, evaluate_tiny, pope_data):
        run = open_run(evaluate_tiny("pope", pope_data).folder)
        result = compare(run, run)
        assert result["difference"] == {"value": 0, "low": 0, "high": 0}
        assert result["mcnemar"]["p_value"] == 1
        assert result["same_answer"] == result["samples"] == 18

    def test_the_difference_is_that_of_the_scores(self, evaluate_tiny, pope_data):
        run = open_run(evaluate_tiny("pope", pope_data).folder)
        wrong = replace(run, records=[replace(r, score=0.0) for r in run.records])
        first = run.records[0]
        hard = [r for r in run.records if (r.image, r.question) == (first.image, first.question)]
        right = replace(run, records=[replace(r, score=float(r not in hard)) for r in run.records])
        result = compare(wrong, right)
        expected = 1 - len(hard) / 18
        assert result["difference"]["value"] == pytest.approx(expected)
        assert result["difference"]["low"] <= expected <= result["difference"]["high"]
        # The splits of POPE ask some questions again, which are answered alike: they are evidence once.
        others = len({(r.image, r.question) for r in run.records}) - 1
        assert others < 18 - len(hard)
        assert result["mcnemar"]["only_second"] == others
        assert result["mcnemar"]["p_value"] == pytest.approx(2 / 2**others)

    def test_captions_of_other_pictures_are_on_another_scale(self, evaluate_tiny, pope_data):
        run = open_run(evaluate_tiny("pope", pope_data).folder)
        first = replace(run, settings={**run.settings, "task": "captions"})
        with pytest.raises(InputError, match="how rare a word is"):
            compare(first, replace(first, settings={**first.settings, "data_sha256": "0"}))

    def test_one_picture_has_no_interval(self, evaluate_tiny, pope_data):
        run = open_run(evaluate_tiny("pope", pope_data).folder)
        one = replace(run, records=[r for r in run.records if r.image == run.records[0].image])
        assert compare(one, one)["difference"] == {"value": 0, "low": None, "high": None}

    def test_unmarked_samples_are_counted_and_other_data_refused(self, evaluate_tiny, pope_data):
        run = open_run(evaluate_tiny("pope", pope_data).folder)
        gaps = replace(run, records=[replace(r, score=None if r.index < 4 else r.score) for r in run.records])
        assert compare(run, gaps)["left_out"] == 8
        other = replace(run, records=[replace(r, expected="?") for r in run.records])
        with pytest.raises(InputError, match="on different data"):
            compare(run, other)


class TestAblations:
    def test_each_changes_what_the_model_reads(self, evaluate_tiny, tiny_bundle, pope_data):
        hashes = {}
        for name, change in {
            "own": {}, "crop": {"image_mode": "crop"}, "vicuna": {"prompt_format": "vicuna_v1"},
            "layers": {"feature_layers": (0, 2)}, "tokens": {"image_tokens": 16}, "system": {"system": "Be brief."},
        }.items():  # fmt: skip
            choice = ModelChoice(model=str(tiny_bundle), threads=1, n_ctx=1024, **change)
            outcome = evaluate_tiny("pope", pope_data, name, choice=choice, limit=1)
            hashes[name] = open_run(outcome.folder).records[0].prompt_sha256
            assert outcome.summary["model"]["image_tokens"] == change.get("image_tokens", 4)
        assert len({hashes[name] for name in ("own", "crop", "vicuna", "system")}) == 4
        assert hashes["own"] == hashes["layers"] == hashes["tokens"]  # the same text and the same picture

    def test_feature_layers_change_the_embeddings(self, tiny_bundle, pope_data):
        image = pope_data / "images" / "p0.png"
        found = []
        for layers in ((1, 2), (0, 2)):
            choice = ModelChoice(model=str(tiny_bundle), threads=1, n_ctx=1024, feature_layers=layers)
            with choice.load() as model:
                found.append(model.encode(model.open_picture(image)).chunks[0].embeddings)
        assert abs(found[0] - found[1]).max() > 1e-3

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"feature_layers": (1,)}, "1 feature layers; the projector of tiny reads 2"),
            ({"feature_layers": (1, 9)}, "the file has 0 \\(the input\\) to 2"),
            ({"feature_layers": (2, 1)}, "must rise"),
            ({"prompt_format": "vicuna"}, "expected one of vicuna_v1"),
        ],
    )
    def test_what_a_bundle_can_t_do_is_refused(self, evaluate_tiny, tiny_bundle, pope_data, change, message):
        with pytest.raises(InputError, match=message):
            evaluate_tiny("pope", pope_data, choice=ModelChoice(model=str(tiny_bundle), **change))


def test_two_samples_with_one_id_are_refused(evaluate_tiny, files, tmp_path):
    rows = [{"id": "x", "question": "What?", "choices": ["a", "b"], "answer": "a"}] * 2
    files.jsonl(tmp_path / "data" / "choices.jsonl", rows)
    with pytest.raises(InputError, match=r"two samples of .* have the id x"):
        evaluate_tiny("choices", tmp_path / "data")


def test_the_settings_are_kept_beside_the_answers(evaluate_tiny, pope_data):
    settings = json.loads((evaluate_tiny("pope", pope_data, limit=2).folder / "run.json").read_text())
    assert settings["task"] == "pope"
    assert settings["limit"] == 2
    assert all(len(digest) == 64 for digest in settings["model"]["files"].values())
