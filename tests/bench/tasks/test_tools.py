"""Sweeps, tables and sets that are made of captions."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest

from llava_edge.bench.tasks.chair import Chair
from llava_edge.bench.tasks.evaluate import Job
from llava_edge.bench.tasks.make_sets import make_sets
from llava_edge.bench.tasks.models import ModelChoice
from llava_edge.bench.tasks.pope import Pope
from llava_edge.bench.tasks.reading import Data
from llava_edge.bench.tasks.report import BEGIN, END, markdown_table, write_into
from llava_edge.bench.tasks.run import open_run
from llava_edge.bench.tasks.sweep import parse_grid, run_sweep
from llava_edge.errors import InputError


class TestSweep:
    @pytest.fixture
    def job(self, pope_data, tiny_bundle):
        return Job("pope", pope_data, ModelChoice(model=str(tiny_bundle), threads=1, n_ctx=1024), max_tokens=2, limit=4)

    def test_every_combination_is_a_run_of_its_own_and_run_once(self, job, tmp_path):
        asked = []

        @contextmanager
        def counting(length, done, label):
            yield asked.append

        grid = parse_grid(["image-tokens=4,16", "suffix=,!"])
        rows = run_sweep(job, grid, tmp_path / "sweep", counting)
        assert [tuple(row["settings"].values()) for row in rows] == [(4, ""), (4, "!"), (16, ""), (16, "!")]
        assert rows == json.loads((tmp_path / "sweep" / "sweep.json").read_text())
        assert len(asked) == 16
        assert run_sweep(job, grid, tmp_path / "sweep", counting) == rows
        assert len(asked) == 16
        runs = [open_run(tmp_path / "sweep" / row["run"]) for row in rows]
        assert [run.settings["model"]["image_tokens"] for run in runs] == [4, 4, 16, 16]
        assert [run.records[0].question[-1] for run in runs] == ["?", "!", "?", "!"]

    @pytest.mark.parametrize(
        ("lines", "message"),
        [(["tokens"], "expected KEY=VALUE"), (["image-tokens=few"], "whole numbers"), (["limit=1", "limit=2"], "twice"),
         (["feature-layers=10-11"], "whole numbers")],
    )  # fmt: skip
    def test_a_grid_that_can_t_be_read(self, lines, message):
        with pytest.raises(InputError, match=message):
            parse_grid(lines)

    def test_an_option_that_the_task_lacks_is_named_with_those_that_it_has(self, job, tmp_path):
        with pytest.raises(InputError, match="pope has no option 'format'; it has suffix"):
            run_sweep(job, parse_grid(["format=lea"]), tmp_path / "s", lambda *args: None)


class TestReport:
    def test_tasks_by_models_with_intervals(self, evaluate_tiny, pope_data, tiny_bundle, tmp_path):
        runs = [open_run(evaluate_tiny("pope", pope_data).folder)]
        choice = ModelChoice(model=str(tiny_bundle), threads=1, n_ctx=1024, image_tokens=16)
        runs.append(open_run(evaluate_tiny("pope", pope_data, "more", choice=choice).folder))
        lines = markdown_table(runs).splitlines()
        assert lines[0] == "| task | samples | metric | tiny F32, 4 tokens | tiny F32, 16 tokens |"
        assert [line.split(" | ")[2] for line in lines[2:]] == [
            "mean_f1",
            "accuracy",
            "precision",
            "recall",
            "yes_ratio",
        ]
        accuracy = json.loads((runs[0].folder / "summary.json").read_text())["metrics"]["accuracy"]
        assert f"| {accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f}) |" in lines[3]
        with pytest.raises(InputError, match="two runs of pope are on tiny"):
            markdown_table([runs[0], replace(runs[0])])

    def test_the_table_takes_its_place_in_a_document(self, tmp_path):
        document = tmp_path / "d.md"
        document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
        for table in ("| new |\n", "| newer |\n"):
            write_into(document, table)
            assert document.read_text() == f"before\n{BEGIN}\n\n{table}\n{END}\nafter\n"
        document.write_text("no place\n")
        with pytest.raises(InputError, match="has no place for results"):
            write_into(document, "")

    def test_an_unfinished_run_is_refused(self, evaluate_tiny, pope_data):
        run = open_run(evaluate_tiny("pope", pope_data, limit=1).folder)
        (run.folder / "summary.json").unlink()
        with pytest.raises(InputError, match="is not finished"):
            markdown_table([run])


class TestMakeSets:
    @pytest.fixture
    def sets(self, files, tmp_path):
        captions = {
            "a.png": ["a dog and a man", "a man with his dog", "a kite"],
            "b.png": ["a boy on a bike", "a boy cycles", "a bike"],
            "c.png": ["snow", "white"],
            **{f"d{n}.png": ["a man and a car", "a car and a woman"] for n in range(4)},
        }
        for n, name in enumerate(captions):
            files.picture(tmp_path / "sets" / "images" / name, n)
        self.counts = make_sets(captions, tmp_path / "sets", pictures=100)
        return tmp_path / "sets"

    def test_as_many_yes_as_no_and_no_object_that_anybody_named(self, sets):
        samples = Pope().read(Data(sets))
        by_label = {label: [s for s in samples if s.expected == label] for label in ("yes", "no")}
        assert len(by_label["yes"]) == len(by_label["no"]) > 0
        about_a = {s.question.split("\n")[0] for s in by_label["no"] if s.image and s.image.name == "a.png"}
        assert not {f"Is there a {noun} in the image?" for noun in ("dog", "person", "kite")} & about_a
        assert not any(s.image and s.image.name == "c.png" for s in samples)

    def test_each_split_draws_other_absent_objects(self, sets):
        def absent(split):
            text = (sets / "pope" / f"captions_pope_{split}.json").read_text()
            rows = [json.loads(line) for line in text.splitlines()]
            return [row["text"] for row in rows if row["image"] == "b.png" and row["label"] == "no"]

        assert absent("popular") == absent("adversarial") == [f"Is there a {n} in the image?" for n in ("car", "dog")]
        assert all("car" in text or "dog" in text for text in absent("random"))

    def test_the_annotations_are_read_by_chair(self, sets):
        expected = {s.image.name: s.expected for s in Chair().read(Data(sets)) if s.image}
        assert expected["a.png"] == ["dog", "kite", "person"]
        assert expected["c.png"] == []

    def test_captions_without_objects_are_refused(self, tmp_path):
        with pytest.raises(InputError, match="no object is named"):
            make_sets({"a.png": ["snow"]}, tmp_path)
