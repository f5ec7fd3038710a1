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
@click.option("--question", metavar="TEXT", help="What asks for the description.")
@click.option("--synonyms", metavar="FILE", type=PATH, help="Words for the objects; a line an object.")
@task_options
def chair(data: Path, question: str | None, synonyms: Path | None, **values: Any) -> None:
    """Objects in descriptions that the pictures don't show (CHAIR).

    DIR has COCO's instances*.json, captions*.json or both, and the pictures.
    """
    run_task("chair", data, values, {"synonyms": synonyms} if synonyms else {}, question=question)
