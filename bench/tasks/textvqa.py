"""TextVQA 0.5.1 with OCR tokens in the prompt, as LLaVA 1.5 reports it (Singh et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_edge.bench.tasks.asking import Said
from llava_edge.bench.tasks.reading import Data, identifier
from llava_edge.bench.tasks.samples import Mark, Record, Sample
from llava_edge.bench.tasks.task import SHORT_ANSWER, BaseTask, Metrics
from llava_edge.bench.tasks.vqa_accuracy import evalai_accuracy
from llava_edge.bench.tasks.vqav2 import mean_score
from llava_edge.errors import InputError
from llava_edge.strict_json import Fields

OCR_REFERENCE = "\nReference OCR token: "


class TextVqa(BaseTask):
    """Reads ``TextVQA_0.5.1_val.json`` with either LLaVA's questions (``llava_textvqa_val_v051_ocr.jsonl``), taken as
    they are, or the OCR tokens (``TextVQA_Rosetta_OCR*_val.json``), from which the same prompts are made.
    """

    def __init__(self, suffix: str = SHORT_ANSWER, ocr: bool = True) -> None:
        self._suffix = suffix
        self._ocr = ocr

    def read(self, data: Data) -> list[Sample]:
        """The questions of the validation split."""
        path = data.require("**/TextVQA_0.5*_val.json")
        annotations = data.list_of(path, "data")
        prompts = data.find("**/llava_textvqa_val*ocr.jsonl", optional=True) if self._ocr else None
        if prompts is not None:
            known = dict(data.entries(path, annotations, _annotation))
            return data.jsonl(prompts, lambda fields: self._published(data, fields, known))
        tokens = self._tokens(data) if self._ocr else {}
        return data.entries(path, annotations, lambda fields: self._made(data, fields, tokens))

    def _published(self, data: Data, fields: Fields, known: dict[tuple[str, str], tuple[str, list[str]]]) -> Sample:
        image, text = identifier(fields, "question_id"), fields.text("text")
        key = (image, text.split("\n")[0].lower())
        if key not in known:
            raise InputError(f"no annotation has the picture {image} and the question {key[1]!r}")
        number, answers = known[key]
        return Sample(number, text, self._picture(data, image), answers)

    def _made(self, data: Data, fields: Fields, tokens: dict[str, list[str]]) -> Sample:
        (image, _), (number, answers) = _annotation(fields)
        question = fields.text("question").capitalize()  # as in LLaVA's file
        if self._ocr:
            if image not in tokens:
                raise InputError(f"image_id is {image}, for which there are no OCR tokens")
            question += OCR_REFERENCE + ", ".join(tokens[image])
        return Sample(number, question + self._suffix, self._picture(data, image), answers)

    def _picture(self, data: Data, image: str) -> Path:
        return data.picture(f"{image}.jpg", "train_images", "train_val_images/train_images")

    def _tokens(self, data: Data) -> dict[str, list[str]]:
        path = data.require("**/TextVQA_Rosetta_OCR*_val.json", "**/llava_textvqa_val*ocr.jsonl")
        return dict(
            data.entries(
                path, data.list_of(path, "data"), lambda f: (identifier(f, "image_id"), list(f.texts("ocr_tokens")))
            )
        )

    def mark(self, sample: Sample, said: Said) -> Mark:
        """Accuracy by EvalAI's rule."""
        return Mark(evalai_accuracy(said.text, sample.expected))

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """The mean accuracy."""
        return {"accuracy": mean_score(records)}


def _annotation(fields: Fields) -> tuple[tuple[str, str], tuple[str, list[str]]]:
    answers = list(fields.texts("answers"))
    if not answers:
        raise InputError("answers is empty")
    key = (identifier(fields, "image_id"), fields.text("question").lower())
    return key, (identifier(fields, "question_id"), answers)
