"""``llava-edge eval`` as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def fast(tiny_bundle: Path) -> tuple[object, ...]:
    """A model that answers at once, and nothing but the result."""
    return ("--model", tiny_bundle, "--threads", "1", "--n-ctx", "1024", "--max-tokens", "4", "--quiet")


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Two pictures of easy-VQA's kind with two questions each."""
    images = tmp_path / "data" / "test" / "images"
    images.mkdir(parents=True)
    rows = []
    for number, colour in enumerate(("red", "blue")):
        picture = Image.new("RGB", (64, 64), (240, 240, 240))
        picture.paste(Image.new("RGB", (30, 20), colour), (10, 15))
        picture.save(images / f"{number}.png")
        rows += [["what color is the shape?", colour, number], ["is there a circle?", "no", number]]
    (tmp_path / "data" / "test" / "questions.json").write_text(json.dumps(rows))
    return tmp_path / "data"


@pytest.mark.usefixtures("nano")
def test_a_run_its_files_and_its_table(run, shapes, tmp_path):
    result = run("eval", "easy-vqa", "--data", shapes, "-o", "r", "--threads", "1")
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == "easy-vqa · nano · 4 samples"
    assert result.out.splitlines()[1].startswith("* accuracy")
    files = {path.name for path in (tmp_path / "r").iterdir()}
    assert files - {".lock"} == {"run.json", "samples.jsonl", "summary.json"}
    assert len((tmp_path / "r" / "samples.jsonl").read_text().splitlines()) == 4


def test_json_is_the_summary_file_and_compare_reads_runs(run, shapes, tmp_path, fast):
    first = run("eval", "easy-vqa", "--data", shapes, "-o", "one", "--json", *fast)
    assert json.loads(first.out) == json.loads((tmp_path / "one" / "summary.json").read_text())
    assert first.err.splitlines() == [line for line in first.err.splitlines() if line.startswith("warning: tiny")]
    run("eval", "easy-vqa", "--data", shapes, "-o", "two", "--image-tokens", "16", *fast)
    result = run("eval", "compare", "one", "two", "--json")
    assert json.loads(result.out)["samples"] == 4
    assert "p = " in run("eval", "compare", "one", "two").out


def test_going_on_and_beginning_anew_exclude_each_other(run, shapes, fast):
    first = run("eval", "easy-vqa", "--data", shapes, "-o", "run", "--json", *fast)
    both = run("eval", "easy-vqa", "--data", shapes, "-o", "run", "--overwrite", "--resume", *fast)
    assert both.code == 2
    assert "give one of them" in both.err
    again = run("eval", "easy-vqa", "--data", shapes, "-o", "run", "--resume", "--json", *fast)
    assert json.loads(again.out) == json.loads(first.out)


def test_shards_are_merged(run, shapes, fast):
    for part in ("1/2", "2/2"):
        assert run("eval", "easy-vqa", "--data", shapes, "--shard", part, "-o", part[0], *fast).code == 0
    joined = run("eval", "merge", "1", "2", "-o", "all", "--json")
    assert json.loads(joined.out)["asked"] == 4


def test_sharing_is_measured_and_changes_no_answer(run, shapes, fast):
    result = run("eval", "easy-vqa", "--data", shapes, "--measure-sharing", "--json", *fast)
    measured = json.loads(result.out)
    assert measured["same_answers"] == measured["questions"] == 4
    assert measured["pictures"] == 2
    assert measured["times_faster"]["value"] > 0


def test_captions_and_animals_take_folders_as_arguments(run, shapes, tmp_path, fast):
    images = shapes / "test" / "images"
    (tmp_path / "captions.json").write_text(json.dumps({"dev": {"0.png": ["a red shape"], "1.png": ["a blue one"]}}))
    captions = run("eval", "captions", "captions.json", images, "--json", *fast)
    assert json.loads(captions.out)["metrics"]["cider_d"]["value"] >= 0
    animals = run("eval", "animals", images, "--json", *fast)
    assert json.loads(animals.out)["asked"] == 2


@pytest.mark.usefixtures("nano")
def test_questions_of_one_s_own(run, shapes, tmp_path):
    rows = [
        {"image": f"{n}.png", "question": question, "answer": answer, "kind": kind}
        for n, colour in enumerate(("red", "blue"))
        for question, answer, kind in (
            ("Is there a dog?", "no", "presence"), ("What color is the shape?", [colour, f"{colour} shape"], "color")
        )
    ]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--images", shapes / "test" / "images", "-o", "r", "--threads", "1")
    result = run("eval", "questions", "mine.jsonl", *options)
    assert result.code == 0, result.err
    head, headline, *others = result.out.splitlines()
    assert head == "questions · nano · 4 samples"
    assert headline.startswith("* accuracy")
    names = [line.split()[0] for line in others]
    assert names == [
        "color/accuracy",
        *(f"presence/{name}" for name in ("accuracy", "f1", "precision", "recall", "yes_ratio")),
    ]
    records = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").read_text().splitlines()]
    assert [record["expected"] for record in records] == [["no"], ["red", "red shape"], ["no"], ["blue", "blue shape"]]
    assert run("eval", "questions", "mine.jsonl", *options, "--resume").out == result.out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["popes"], ["no such task: popes", "did you mean pope?"]),
        (["pope"], ["--data"]),
        (["captions"], ["FILE", "--data"]),
        (["animals"], ["FOLDERS"]),
        (["questions"], ["FILE"]),
        (["questions", "nowhere.json"], ["FILE", "nowhere.json", "does not exist"]),
        (["pope", "--data", ".", "--shard", "3/2"], ["--shard", "expected K/N"]),
        (["pope", "--data", ".", "--feature-layers", "ten"], ["--feature-layers", "ten"]),
        (["pope", "--data", ".", "--llm", "x.gguf"], ["--llm needs --mmproj"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_two(run, args, words):
    result = run("eval", *args)
    assert result.code == 2
    assert len(result.err.splitlines()) == 2
    assert all(word in result.err for word in words), result.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["pope", "--data", "nowhere"], ["no such folder: nowhere", "--data"]),
        (["pope", "--data", "."], ["has no questions of POPE"]),
        (["choices", "--data", "."], ["has no choices.jsonl"]),
        (["compare", "a", "b"], ["a is not a run"]),
    ],
)
def test_what_is_missing_is_named(run, args, words):
    result = run("eval", *args)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert all(word in result.err for word in words), result.err


def test_every_task_is_listed_and_has_help():
    from click.testing import CliRunner

    from llava_edge.cli import cli
    from llava_edge.cli.evaluate import COMMANDS

    listed = CliRunner().invoke(cli, ["eval", "--help"]).output
    for name in COMMANDS:
        assert f"  {name} " in listed
        assert f" eval {name} " in CliRunner().invoke(cli, ["eval", name, "--help"]).output.splitlines()[0]
