"""VQAv2, TextVQA, GQA, MME and ScienceQA: published formats and scoring, on cases worked out by hand."""

from __future__ import annotations

import json

import pytest

from llava_edge.bench.tasks.asking import Said
from llava_edge.bench.tasks.gqa import Gqa
from llava_edge.bench.tasks.mme import Mme
from llava_edge.bench.tasks.reading import Data
from llava_edge.bench.tasks.samples import Sample
from llava_edge.bench.tasks.scienceqa import FAILED, ScienceQa, read_letter
from llava_edge.bench.tasks.textvqa import TextVqa
from llava_edge.bench.tasks.vqa_accuracy import (
    challenge_accuracy,
    challenge_answer,
    contractions,
    evalai_accuracy,
    evalai_answer,
)
from llava_edge.bench.tasks.vqav2 import VqaV2
from llava_edge.bench.tasks.yes_no import mme_answer
from llava_edge.errors import InputError

SHORT = "\nAnswer the question using a single word or phrase."


def said(text: str) -> Said:
    return Said(text, "", 0)


class TestNormalisation:
    """What the published scripts give for these texts (EvalAI's was run on 20,000 random ones beside ours)."""

    @pytest.mark.parametrize(
        ("text", "challenge", "evalai"),
        [
            ("A dog", "dog", "dog"),
            ("the man and an apple", "man and apple", "man and apple"),
            ("two", "2", "2"),
            ("None", "0", "0"),
            ("Ten\n", "10", "10"),
            ("dont", "don't", "don't"),
            ("couldnt've", "couldn't've", "couldn't've"),
            ("2.5", "2.5", "2.5"),
            ("u.s.", "us", "us"),
            ("1,000", "1000", "1000"),
            ("red/blue", "red blue", "red blue"),
            ("red, blue", "red blue", "red blue"),
            ("(yes)", "yes", "yes"),
            ("no!", "no", "no"),
            ("t-shirt", "t shirt", "t shirt"),
            ("10:30", "10:30", "10:30"),
            ("what?", "what", "what"),
            ("dog's", "dog's", "dog 's"),
            ("", "", ""),
            ("a", "", ""),
        ],
    )
    def test_each_rule(self, text, challenge, evalai):
        assert challenge_answer(text) == challenge
        assert evalai_answer(text) == evalai

    def test_contractions_lack_exactly_one_apostrophe(self):
        known = contractions()
        assert known["youve"] == "you've"
        assert known["y'alldve"[:1] + "'all'dve"] == "y'all'd've"
        assert "couldntve" not in known
        assert len(known) == 114


class TestAgreement:
    @pytest.mark.parametrize(("matching", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
    def test_accuracy_by_how_many_of_ten_agree(self, matching, accuracy):
        people = ["dog"] * matching + [f"other {n}" for n in range(10 - matching)]
        assert challenge_accuracy("dog", people) == pytest.approx(accuracy)
        assert evalai_accuracy("dog", people) == pytest.approx(accuracy)

    def test_two_answers_that_tie_count_the_same(self):
        people = ["red"] * 5 + ["blue"] * 5
        assert challenge_accuracy("red", people) == challenge_accuracy("blue", people) == 1

    def test_people_s_answers_are_normalised_too(self):
        people = ["the dog", "two", "Dog!"] * 3 + ["x"]
        assert evalai_accuracy("dog", people) == challenge_accuracy("a dog.", people) == 1
        assert evalai_accuracy("2", people) == challenge_accuracy("Two", people) == pytest.approx(0.9)

    def test_where_all_agree_the_challenge_compares_by_the_letter(self):
        assert challenge_accuracy("Red/blue", ["red/blue"] * 10) == 0
        assert challenge_accuracy("red/blue", ["red/blue"] * 10) == 1
        assert challenge_accuracy("Red/blue", ["red/blue"] * 9 + ["x"]) == 1

    def test_an_empty_answer_agrees_with_nobody_who_said_something(self):
        assert challenge_accuracy("", ["dog"] * 10) == 0
        assert evalai_accuracy("a", ["the"] * 10) == 1  # both are nothing but an article


class TestVqaV2:
    @pytest.fixture
    def folder(self, files, tmp_path):
        questions, annotations = [], []
        for n, (kind, answers) in enumerate((("yes/no", ["yes"] * 10), ("number", ["2"] * 4 + ["3"] * 6))):
            questions.append({"image_id": 9, "question": f"What {n}?", "question_id": 90 + n})
            annotations.append(
                {"question_id": 90 + n, "answer_type": kind, "question_type": "what", "image_id": 9,
                 "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers)]}
            )  # fmt: skip
        for split in ("val2014", "test2015"):
            files.picture(tmp_path / split / f"COCO_{split}_{9:012d}.jpg")
            name = f"v2_OpenEnded_mscoco_{split}_questions.json"
            files.json(tmp_path / name, {"questions": questions})
        files.json(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
        return tmp_path

    def test_questions_annotations_and_scores(self, folder, make_record):
        task = VqaV2()
        samples = task.read(Data(folder))
        assert [s.question for s in samples] == [f"What 0?{SHORT}", f"What 1?{SHORT}"]
        records = []
        for sample, answer in zip(samples, ("Yes.", "two"), strict=True):
            mark = task.mark(sample, said(answer))
            records.append(
                make_record(sample.expected, mark.score, id=sample.id, facts=sample.facts, detail=mark.detail)
            )
        assert [record.score for record in records] == [1, 1]
        assert {"accuracy", "yes/no/accuracy", "number/accuracy"} == set(task.summarize(records))

    def test_the_submission_of_a_split_without_annotations(self, folder, evaluate_tiny):
        outcome = evaluate_tiny("vqav2", folder, options={"split": "test2015"})
        assert outcome.summary["files"] == ["vqav2-submission.json"]
        rows = json.loads((outcome.folder / "vqav2-submission.json").read_text())
        assert [row["question_id"] for row in rows] == [90, 91]
        assert all(isinstance(row["answer"], str) for row in rows)
        assert outcome.summary["metrics"]["accuracy"]["value"] is None

    def test_a_question_without_annotation_is_named(self, files, folder):
        files.json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": []})
        with pytest.raises(InputError, match=r"questions\.json:entry 1: question_id is 90"):
            VqaV2().read(Data(folder))

    def test_an_id_that_is_no_number_is_named(self, files, folder):
        questions = [{"image_id": "nine", "question": "What?", "question_id": 90}]
        files.json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
        with pytest.raises(InputError, match='entry 1: image_id is "nine"; expected a whole number'):
            VqaV2().read(Data(folder))


class TestTextVqa:
    @pytest.fixture
    def folder(self, files, tmp_path):
        rows = [{"question_id": 7, "image_id": "ab", "question": "what brand?", "answers": ["Nokia"] * 10}]
        files.json(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
        ocr = [{"image_id": "ab", "ocr_tokens": ["NOKIA", "12:01"]}]
        files.json(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": ocr})
        files.picture(tmp_path / "train_images" / "ab.jpg")
        return tmp_path

    def test_prompts_made_are_the_prompts_published(self, files, folder):
        (made,) = TextVqa().read(Data(folder))
        assert made.question == f"What brand?\nReference OCR token: NOKIA, 12:01{SHORT}"
        files.jsonl(
            folder / "llava_textvqa_val_v051_ocr.jsonl",
            [{"question_id": "ab", "image": "ab.jpg", "text": made.question, "category": "default"}],
        )
        assert TextVqa().read(Data(folder)) == [made]
        assert TextVqa(ocr=False).read(Data(folder))[0].question == f"What brand?{SHORT}"

    def test_the_answer_is_weighed_by_evalai_s_rule(self, folder):
        (sample,) = TextVqa().read(Data(folder))
        assert TextVqa().mark(sample, said("the nokia.")).score == 1


class TestGqa:
    QUESTION = {"imageId": "n1", "question": "Is it red?", "answer": "yes", "types": {"structural": "verify"}}  # noqa: RUF012

    def test_questions_scores_and_predictions(self, files, tmp_path, evaluate_tiny):
        files.picture(tmp_path / "data" / "images" / "n1.jpg")
        questions = {"201": self.QUESTION, "202": {**self.QUESTION, "types": {"structural": "query"}}}
        files.json(tmp_path / "data" / "testdev_balanced_questions.json", questions)
        outcome = evaluate_tiny("gqa", tmp_path / "data")
        assert {"open/accuracy", "binary/accuracy", "query/accuracy"} < set(outcome.summary["metrics"])
        rows = json.loads((outcome.folder / "gqa-predictions.json").read_text())
        assert [row["questionId"] for row in rows] == ["201", "202"]

    @pytest.mark.parametrize(("text", "score"), [("Yes.", 1), ("yes", 1), ("yes it is", 0), ("", 0), ("YES..", 1)])
    def test_exact_match(self, text, score):
        assert Gqa().mark(Sample("1", "?", None, "yes"), said(text)).score == score


class TestMme:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [("Yes", "yes"), (" no", "no"), ("No, it is", "no"), ("Yes.", "yes"), ("It is", "other"), ("", "other"),
         ("nose", "no"), ("The answer is yes", "other")],
    )  # fmt: skip
    def test_the_first_four_characters_decide(self, text, answer):
        assert mme_answer(text) == answer

    @pytest.fixture
    def folder(self, files, tmp_path):
        for category, layout in (("count", "flat"), ("OCR", "folders")):
            for name in ("a", "b"):
                text = f"Is it {name}? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
                base = tmp_path / category
                picture, notes = (base, base) if layout == "flat" else (base / "images", base / "questions_answers_YN")
                files.picture(picture / f"{name}.jpg")
                notes.mkdir(parents=True, exist_ok=True)
                (notes / f"{name}.txt").write_text(text)
        return tmp_path

    def test_both_layouts_and_both_prompts(self, folder):
        samples = Mme().read(Data(folder))
        assert [s.id for s in samples[:3]] == ["count/a/1", "count/a/2", "count/b/1"]
        assert samples[0].question == f"Is it a?{SHORT}"
        assert Mme(suffix=None).read(Data(folder))[0].question == "Is it a? Please answer yes or no."
        assert len({s.image_name for s in samples}) == 4

    def test_accuracy_and_accuracy_plus_add_up(self, folder, make_record):
        task = Mme()
        answers = iter(("Yes", "No", "Yes", "Yes", "Yes", "No", "Yes", "maybe"))
        records = []
        for sample in task.read(Data(folder)):
            mark = task.mark(sample, said(next(answers)))
            fields = {"id": sample.id, "image": sample.image_name, "facts": sample.facts, "detail": mark.detail}
            records.append(make_record(sample.expected, mark.score, **fields))
        metrics = task.summarize(records)
        assert metrics["count"].value == pytest.approx(75 + 50)
        assert metrics["OCR"].value == pytest.approx(75 + 50)
        assert metrics["perception"].value == pytest.approx(250)
        assert metrics["other_answers"].value == 1
        assert "cognition" not in metrics

    def test_a_line_without_an_answer_is_named(self, folder):
        (folder / "count" / "a.txt").write_text("Is it?\tYes\nIs it?\n")
        with pytest.raises(InputError, match=r"a\.txt:2: .*expected a question, a tab"):
            Mme().read(Data(folder))


PROBLEM = {
    "question": "Which is bigger?", "choices": ["a whale", "a mouse"], "answer": 0, "hint": "", "image": None,
    "subject": "natural science", "grade": "grade3", "lecture": "", "solution": "",
}  # fmt: skip


class TestScienceQa:
    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("B", "B"), ("B. a mouse", "B"), ("Because so. The answer is A.", "A"), ("b", FAILED), ("", FAILED),
            ("The answer is A. No, the answer is B. The answer is B.", FAILED), ("E", FAILED), ("A mouse", FAILED),
            ("The answer is C.", FAILED),
        ],
    )  # fmt: skip
    def test_a_letter_is_read_as_by_llava(self, text, letter):
        assert read_letter(text, 2) == letter

    @pytest.fixture
    def folder(self, files, tmp_path):
        problems = {
            "1": PROBLEM,
            "2": {**PROBLEM, "hint": "Look  here.", "image": "image.png", "subject": "social science"},
            "3": {**PROBLEM, "grade": "grade9", "subject": "language science", "image": "image.png"},
        }
        files.json(tmp_path / "problems.json", problems)
        files.json(tmp_path / "pid_splits.json", {"test": ["1", "2", "3"]})
        for number in ("2", "3"):
            files.picture(tmp_path / "images" / "test" / number / "image.png", int(number))
        return tmp_path

    def test_a_small_split_has_its_pictures_among_those_of_the_large_one(self, files, folder):
        files.json(folder / "pid_splits.json", {"test": ["1", "2", "3"], "minitest": ["2"]})
        (sample,) = ScienceQa(split="minitest").read(Data(folder))
        assert sample.image == folder / "images" / "test" / "2" / "image.png"

    def test_the_three_formats(self, folder):
        texts = {name: ScienceQa(name).read(Data(folder))[1].question for name in ("qcm-lea", "qcm-ale", "cqm-a")}
        options = "Options: (A) a whale (B) a mouse"
        assert texts["qcm-lea"] == f"Which is bigger?\nContext: Look here.\n{options}"
        assert texts["qcm-ale"].startswith(texts["qcm-lea"] + "\n")
        assert texts["cqm-a"] == (
            f"Context: Look here.\nQuestion: Which is bigger?\n{options}\n"
            "Answer with the option's letter from the given choices directly."
        )
        assert "Context: N/A" in ScienceQa().read(Data(folder))[0].question

    def test_llava_s_own_questions_are_taken(self, files, folder):
        rows = [{"id": "1", "conversations": [{"from": "human", "value": "<image>\nWhich?\nA. whale\nB. mouse"}]}]
        files.json(folder / "llava_test_CQM-A.json", rows)
        assert ScienceQa().read(Data(folder))[0].question.startswith("Which?\nA. whale\nB. mouse\nAnswer with")
        files.json(folder / "llava_test_QCM-LEA.json", [{**rows[0], "id": "2"}])
        assert ScienceQa("qcm-lea").read(Data(folder))[1].question == "Which?\nA. whale\nB. mouse"

    def test_groups_of_a_worked_example(self, folder, make_record):
        task = ScienceQa()
        records = []
        for sample, answer in zip(task.read(Data(folder)), ("A", "B", "?"), strict=True):
            mark = task.mark(sample, said(answer))
            records.append(make_record("A", mark.score, id=sample.id, facts=sample.facts, detail=mark.detail))
        values = {name: metric.value for name, metric in task.summarize(records).items()}
        assert values == {
            "accuracy": pytest.approx(1 / 3), "NAT/accuracy": 1, "SOC/accuracy": 0, "LAN/accuracy": 0,
            "TXT/accuracy": 0, "IMG/accuracy": 0, "NO/accuracy": 1, "G1-6/accuracy": 0.5, "G7-12/accuracy": 0,
            "failed": 1,
        }  # fmt: skip

    def test_a_number_without_a_problem_is_named(self, files, folder):
        files.json(folder / "pid_splits.json", {"test": ["1", "77"]})
        with pytest.raises(InputError, match=r"problems\.json:77: no problem"):
            ScienceQa().read(Data(folder))
