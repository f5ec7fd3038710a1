"""``llava-edge eval``: ask a model about pictures with known answers, and score what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli import debug_option, terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llava_edge.bench.tasks.evaluate import Answer, Question


@click.group("eval", short_help="Score a model on pictures with known answers.")
def evaluate() -> None:
    """Score a model, greedily, on pictures with known answers."""


def _options(command: Any) -> Any:
    for option in (
        debug_option,
        click.option("--quiet", is_flag=True, help="Show no progress."),
        click.option("--answers", type=click.Path(path_type=Path), help="Keep every answer, as JSON lines."),
        click.option("--threads", type=click.IntRange(1), help="Threads; default: one a core."),
        click.option("--image-tokens", type=click.IntRange(1), help="Visual tokens a picture."),
        click.option("--limit", type=click.IntRange(2), help="Only the first so many pictures."),
        click.option("--model", default="nano", show_default=True, help="A name or a bundle."),
    ):
        command = option(command)
    return command


@evaluate.command()
@click.argument("captions_file", type=click.Path(path_type=Path))
@click.argument("images", type=click.Path(path_type=Path))
@click.option("--split", default="dev", show_default=True)
@_options
def captions(captions_file: Path, images: Path, split: str, **options: Any) -> None:
    """CIDEr-D on IMAGES, with the reference captions in CAPTIONS_FILE ({SPLIT: {NAME: [captions]}})."""
    from llava_edge.bench.tasks.evaluate import read_captions, score_captions

    _run(read_captions(captions_file, split, images), score_captions, max_tokens=40, **options)


@evaluate.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@_options
def animals(folders: tuple[Path, ...], **options: Any) -> None:
    """Share of the pictures in FOLDERS of which the model says the folder's name ("cat", "dog") and no other's."""
    from llava_edge.bench.tasks.evaluate import read_classes, score_classes

    _run(read_classes(folders), score_classes, max_tokens=24, **options)


def _run(
    questions: Sequence[Question],
    score: Callable[[Sequence[Answer]], dict[str, Any]],
    *,
    max_tokens: int,
    model: str,
    limit: int | None,
    image_tokens: int | None,
    threads: int | None,
    answers: Path | None,
    quiet: bool,
) -> None:
    import llava_edge
    from llava_edge.bench.tasks.evaluate import ask_all, write_answers

    questions = questions[:limit]
    with (
        llava_edge.load(model, image_tokens=image_tokens, n_threads=threads) as loaded,
        click.progressbar(questions, label=loaded.name, file=sys.stderr, hidden=quiet) as progress,
    ):
        said = ask_all(loaded, progress, max_tokens=max_tokens)
        summary = {"model": loaded.name, "image_tokens": loaded.image_tokens, **score(said)}
    if answers is not None:
        write_answers(answers, said)
    terminal.data(json.dumps(summary) + "\n")
