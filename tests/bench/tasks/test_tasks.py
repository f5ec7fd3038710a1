"""Each benchmark: its published format, and what its answers are worth."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llava_edge.bench.tasks.asking import Asker, Said
from llava_edge.bench.tasks.captions import Captions
from llava_edge.bench.tasks.chair import Chair
from llava_edge.bench.tasks.coco_objects import coco_objects, read_objects
from llava_edge.bench.tasks.easy_vqa import EasyVqa
from llava_edge.bench.tasks.pope import Pope
from llava_edge.bench.tasks.questions import Questions
from llava_edge.bench.tasks.reading import Data
from llava_edge.bench.tasks.samples import Sample
from llava_edge.bench.tasks.task import TASKS, make_task
from llava_edge.bench.tasks.yes_no import pope_answer, says_either
from llava_edge.errors import InputError


def said(text: str, *log_probabilities: float) -> Said:
    return Said(text, "", 0, log_probabilities)


def test_every_task_can_be_made_and_names_its_headline():
    for name in TASKS:
        assert make_task(name, {}).headline
    with pytest.raises(InputError, match="expected one of captions"):
        make_task("imagenet", {})


class TestPope:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("Yes", "yes"), ("No", "no"), ("no", "no"), ("Yes, there is a dog.", "yes"), ("There is not a dog", "no"),
            ("No, there is no dog.", "no"), ("Yes. There is no cat.", "yes"), ("", "yes"), ("NO", "yes"),
            ("Nothing", "yes"), ("It is a dog, not a cat", "no"),
        ],
    )  # fmt: skip
    def test_an_answer_is_read_as_by_the_published_script(self, text, answer):
        assert pope_answer(text) == answer

    def test_answers_that_say_neither_are_counted(self):
        assert [says_either(text) for text in ("", "A dog", "NO", "yes.")] == [False, False, True, True]

    def test_metrics_of_a_worked_table(self, make_record):
        outcomes = [("yes", "yes")] * 3 + [("yes", "no")] + [("no", "no")] * 4 + [("no", "yes")] * 2
        records = [
            make_record(label, float(answer == label), id=str(n), detail={"said": answer, "unclear": False},
                        facts={"split": ("random", "popular")[n % 2]})
            for n, (answer, label) in enumerate(outcomes)
        ]  # fmt: skip
        metrics = Pope().summarize(records)
        values = {name: metrics[name].value for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")}
        assert values == pytest.approx(
            {"accuracy": 0.7, "precision": 0.75, "recall": 0.6, "f1": 2 / 3, "yes_ratio": 0.4}
        )
        halves = [metrics[f"{split}/f1"].value for split in ("random", "popular")]
        assert metrics["mean_f1"].value == pytest.approx(sum(halves) / 2)

    def test_without_a_yes_precision_is_not_there(self, make_record):
        records = [make_record("yes", 0.0, detail={"said": "no", "unclear": False}, facts={"split": "random"})]
        assert Pope().summarize(records)["precision"].value is None

    def test_the_question_is_followed_by_the_request_of_llava(self, pope_data):
        (first, *_) = Pope().read(Data(pope_data))
        assert first.question == "Is there a dog?\nAnswer the question using a single word or phrase."
        assert Pope(suffix="").read(Data(pope_data))[0].question == "Is there a dog?"


class TestEasyVqa:
    def data(self, files, tmp_path, *rows):
        files.json(tmp_path / "data" / "test" / "questions.json", rows)
        files.picture(tmp_path / "data" / "test" / "images" / "0.png")
        return Data(tmp_path / "data")

    def test_the_format_of_the_package(self, files, tmp_path):
        rows = ["what is the red shape?", "triangle", 0], ["is there a circle?", "no", 0]
        samples = EasyVqa(suffix="").read(self.data(files, tmp_path, *rows))
        assert [(s.question, s.expected, s.facts["kind"]) for s in samples] == [
            ("What is the red shape?", "triangle", "shape"), ("Is there a circle?", "no", "yes/no"),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "score"),
        [("triangle", 1), ("It is a Triangle.", 1), ("triangle or circle", 0), ("", 0), ("triangles", 0)],
    )
    def test_only_the_expected_word_is_right(self, text, score):
        assert EasyVqa().mark(Sample("1", "?", None, "triangle"), said(text)).score == score

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (["what?", "purple", 0], "'purple'"),
            ([3, "red", 0], "expected"),
            (["what?", "red", 7], "no picture"),
            (["what?", "red"], "expected"),
        ],
    )
    def test_a_bad_entry_is_named(self, files, tmp_path, row, message):
        with pytest.raises(InputError, match=rf"questions\.json:entry 2: .*{message}"):
            EasyVqa().read(self.data(files, tmp_path, ["is it?", "yes", 0], row))


TEXTS = {"a.png": ["a dog runs", "the dog is running"], "b.png": ["a cat sleeps"]}


class TestCaptions:
    @pytest.fixture
    def folder(self, files, tmp_path):
        for n, name in enumerate(TEXTS):
            files.picture(tmp_path / "images" / name, n)
        return tmp_path

    def read(self, folder, **options):
        return {s.id: s.expected for s in Captions(**options).read(Data(folder))}

    def test_names_and_captions(self, files, folder):
        files.json(folder / "captions.json", {"dev": TEXTS, "train": {"c.png": ["x"]}})
        assert self.read(folder) == TEXTS
        with pytest.raises(InputError, match="for the split 'test'"):
            self.read(folder, split="test")
        with pytest.raises(InputError, match=r"captions\.json:c\.png: no picture"):
            self.read(folder, split="train")

    def test_coco(self, files, folder):
        images = [{"id": n, "file_name": name} for n, name in enumerate(TEXTS)]
        notes = [{"image_id": n, "caption": t} for n, name in enumerate(TEXTS) for t in TEXTS[name]]
        files.json(folder / "captions_val2014.json", {"images": images, "annotations": notes})
        assert self.read(folder) == TEXTS
        notes[1]["image_id"] = 9
        files.json(folder / "captions_val2014.json", {"images": images, "annotations": notes})
        with pytest.raises(InputError, match="entry 2: image_id is 9"):
            self.read(folder)

    def test_karpathy(self, files, folder):
        images = [
            {"filename": name, "split": "val", "sentences": [{"raw": text} for text in texts]}
            for name, texts in TEXTS.items()
        ]
        images.append({"filename": "c.png", "split": "test", "sentences": []})
        files.json(folder / "dataset_flickr8k.json", {"images": images})
        assert self.read(folder) == TEXTS

    def test_lines_of_flickr8k(self, folder):
        lines = [f"{name}#{n}\t{text}" for name, texts in TEXTS.items() for n, text in enumerate(texts)]
        (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
        assert self.read(folder) == TEXTS
        (folder / "Flickr_8k.devImages.txt").write_text("b.png\n")
        assert self.read(folder) == {"b.png": ["a cat sleeps"]}
        (folder / "Flickr8k.token.txt").write_text("a.png\ta dog runs\n")
        with pytest.raises(InputError, match=r"token\.txt:1: expected NAME#NUMBER"):
            self.read(folder)

    def test_a_table(self, folder):
        rows = [f'{name},"{text}, yes"' for name, texts in TEXTS.items() for text in texts]
        (folder / "captions.txt").write_text("\n".join(["image,caption", *rows]))
        assert self.read(folder)["b.png"] == ["a cat sleeps, yes"]

    def test_scores_of_a_run(self, files, folder, evaluate_tiny):
        files.json(folder / "captions.json", {"dev": TEXTS})
        metrics = evaluate_tiny("captions", folder).summary["metrics"]
        assert set(metrics) == {"cider_d", "bleu_4", "rouge_l"}
        with pytest.raises(InputError, match="two pictures or more"):
            evaluate_tiny("captions", folder, "one", limit=1)


class TestChair:
    @pytest.mark.parametrize(
        ("text", "objects"),
        [
            ("A man and two puppies on a couch.", ["person", "dog", "couch"]),
            ("A hot dog on a dining table", ["hot dog", "dining table"]),
            ("Teddy bears beside a polar bear", ["teddy bear", "bear"]),
            ("A baby elephant, an adult zebra and a baby", ["elephant", "zebra", "person"]),
            ("A passenger train and three TVs", ["train", "tv"]),
            ("Wine glasses, bow ties, calves and mice", ["wine glass", "tie", "cow", "mouse"]),
            ("The traffic lights at the bus stop", ["traffic light"]),
            ("A toilet seat", ["toilet"]),
            ("Boxes and glasses in the category", []),
            ("knives, buses and skis", ["knife", "bus", "skis"]),
        ],
    )
    def test_objects_in_text(self, text, objects):
        assert coco_objects().mentions(text) == objects

    def test_there_are_eighty_objects(self):
        assert len(set(coco_objects().names)) == 80

    def test_words_from_a_file(self, tmp_path):
        path = tmp_path / "synonyms.txt"
        path.write_text("dog, hound\n\ncat, big cat\n")
        assert read_objects(path).mentions("A hound and big cats") == ["dog", "cat"]
        path.write_text("\n")
        with pytest.raises(InputError, match="names no object"):
            read_objects(path)

    @pytest.fixture
    def coco(self, files, tmp_path):
        images = [{"id": n, "file_name": f"{n}.png"} for n in (1, 10, 2)]
        for n in (1, 2, 10):
            files.picture(tmp_path / "val2014" / f"{n}.png", n)
        boxes = [{"image_id": 1, "category_id": 18}, {"image_id": 2, "category_id": 18}]
        categories = [{"id": 18, "name": "dog"}]
        captions = [{"image_id": 1, "caption": "A man with his dog"}, {"image_id": 10, "caption": "Snow."}]
        files.json(
            tmp_path / "annotations" / "instances_val2014.json",
            {"images": images, "annotations": boxes, "categories": categories},
        )
        files.json(tmp_path / "annotations" / "captions_val2014.json", {"images": images, "annotations": captions})
        return tmp_path

    def test_annotated_and_described_objects_are_there(self, coco):
        samples = Chair().read(Data(coco))
        assert [(s.id, s.expected) for s in samples] == [("1", ["dog", "person"]), ("2", ["dog"]), ("10", [])]

    def test_annotations_of_the_training_pictures_beside_them_are_left_alone(self, files, coco):
        files.json(coco / "annotations" / "instances_train2014.json", {"images": [], "annotations": []})
        files.json(coco / "annotations" / "captions_train2014.json", {"images": [], "annotations": []})
        assert len(Chair().read(Data(coco))) == 3

    def test_a_picture_in_which_nothing_is_annotated_is_asked_too(self, coco):
        (coco / "annotations" / "captions_val2014.json").unlink()
        samples = Chair().read(Data(coco))
        assert [(s.id, s.expected) for s in samples] == [("1", ["dog"]), ("2", ["dog"]), ("10", [])]

    def test_metrics_of_a_worked_example(self, coco, make_record):
        task = Chair()
        texts = ("A man, his dog and a cat", "A puppy", "A dog on a chair")
        records = []
        for sample, text in zip(task.read(Data(coco)), texts, strict=True):
            mark = task.mark(sample, said(text))
            records.append(make_record(sample.expected, mark.score, id=sample.id, detail=mark.detail))
        metrics = task.summarize(records)
        assert metrics["chair_s"].value == pytest.approx(2 / 3)
        assert metrics["chair_i"].value == pytest.approx(3 / 6)  # cat; dog and chair
        assert metrics["recall"].value == pytest.approx(1)
        assert metrics["words"].value == pytest.approx((7 + 2 + 5) / 3)

    def test_an_unknown_category_is_named(self, files, coco):
        path = coco / "annotations" / "instances_val2014.json"
        root = json.loads(path.read_text())
        root["annotations"][1]["category_id"] = 99
        files.json(path, root)
        with pytest.raises(InputError, match=r"instances_val2014\.json:entry 2: category_id is 99"):
            Chair().read(Data(coco))


class TestChoices:
    def test_letters_are_compared_after_one_reading_of_the_prompt(self, tiny_model, pope_data):
        asker = Asker(tiny_model)
        said = asker.choose("Which?\nA. x\nB. y", pope_data / "images" / "p0.png", ["x", "y"], "letter")
        assert said.tokens == 0
        assert said.text == ["x", "y"][said.log_probabilities[1] > said.log_probabilities[0]]
        assert all(score < 0 for score in said.log_probabilities)

    def test_words_score_what_the_model_gives_them_one_by_one(self, tiny_model):
        """Worked out again by feeding each choice as the only one."""
        asker = Asker(tiny_model)
        texts = ["A cat", "The dog runs", "snow"]
        together = asker.choose("What is it?", None, texts, "text").log_probabilities
        tiny_model.forget()
        alone = [asker.choose("What is it?", None, [text], "text").log_probabilities[0] for text in texts]
        assert together == pytest.approx(tuple(alone))

    def test_the_likeliest_first_token_is_the_greedy_answer(self, tiny_model):
        asker = Asker(tiny_model)
        greedy = asker.say(["What is it?"], None, max_tokens=1)[0].text
        tokens = [tiny_model.engine.piece(t).decode("utf-8", "replace") for t in range(4, 260)]
        single = [t for t in tokens if len(tiny_model.tokenizer.plain(t)) == 1 and t.strip() == t and t]
        assert greedy in single
        assert asker.choose("What is it?", None, sorted(set(single)), "text").text == greedy

    def test_pictures_of_one_name_in_two_folders_are_two(self, files, tmp_path):
        rows = []
        for folder in ("cat", "dog"):
            files.picture(tmp_path / "images" / folder / "1.png", 1)
            rows.append({"image": f"{folder}/1.png", "question": "Which?", "choices": ["cat", "dog"], "answer": folder})
        files.jsonl(tmp_path / "choices.jsonl", rows)
        samples = make_task("choices", {}).read(Data(tmp_path))
        assert [sample.image_name for sample in samples] == ["cat/1.png", "dog/1.png"]

    def test_another_way_to_choose_is_refused(self):
        with pytest.raises(InputError, match="chosen by 'letters'; expected letter or text"):
            make_task("choices", {"by": "letters"})

    @pytest.mark.parametrize("answer", [1, "B", "blue"])
    def test_an_answer_may_be_a_number_a_letter_or_the_choice(self, files, tmp_path, evaluate_tiny, answer):
        rows = [{"question": "Which?", "choices": ["red", "blue"], "answer": answer, "category": "colour"}]
        files.jsonl(tmp_path / "data" / "choices.jsonl", rows)
        (sample,) = make_task("choices", {}).read(Data(tmp_path / "data"))
        assert sample.expected == "blue"
        assert sample.question.startswith("Which?\nA. red\nB. blue\n")
        assert "colour/accuracy" in evaluate_tiny("choices", tmp_path / "data").summary["metrics"]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"choices": ["a", "b"], "answer": 2}, "answer is 2"),
            ({"choices": ["a"], "answer": 0}, "choices has 1 texts"),
            ({"choices": ["a", "a"], "answer": 0}, "different"),
            ({"choices": "ab", "answer": 0}, "choices"),
        ],
    )
    def test_a_bad_line_is_named(self, files, tmp_path, row, message):
        files.jsonl(tmp_path / "choices.jsonl", [{"question": "?", **row}])
        with pytest.raises(InputError, match=rf"choices\.jsonl:1: .*{message}"):
            make_task("choices", {}).read(Data(tmp_path))


QUESTION = {"image": "a.png", "question": "How many dogs are there?", "answer": "two"}
SHORT = "\nAnswer the question using a single word or phrase."


class TestQuestions:
    @pytest.fixture
    def folder(self, files, tmp_path):
        for n, name in enumerate(("a.png", "b/a.png")):
            files.picture(tmp_path / "data" / name, n)
        return tmp_path / "data"

    def read(self, file, **options):
        return Questions(file, **options).read(Data(file.parent))

    def test_a_list_and_lines_are_the_same_questions(self, files, folder):
        rows = [QUESTION, {"image": "b/a.png", "question": "Is it red? ", "answer": ["no", "No."], "kind": "colour"}]
        samples = self.read(files.json(folder / "mine.json", rows))
        assert samples == self.read(files.jsonl(folder / "lines.json", rows))
        assert [(s.id, s.question, s.expected, s.facts, s.image_name) for s in samples] == [
            ("1", "How many dogs are there?" + SHORT, ["two"], {}, "a.png"),
            ("2", "Is it red?" + SHORT, ["no", "No."], {"kind": "colour"}, "b/a.png"),
        ]

    def test_pictures_elsewhere(self, files, folder, tmp_path):
        file = files.json(tmp_path / "mine.json", [QUESTION])
        (sample,) = Questions(file).read(Data(tmp_path, images=[folder]))
        assert sample.image == folder / "a.png"

    @pytest.mark.parametrize("asked", ["Red?", f"Red?{SHORT}", f"Red? {SHORT.strip()}"])
    def test_the_request_for_a_short_answer_is_there_once(self, files, folder, asked):
        file = files.json(folder / "mine.json", [{**QUESTION, "question": asked}])
        assert self.read(file)[0].question == f"Red?{SHORT}"
        assert self.read(file, suffix="")[0].question == asked
        assert self.read(file, suffix="\nBriefly.")[0].question == f"{asked}\nBriefly."

    @pytest.mark.parametrize(
        ("answers", "text", "score"),
        [
            (["two"], "Two.", 1), (["2 dogs"], "two dogs", 1), (["two"], "two dogs", 0),
            (["a dog", "puppy"], "The puppy!", 1), (["a dog", "puppy"], "", 0),
            (["Yes"], "Yes, there is.", 1), (["yes"], "No, yes", 0), (["yes"], "", 0), (["yes"], "Yesterday", 0),
            (["no"], "There is no dog", 0), (["no", "No."], "No.\nNone", 1),
            (["yes", "no"], "No dog", 0), (["yes", "no"], "no", 1), (["no", "none"], "None.", 1),
        ],
    )  # fmt: skip
    def test_an_answer_is_one_of_the_right_ones_or_begins_with_the_right_yes_or_no(self, answers, text, score):
        assert Questions().mark(Sample("1", "?", None, answers), said(text)).score == score

    def test_an_answer_that_is_neither_counts_as_the_opposite(self, make_record):
        rows = [
            ("yes", "Yes"), ("yes", "yes."), ("yes", "Maybe"), ("no", "no"), ("no", "A dog"), ("no", "Yes"),
            ("no", "no, none"), ("No.", "No"),
        ]  # fmt: skip
        metrics = self.summary(make_record, [([answer], text, "presence") for answer, text in rows])
        values = {name: metric.value for name, metric in metrics.items()}
        assert values == pytest.approx(
            {"accuracy": 5 / 8, "presence/accuracy": 5 / 8, "presence/f1": 4 / 7, "presence/precision": 2 / 4,
             "presence/recall": 2 / 3, "presence/yes_ratio": 4 / 8}
        )  # fmt: skip

    def test_a_kind_with_another_answer_has_its_accuracy_alone(self, make_record):
        rows = [(["yes"], "yes", "mixed"), (["red"], "blue", "mixed"), (["two"], "2", None)]
        values = {name: metric.value for name, metric in self.summary(make_record, rows).items()}
        assert values == pytest.approx({"accuracy": 2 / 3, "mixed/accuracy": 1 / 2})

    def summary(self, make_record, rows):
        task, records = Questions(), []
        for n, (answers, text, kind) in enumerate(rows):
            mark = task.mark(Sample(str(n), "?", None, answers), said(text))
            facts = {"kind": kind} if kind else {}
            records.append(make_record(answers, mark.score, id=str(n), detail=mark.detail, facts=facts))
        return task.summarize(records)

    BAD = (
        ({"anwser": "two"}, "unknown key anwser; expected image, question, answer, kind"),
        ({"answer": 2}, "answer is 2; expected a text"),
        ({"answer": ["two", 2]}, r"answer is \[.*\]; expected a list of texts"),
        ({"answer": []}, r"answer is \[\]; expected words"),
        ({"answer": ["dog", "the."]}, r"answer is \['dog', 'the\.'\]; expected words"),
        ({"question": " "}, "question is empty; expected a text"),
        ({"kind": None}, "kind is null; expected a text"),
        ({"image": "c.png"}, r"no picture c\.png in"),
        ({"image": "../a.png"}, r"the picture's name is '\.\./a\.png'; expected a path inside"),
    )

    @pytest.mark.parametrize(("change", "message"), BAD)
    def test_a_bad_entry_is_named_or_skipped(self, files, folder, change, message):
        rows = [QUESTION, {**QUESTION, **change}]
        with pytest.raises(InputError, match=rf"mine\.json:entry 2: {message}"):
            self.read(files.json(folder / "mine.json", rows))
        file = files.jsonl(folder / "mine.jsonl", rows)
        with pytest.raises(InputError, match=rf"mine\.jsonl:2: {message}"):
            self.read(file)
        data = Data(folder, skip_bad=True)
        assert len(Questions(file).read(data)) == len(data.skipped) == 1

    @pytest.mark.parametrize("key", ["image", "question", "answer"])
    def test_a_missing_key_is_named(self, files, folder, key):
        row = {name: value for name, value in QUESTION.items() if name != key}
        with pytest.raises(InputError, match=rf"mine\.json:entry 1: missing key {key}"):
            self.read(files.json(folder / "mine.json", [row]))

    def test_without_a_file_the_folder_is_looked_through(self, files, folder, evaluate_tiny):
        with pytest.raises(InputError, match=r"has no questions\.json or questions\.jsonl"):
            make_task("questions", {}).read(Data(folder))
        rows = [{**QUESTION, "answer": "yes", "kind": "presence"}, QUESTION]
        files.jsonl(folder / "questions.jsonl", rows)
        summary = evaluate_tiny("questions", folder).summary
        assert set(summary["metrics"]) >= {"accuracy", "presence/accuracy", "presence/f1"}


class TestAnimals:
    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("It is a polar bear.", ["polar_bear"]),
            ("Two bears and a guinea  pig", ["bear", "guinea-pig"]),
            ("A polar bear beside a bear", ["bear", "polar_bear"]),
            ("A bearded man", []),
        ],
    )
    def test_names_of_several_words(self, files, tmp_path, text, named):
        for name in ("bear", "polar_bear", "guinea-pig"):
            files.picture(tmp_path / name / "1.png", 1)
        task = make_task("animals", {})
        sample = next(s for s in task.read(Data(tmp_path)) if s.expected == "polar_bear")
        mark = task.mark(sample, said(text))
        assert mark.detail["named"] == named
        assert mark.score == float(named == ["polar_bear"])

    def test_a_link_s_own_name_counts(self, files, tmp_path):
        files.picture(tmp_path / "n02085620" / "1.png", 1)
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "dog").symlink_to(tmp_path / "n02085620")
        assert [s.expected for s in make_task("animals", {}).read(Data(tmp_path / "data"))] == ["dog"]


class TestPublishedFiles:
    """The real question files, with small pictures in place of COCO's."""

    @pytest.fixture
    def published(self):
        root = os.environ.get("LLAVA_EDGE_DATA")
        folder = Path(root or "") / "benchmarks"
        if not root or not folder.is_dir():
            pytest.skip("LLAVA_EDGE_DATA does not name the folder with benchmarks")
        return folder

    def read(self, task, published, images, names):
        images.mkdir()
        for name in names:
            (images / name).touch()
        return make_task(task, {}).read(Data(published, images=[images]))

    def test_pope(self, published, tmp_path):
        lines = [json.loads(line) for line in (published / "coco_pope_random.json").read_text().splitlines()]
        samples = self.read("pope", published, tmp_path / "images", {line["image"] for line in lines})
        assert len(samples) == 9000
        assert sum(sample.expected == "yes" for sample in samples) == 4500

    def test_llava_bench(self, published, tmp_path):
        text = (published / "llava_bench_coco_questions.jsonl").read_text()
        names = {json.loads(line)["image"] for line in text.splitlines()}
        samples = self.read("llava-bench", published, tmp_path / "images", names)
        assert len(samples) == 90
        assert all(sample.expected and "[" in sample.facts["context"] for sample in samples)
