"""The tasks of ``llava-edge eval``, a command each. What a task does is in ``llava_edge.bench.tasks``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llava_edge.cli.eval_options import PATH, model_options, run_options, run_task, task_options


@click.command()
@click.argument("file", required=False, type=PATH)
@click.argument("folder", required=False, type=PATH)
@click.option("--data", metavar="DIR", type=PATH, help="A folder with captions and pictures, instead of the arguments.")
@click.option("--split", default="dev", show_default=True, help="The split, for files that have several.")
@click.option("--question", metavar="TEXT", help="What asks for the caption.")
@model_options
@run_options
def captions(
    file: Path | None, folder: Path | None, data: Path | None, split: str, question: str | None, **values: Any
) -> None:
    """CIDEr-D, BLEU-4 and ROUGE-L against the captions in FILE on the pictures in FOLDER.

    FILE is in COCO's format, in Flickr8k's, in Karpathy's, or {SPLIT: {NAME: [captions]}}.
    """
    if folder is not None:
        values["images"] = (*values["images"], folder)
    if data is None:
        if file is None or folder is None:
            raise click.UsageError("give FILE and FOLDER, or --data")
        data = file.parent
    run_task("captions", data, values, {"file": file} if file else {}, split=split, question=question)


@click.command()
@click.argument("folders", nargs=-1, type=PATH)
@click.option("--data", metavar="DIR", type=PATH, help="A folder of such folders, instead of the arguments.")
@click.option("--question", metavar="TEXT", help="What is asked.")
@model_options
@run_options
def animals(folders: tuple[Path, ...], data: Path | None, question: str | None, **values: Any) -> None:
    """Share of the pictures in FOLDERS of which the model says the folder's name ("cat", "dog") and no other's."""
    if not folders and data is None:
        raise click.UsageError("give FOLDERS, or --data")
    run_task("animals", data or Path(), values, {"folders": folders}, question=question)


suffix_option = click.option(
    "--suffix",
    metavar="TEXT",
    help="What follows each question.  [default: LLaVA 1.5's request for a short answer]",
)


@click.command()
@suffix_option
@task_options
def pope(data: Path, suffix: str | None, **values: Any) -> None:
    """Objects that aren't there: F1, accuracy, precision, recall and share of yes on POPE's three splits.

    DIR has coco_pope_{random,popular,adversarial}.json and the pictures (val2014, images, or --images).
    """
    run_task("pope", data, values, suffix=suffix)


@click.command("easy-vqa")
@suffix_option
@click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True)
@task_options
def easy_vqa(data: Path, suffix: str | None, split: str, **values: Any) -> None:
    """Coloured shapes: the questions of easy-VQA. DIR is the folder 'data' of the package easy-vqa."""
    run_task("easy-vqa", data, values, suffix=suffix, split=split)


@click.command()
@click.option(
    "--by",
    type=click.Choice(["letter", "text"]),
    default="letter",
    show_default=True,
    help="Compare the probabilities of the letters, or of the choices' own words.",
)
@click.option("--suffix", metavar="TEXT", help="What follows each question.")
@task_options
def choices(data: Path, by: str, suffix: str | None, **values: Any) -> None:
    """Multiple choice by probability; nothing is generated.

    DIR has choices.jsonl with lines {"image", "question", "choices", "answer"}.
    """
    run_task("choices", data, values, by=by, suffix=suffix)


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@suffix_option
@model_options
@run_options
def questions(file: Path, suffix: str | None, **values: Any) -> None:
    """Your own questions with known answers: accuracy of all and by kind, and F1 of kinds that are all yes or no.

    FILE is a JSON list, or lines, of {"image", "question", "answer"}, if wanted with a "kind"; "answer" may be a list
    of all that is right. The pictures are beside FILE, or in --images.
    """
    run_task("questions", file.parent, values, {"file": file}, suffix=suffix)


@click.command()
@click.option("--question", metavar="TEXT", help="What asks for the description.")
@click.option("--synonyms", metavar="FILE", type=PATH, help="Words for the objects; a line an object.")
@task_options
def chair(data: Path, question: str | None, synonyms: Path | None, **values: Any) -> None:
    """Objects in descriptions that the pictures don't show (CHAIR).

    DIR has COCO's instances*.json, captions*.json or both, and the pictures.
    """
    run_task("chair", data, values, {"synonyms": synonyms} if synonyms else {}, question=question)


@click.command()
@click.option(
    "--format",
    type=click.Choice(["cqm-a", "qcm-lea", "qcm-ale"]),
    default="cqm-a",
    show_default=True,
    help="A letter (LLaVA 1.5); reasons, then the answer (v1); the answer, then reasons.",
)
@click.option("--split", type=click.Choice(["test", "val", "train", "minitest", "minival"]), default="test")
@task_options
def scienceqa(data: Path, format: str, split: str, **values: Any) -> None:
    """ScienceQA by subject, modality and grade; 'eval judge' makes the ensembles with a judge.

    DIR has problems.json, pid_splits.json and images/SPLIT/ID/image.png.
    """
    run_task("scienceqa", data, values, format=format, split=split)


@click.command()
@suffix_option
@task_options
def mme(data: Path, suffix: str | None, **values: Any) -> None:
    """MME's perception and cognition scores. DIR is the release's folder, a category a folder."""
    run_task("mme", data, values, suffix=suffix)


@click.command()
@suffix_option
@click.option(
    "--split",
    type=click.Choice(["val2014", "train2014", "test2015", "test-dev2015"]),
    default="val2014",
    show_default=True,
)
@task_options
def vqav2(data: Path, suffix: str | None, split: str, **values: Any) -> None:
    """VQAv2: accuracy where there are annotations, and the file to submit.

    DIR has v2_OpenEnded_mscoco_SPLIT_questions.json, v2_mscoco_SPLIT_annotations.json and the pictures.
    """
    run_task("vqav2", data, values, suffix=suffix, split=split)


@click.command()
@suffix_option
@click.option("--split", default="testdev_balanced", show_default=True)
@task_options
def gqa(data: Path, suffix: str | None, split: str, **values: Any) -> None:
    """GQA: exact match, of all, binary and open questions. DIR has SPLIT_questions.json and images/."""
    run_task("gqa", data, values, suffix=suffix, split=split)


@click.command()
@suffix_option
@click.option("--ocr/--no-ocr", default=True, show_default=True, help="OCR tokens in the prompt.")
@task_options
def textvqa(data: Path, suffix: str | None, ocr: bool, **values: Any) -> None:
    """TextVQA 0.5.1. DIR has TextVQA_0.5.1_val.json, the OCR tokens or LLaVA's questions, and train_images/."""
    run_task("textvqa", data, values, suffix=suffix, ocr=ocr)


@click.command("llava-bench")
@task_options
def llava_bench(data: Path, **values: Any) -> None:
    """LLaVA-Bench (COCO or In-the-Wild): the answers; 'eval judge' scores them.

    DIR has the published questions, reference answers and contexts, and the pictures.
    """
    run_task("llava-bench", data, values)
