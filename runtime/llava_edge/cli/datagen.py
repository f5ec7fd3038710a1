"""``llava-edge datagen``: instructions from a language model, captions that are chosen, pictures that are drawn."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli import debug_option, terminal
from llava_edge.errors import InputError, LlavaEdgeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llava_edge.train_gpu.datagen.generate import Statistics
    from llava_edge.train_gpu.datagen.picture_sets import Made
    from llava_edge.train_gpu.datagen.tasks import Kind


@click.group(short_help="Make training data: instructions, captions, drawn pictures.")
def datagen() -> None:
    """Make training data: instructions from captions and boxes, chosen captions, drawn pictures."""


def _writer(max_tokens: int) -> Callable[[Any], Any]:
    """The options of a command that asks a language model, with its longest answer."""
    return _together(
        click.option("--llm", required=True, metavar="ENDPOINT|GGUF",
                     help="Address of an OpenAI-compatible API, as http://localhost:8080/v1, or a GGUF file."),
        click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True,
                     help="LLaVA JSON to write; rejects go to OUTPUT.rejects.jsonl."),
        click.option("--llm-model", metavar="NAME", help="The model's name at the endpoint."),
        click.option("--api-key-env", default="OPENAI_API_KEY", show_default=True,
                     help="Environment variable that holds an endpoint's key."),
        click.option("--max-tokens", type=click.IntRange(1), default=max_tokens, show_default=True,
                     help="Longest answer."),
        click.option("--max-tokens-total", type=click.IntRange(1), help="Stop before more than these are spent."),
        click.option("--concurrency", type=click.IntRange(1, 256), default=4, show_default=True,
                     help="Requests at a time; a local model answers one at a time."),
        click.option("--retries", type=click.IntRange(0), default=6, show_default=True,
                     help="Further attempts where an endpoint fails."),
        click.option("--timeout", type=click.FloatRange(1), default=120, show_default=True,
                     help="Seconds that an endpoint may take for an answer."),
        click.option("--temperature", type=click.FloatRange(0, 2), default=0.7, show_default=True),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--resume", is_flag=True, help="Go on with what a stopped run left."),
        click.option("--quiet", is_flag=True, help="Show no progress."),
        click.option("--json", "as_json", is_flag=True, help="Print the statistics as JSON."),
        debug_option,
    )  # fmt: skip


def _together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_existing = click.Path(exists=True, dir_okay=False, path_type=Path)
_options = _together(
    click.option("--captions", type=_existing, required=True,
                 help="Captions of Flickr8k or COCO, or JSON lines with image, captions and instances."),
    click.option("--boxes", type=_existing, help="COCO instances, or JSON lines with instances."),
    click.option("--split", default="train", show_default=True, help="Split of captions by split."),
    click.option("--limit", type=click.IntRange(1), help="Only the first so many pictures."),
    _writer(max_tokens=512),
)  # fmt: skip


@datagen.command(short_help="Questions and short answers about each picture.")
@_options
def conversation(**options: Any) -> None:
    """Write a conversation about each picture, from its captions.

    \b
    llava-edge datagen conversation --captions flickr8k-captions.json --split dev --llm model.gguf -o talks.json
    """
    _from_pictures("conversation", **options)


@datagen.command(short_help="A detailed description of each picture.")
@_options
def detail(**options: Any) -> None:
    """Write a detailed description of each picture, from its captions and boxes."""
    _from_pictures("detail", **options)


@datagen.command(short_help="A question that takes thought about each picture.")
@_options
def reasoning(**options: Any) -> None:
    """Write a question that takes reasoning, and its answer, about each picture, from its captions and boxes."""
    _from_pictures("reasoning", **options)


@datagen.command(short_help="A language model's own answers without a picture.")
@click.option("--count", type=click.IntRange(1), default=600, show_default=True, help="Different prompts to ask.")
@_writer(max_tokens=96)
def chat(count: int, seed: int, **options: Any) -> None:
    """Ask a language model questions without a picture, for a training to keep what it says to them.

    Nothing else is sent: the system message is that of the model's own chat template, if it has one. An answer that
    was cut off ends with its last full sentence.

    \b
    llava-edge datagen chat --llm original.gguf -o chat.json
    """
    from llava_edge.train_gpu.datagen.chat import chat as ask

    _run("talks", lambda llm, output, **common: ask(count, llm, output, seed=seed, **common), seed=seed, **options)


def _from_pictures(
    kind: Kind, *, captions: Path, boxes: Path | None, split: str, limit: int | None, **options: Any
) -> None:
    from llava_edge.train_gpu.datagen.generate import generate
    from llava_edge.train_gpu.datagen.scenes import read_scenes

    scenes = read_scenes(captions, boxes, split)[:limit]
    _run("pictures", functools.partial(generate, kind, scenes), **options)


def _run(
    things: str,
    make: Callable[..., Statistics],
    *,
    llm: str,
    output: Path,
    llm_model: str | None,
    api_key_env: str,
    max_tokens: int,
    retries: int,
    timeout: float,
    temperature: float,
    seed: int,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Let a language model answer all that ``make`` asks it."""
    from llava_edge.train_gpu.datagen.llm import open_llm

    writer = open_llm(
        llm, model=llm_model, api_key=os.environ.get(api_key_env), temperature=temperature, seed=seed,
        retries=retries, timeout_seconds=timeout,
    )  # fmt: skip
    try:
        statistics = make(
            writer, output, max_tokens=max_tokens, told=_Teller(things, quiet),
            settings={"llm": llm, "model": llm_model, "seed": seed, "temperature": temperature, "max": max_tokens},
            **options,
        )  # fmt: skip
    finally:
        writer.close()
    _tell(statistics, things, output, as_json)


class _Teller:
    """Shows how far it is, at most every two seconds."""

    def __init__(self, things: str, quiet: bool) -> None:
        self.things = things
        self.quiet = quiet
        self.began = self.last = time.monotonic()

    def __call__(self, progress: Callable[[], Statistics]) -> None:
        now = time.monotonic()
        if self.quiet or now - self.last < 2:
            return
        self.last = now
        statistics = progress()
        done = statistics.accepted + statistics.rejected
        left = (now - self.began) / max(done, 1) * statistics.left
        terminal.note(
            f"{done} of {statistics.pictures} {self.things}, {statistics.rejected} rejected, "
            f"{statistics.failed} failed, {statistics.tokens:,} tokens, about {left:.0f} s left"
        )


def _tell(statistics: Statistics, things: str, output: Path, as_json: bool) -> None:
    if as_json:
        values = dataclasses.asdict(statistics)
        terminal.data(json.dumps({"output": str(output), things: values.pop("pictures"), **values}) + "\n")
    else:
        terminal.data(f"{output}\n")
        terminal.note(
            f"{statistics.accepted} of {statistics.pictures} {things} accepted with {statistics.questions} questions, "
            f"{statistics.rejected} rejected, {statistics.tokens:,} tokens"
        )
        for reason, count in statistics.reasons.items():
            terminal.note(f"  {count} x {reason}")
    if statistics.failed:
        name, why = next(iter(statistics.errors.items()))
        raise LlavaEdgeError(
            f"{statistics.failed} of {statistics.pictures} {things} failed; {name}: {why}",
            hint="Run it again with --resume to ask for these alone.",
        )
    if statistics.stopped:
        terminal.note(f"{statistics.stopped}; {statistics.left} {things} are left for --resume with a higher limit")


@datagen.command("filter-captions", short_help="Thin out captions that all speak of the same things.")
@click.argument("captions", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True,
              help="LLaVA JSON for stage 1 to write.")  # fmt: skip
@click.option("--split", default="train", show_default=True, help="Split of captions by split.")
@click.option("--min-count", type=click.IntRange(1), default=3, show_default=True,
              help="Drop noun phrases of fewer captions.")  # fmt: skip
@click.option("--max-per-phrase", type=click.IntRange(1), default=100, show_default=True,
              help="Captions that one noun phrase brings at most.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the statistics as JSON.")
@debug_option
def filter_captions(
    captions: Path,
    output: Path,
    split: str,
    min_count: int,
    max_per_phrase: int,
    seed: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Choose CAPTIONS (of Flickr8k or COCO) balanced over their noun phrases, as LLaVA's CC-595K was from CC3M.

    \b
    llava-edge datagen filter-captions captions_train2017.json -o stage1.json
    """
    from llava_edge.train_gpu.datagen.balance import PhraseTagger, balance
    from llava_edge.train_gpu.datagen.generate import conversation, write_json
    from llava_edge.train_gpu.samples import PictureRef, from_caption, read_captions

    listed = list(read_captions(captions, split))
    if not listed:
        raise InputError(f"{captions} has no captions")
    with click.progressbar(length=len(listed), label="captions", file=sys.stderr, hidden=quiet) as bar:
        chosen = balance(
            [caption for _, _, caption in listed], PhraseTagger(),
            min_count=min_count, max_per_phrase=max_per_phrase, seed=seed, told=lambda done: bar.update(1),
        )  # fmt: skip
    samples = []
    for name, number, caption in (listed[index] for index in chosen.kept):
        ((question, answer),) = from_caption(f"{name}#{number}", caption, PictureRef(name, Path(name))).turns
        samples.append({"id": f"{name}#{number}", "image": name, "conversations": conversation([(question, answer)])})
    write_json(output, samples)
    counts = {"captions": len(listed), "kept": len(samples), "phrases": chosen.phrases, "phrases_used": chosen.used}
    terminal.data(json.dumps({"output": str(output), **counts}) + "\n" if as_json else f"{output}\n")
    if not as_json:
        terminal.note(
            f"{len(samples)} of {len(listed)} captions kept, by {chosen.used} of {chosen.phrases} noun phrases"
        )


@datagen.command("best-captions", short_help="Let a checkpoint draw captions, and keep those that agree with people's.")
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True,
              help="The samples, with a source SOURCE-best more.")  # fmt: skip
@click.option("--samples", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
              help="LLaVA samples by source, as a recipe's data.samples.")  # fmt: skip
@click.option("--features", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
              help="The pictures' features, as a recipe's data.features.")  # fmt: skip
@click.option("--source", required=True, help="The source whose pictures and questions are taken.")
@click.option("--references", required=True, help="The source whose answers are people's captions.")
@click.option("--format", "prompt_format", default="chatml", show_default=True, help="A recipe's data.format.")
@click.option("--image-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens of a picture.")
@click.option("--draws", type=click.IntRange(1), default=5, show_default=True, help="Captions drawn of each picture.")
@click.option("--keep", type=click.IntRange(1), default=2, show_default=True, help="Captions kept of each, at most.")
@click.option("--min-score", type=click.FloatRange(0), default=0.25, show_default=True,
              help="CIDEr-D that a caption has to have, as 1.0 is printed in papers as 100.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(0, 2, min_open=True), default=0.7, show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Only the first so many pictures.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the pictures that a stopped run left.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the statistics as JSON.")
@debug_option
def best_captions(
    checkpoint: Path,
    output: Path,
    samples: Path,
    features: Path,
    source: str,
    references: str,
    prompt_format: str,
    image_tokens: int,
    draws: int,
    keep: int,
    min_score: float,
    temperature: float,
    limit: int | None,
    seed: int,
    resume: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Let CHECKPOINT draw captions of its training pictures, and keep those with the highest CIDEr-D.

    To be trained on in a further stage, beside people's captions.

    \b
    llava-edge datagen best-captions nano-full --samples samples.json --features features \\
        --source flickr8k-short --references flickr8k-captions -o samples-best.json
    """
    from llava_edge.bench.tasks.cider import CiderD
    from llava_edge.train_gpu.datagen import draws as drawing
    from llava_edge.train_gpu.datagen.generate import Progress, write_json
    from llava_edge.train_gpu.samples import read_asked, read_json

    values = read_json(samples)
    every = read_asked(values, source, references)
    asked = every[:limit]
    drawer = drawing.Drawer(checkpoint, features, prompt_format, image_tokens, seed)
    settings = {
        "checkpoint": str(checkpoint.resolve()), "pictures": [one.picture for one in asked], "draws": draws,
        "image_tokens": image_tokens, "temperature": temperature, "seed": seed, "format": prompt_format,
    }  # fmt: skip
    progress = Progress(output, settings, resume=resume)
    with click.progressbar(length=len(asked), label="pictures", file=sys.stderr, hidden=quiet) as bar:
        for done in drawing.draw_all(drawer, asked, progress, count=draws, temperature=temperature):
            bar.update(done - bar.pos)
    made = drawing.best_captions(asked, progress, CiderD([one.references for one in every]).score, keep, min_score)
    values[f"{source}-best"] = made.samples
    write_json(output, values)
    progress.finish()
    counts = {"pictures": made.pictures, "drawn": made.drawn, "kept": made.kept}
    means = {"drawn_score": made.drawn_score / made.drawn, "kept_score": made.kept_score / max(made.kept, 1)}
    terminal.data(json.dumps({"output": str(output), **counts, **means}) + "\n" if as_json else f"{output}\n")
    if not as_json:
        terminal.note(
            f"{made.kept} of {made.drawn} captions kept; CIDEr-D {means['kept_score']:.3f}, "
            f"of all that were drawn {means['drawn_score']:.3f}"
        )


@datagen.command(short_help="Draw pictures of which everything is known, with questions.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True,
              help="Folder to write; it must not exist yet.")  # fmt: skip
@click.option("--count", type=click.IntRange(1, 100_000), default=1000, show_default=True, help="Pictures to draw.")
@click.option("--icons", type=click.Path(exists=True, file_okay=False, path_type=Path), multiple=True,
              help="Unpacked npm package of icons, as @iconify-json/noto; may be repeated.")  # fmt: skip
@click.option("--photos", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder of photographs, as grounds of some pictures with icons.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the statistics as JSON.")
@debug_option
def scenes(
    output: Path, count: int, icons: tuple[Path, ...], photos: Path | None, seed: int, quiet: bool, as_json: bool
) -> None:
    """Draw pictures of coloured shapes, and of icons if there are any, with questions on what is in them.

    OUTPUT gets the pictures, samples.json to train on (a source of format llava), questions.json for
    `llava-edge eval questions` (number, colour, place, relation, size and presence), and boxes.json with what stands
    where.

    \b
    llava-edge datagen scenes --icons noto/package --photos photos --count 2000 -o scenes
    llava-edge eval questions scenes/questions.json
    """
    from random import Random

    from llava_edge.train_gpu.datagen import compose, picture_sets
    from llava_edge.train_gpu.datagen.icons import by_noun, read_icons

    known = by_noun([icon for package in icons for icon in read_icons(package)])
    if icons and not known:
        raise InputError(f"{icons[0]} has none of the things that scenes are made of, such as apple, car and dog")
    if photos and not compose.fits_on_photos(known):
        raise InputError(
            f"--photos needs --icons with {len(compose.SHAPES)} things or more that photographs don't often show",
            hint="Shapes alone would be lost among those of a photograph.",
        )
    grounds = picture_sets.read_photos(photos, Random(seed))
    _draw(output, count, lambda folder: picture_sets.write_scenes(folder, count, known, grounds, seed), quiet, as_json)


@datagen.command(short_help="Draw pictures of written words, with questions.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True,
              help="Folder to write; it must not exist yet.")  # fmt: skip
@click.option("--count", type=click.IntRange(1, 100_000), default=1000, show_default=True, help="Pictures to draw.")
@click.option("--words", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Text file of words to write, those of 3 to 8 letters a to z; else words of signs.")  # fmt: skip
@click.option("--font", "fonts", type=click.Path(exists=True, dir_okay=False, path_type=Path), multiple=True,
              help="Font to write with (TrueType, OpenType or WOFF), else Pillow's own; may be repeated.")  # fmt: skip
@click.option("--photos", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder of photographs, on which some of the signs stand.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the statistics as JSON.")
@debug_option
def signs(
    output: Path,
    count: int,
    words: Path | None,
    fonts: tuple[Path, ...],
    photos: Path | None,
    seed: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Draw a word in each picture, on a sign or on the bare ground; one sign of twelve is empty.

    OUTPUT gets the pictures, samples.json to train on (a source of format llava), questions.json for
    `llava-edge eval questions`, and boxes.json with where each letter stands.

    \b
    llava-edge datagen signs --font Lora.ttf --font Roboto.ttf --photos photos --count 2000 -o signs
    llava-edge eval questions signs/questions.json
    """
    from random import Random

    from llava_edge.train_gpu.datagen import picture_sets, signs

    text = signs.SIGN_WORDS if words is None else words.read_text(encoding="utf-8", errors="replace").split()
    known = signs.fit_words(text)
    if len(known) < 2:
        raise InputError(f"{words} has {len(known)} words of 3 to 8 letters from a to z; expected two or more")
    written = signs.read_fonts(fonts)
    if len(written) < len(fonts):
        raise InputError(f"{min(set(fonts) - set(written))} lacks some of the letters from a to z or A to Z")
    grounds = picture_sets.read_photos(photos, Random(seed))
    _draw(
        output, count,
        lambda folder: picture_sets.write_signs(folder, count, known, written, grounds, seed), quiet, as_json,
    )  # fmt: skip


def _draw(output: Path, count: int, write: Callable[[Path], Iterator[Made]], quiet: bool, as_json: bool) -> None:
    """Let ``write`` draw into a new folder, which is there whole or not at all, and tell how much it is."""
    if output.exists():
        raise InputError(f"{output} is there already", hint="Name a folder that does not exist, or remove this one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        with click.progressbar(length=count, label="pictures", file=sys.stderr, hidden=quiet) as bar:
            for made in write(work / "made"):
                bar.update(made.pictures - bar.pos)
        (work / "made").rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    terminal.data(json.dumps({"output": str(output), **dataclasses.asdict(made)}) + "\n" if as_json else f"{output}\n")
    if not as_json:
        terminal.note(f"{made.pictures} pictures, {made.samples} samples, {made.questions} questions")
