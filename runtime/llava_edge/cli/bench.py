"""``llava-edge bench``: what a model costs in time, memory and quality, on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli import debug_option, terminal
from llava_edge.cli.model_options import image_tokens_option, threads_option, together, vision_backend_option

if TYPE_CHECKING:
    from llava_edge.bench.record import Result
    from llava_edge.bench.speed.measure import SpeedSettings

PATH = click.Path(path_type=Path)


@click.group("bench", short_help="Measure speed, memory and what quantisation costs.")
def bench() -> None:
    """Measure models on this machine: speed, memory, and what quantisation costs."""


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 0,512") from None


def _numbers_or_none(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    return None if value is None else _numbers(ctx, parameter, value)


def _names(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


_common = together(
    threads_option,
    image_tokens_option,
    vision_backend_option,
    click.option("--quiet", is_flag=True, help="Show no progress."),
    debug_option,
)
_outputs = together(
    click.option("--json", "as_json", is_flag=True, help="Print the whole record as JSON, with the raw samples."),
    click.option("-o", "--output", metavar="FILE", type=PATH, help="Keep the record, for `bench compare`."),
)
_speed_options = together(
    click.option(
        "--pp", "prompt_tokens", type=click.IntRange(1), default=512, show_default=True, help="Prompt length."
    ),
    click.option("--tg", "answer_tokens", type=click.IntRange(1), default=64, show_default=True, help="Answer length."),
    click.option(
        "--depth",
        "depths",
        metavar="N,N…",
        callback=_numbers,
        default="0,512",
        show_default=True,
        help="Where answers begin.",
    ),
    click.option("--cold-starts", type=click.IntRange(0), default=3, show_default=True, help="Fresh processes."),
    click.option("--repetitions", type=click.IntRange(1), help="In a single pass, the most samples; default: 30."),
    click.option(
        "--max-seconds", type=click.FloatRange(0.01), help="In a single pass, the most time a figure; default: 10."
    ),
)


def _passes_option(default: int) -> Callable[[Any], Any]:
    return click.option(
        "--passes", type=click.IntRange(1), default=default, show_default=True,
        help="Go over all rows so often, each figure once a time; 1 repeats a figure instead.",
    )  # fmt: skip


def _settings(
    threads: int | None,
    prompt_tokens: int,
    answer_tokens: int,
    depths: tuple[int, ...],
    cold_starts: int,
    repetitions: int | None,
    max_seconds: float | None,
    passes: int,
) -> SpeedSettings:
    from llava_edge import native
    from llava_edge.bench.speed.measure import SpeedSettings
    from llava_edge.bench.speed.repeat import Limits

    if passes > 1 and (repetitions or max_seconds):
        raise click.UsageError(
            f"--repetitions and --max-seconds are of a single pass, here are {passes}; give --passes 1 with them"
        )
    repetitions = repetitions or 30
    limits = Limits(min(6, repetitions), repetitions, max_seconds or 10)
    used = threads or native.default_threads()
    return SpeedSettings(used, prompt_tokens, answer_tokens, depths, cold_starts, passes, limits)


@bench.command()
@click.argument("bundles", nargs=-1, metavar="[BUNDLE]…")
@click.option(
    "--synthetic", "shapes", multiple=True, metavar="SHAPE", help="Random weights of a shape; again for more."
)
@click.option("--types", callback=_names, default="Q4_K_M", show_default=True, help="Of synthetic language models.")
@click.option("--mmproj-type", metavar="TYPE", default="F16", show_default=True, help="Of synthetic vision towers.")
@_speed_options
@_passes_option(1)
@_outputs
@_common
def speed(
    bundles: tuple[str, ...],
    shapes: tuple[str, ...],
    types: tuple[str, ...],
    mmproj_type: str,
    image_tokens: int | None,
    vision_backend: str,
    as_json: bool,
    output: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Load, encode, prefill, decode, time to the first token and memory of each BUNDLE (default: nano).

    With --synthetic a model of a known shape with random weights is made and measured, so that speed is known before
    a download: llava-1.5-7b, llava-1.5-13b, llava-1.6-mistral-7b, mobilevlm-1.7b, mobilevlm-3b, nano.

    The machine's own rates of reading memory and of matrix products are measured in the same run, and the share of
    them that the model reaches is shown (MBU, MFU).

    \b
    llava-edge bench speed nano --depth 0,1024
    llava-edge bench speed --synthetic llava-1.5-7b --types Q4_K_M,Q4_0
    """
    from contextlib import ExitStack

    from llava_edge.bench.models import open_subject, open_subjects
    from llava_edge.bench.speed.measure import bench_speed
    from llava_edge.bench.speed.shapes import find_shape
    from llava_edge.bench.speed.synthetic import synthetic_bundle

    _check_output(output)
    names = list(bundles) or ([] if shapes else ["nano"])
    asked = [(find_shape(shape), _llm_type(kind)) for shape in shapes for kind in types]
    subjects, settings = open_subjects(names, image_tokens, vision_backend), _settings(**options)
    with ExitStack() as stack:
        for shape, kind in asked:
            folder = stack.enter_context(synthetic_bundle(shape, kind, mmproj_type, _say(quiet)))
            subjects.append(open_subject(folder, image_tokens, vision_backend))
        result = bench_speed(subjects, settings, _say(quiet), output)
    _show(result, as_json, output)


@bench.command()
@click.argument("bundle", required=False, metavar="[BUNDLE]")
@click.option("--peer", required=True, metavar="PROGRAM", type=PATH, help="llama.cpp's llama-mtmd-cli.")
@click.option("--peer-bench", metavar="PROGRAM", type=PATH, help="llama-bench; default: the one beside --peer.")
@click.option("--synthetic", "shape", metavar="SHAPE", help="Random weights of a shape instead of BUNDLE.")
@click.option("--type", "llm_type", default="Q4_K_M", show_default=True, help="Of a synthetic language model.")
@click.option(
    "--vision",
    type=click.Choice(["int8", "fp32", "none"]),
    default="int8",
    show_default=True,
    help="A synthetic tower for ONNX Runtime.",
)
@click.option("--image", "picture", required=True, metavar="FILE", type=PATH, help="The picture that is asked about.")
@click.option("--question", default="Describe", show_default=True, help="The first question.")
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True, help="Runs of ours and of the peer.")
@click.option("--tokens", "counts", metavar="N,N…", callback=_numbers_or_none, help="Visual tokens; default: three.")
@click.option("--tg", "answer_tokens", type=click.IntRange(1), default=32, show_default=True, help="Answer length.")
@click.option("--processes", is_flag=True, help="Whole processes of both too.")
@click.option("--threads", type=click.IntRange(1), help="Threads; default: one a core.")
@_outputs
@click.option("--quiet", is_flag=True, help="Show no progress.")
@debug_option
def ttft(
    bundle: str | None,
    peer: Path,
    peer_bench: Path | None,
    shape: str | None,
    llm_type: str,
    vision: str,
    picture: Path,
    question: str,
    pairs: int,
    counts: tuple[int, ...] | None,
    answer_tokens: int,
    processes: bool,
    threads: int | None,
    as_json: bool,
    output: Path | None,
    quiet: bool,
) -> None:
    """Time to the first token about a picture, beside llama.cpp's llama-mtmd-cli: runs alternate, files are the same.

    The peer's time is what it says of itself: image encode, evaluation of picture and text, one token. Loading is a
    row of its own. With -o the record is written after each pair, and the same command goes on with it.

    \b
    llava-edge bench ttft --peer build/bin/llama-mtmd-cli --synthetic llava-1.5-7b --image cat.jpg
    """
    from contextlib import ExitStack

    from llava_edge import native
    from llava_edge.bench.models import open_subject
    from llava_edge.bench.report import ttft as table
    from llava_edge.bench.speed.peer import check_program
    from llava_edge.bench.speed.shapes import find_shape
    from llava_edge.bench.speed.synthetic import add_onnx, synthetic_bundle
    from llava_edge.bench.speed.ttft import TtftSettings, bench_ttft, default_counts

    _check_output(output)
    if shape and bundle:
        raise click.UsageError("BUNDLE and --synthetic exclude each other")
    check_program(peer)
    beside = peer.parent / "llama-bench"
    program = check_program(peer_bench) if peer_bench else beside if beside.is_file() else None
    with ExitStack() as stack:
        if shape:
            wanted = find_shape(shape)
            folder = stack.enter_context(synthetic_bundle(wanted, _llm_type(llm_type), "F16", _say(quiet)))
            if vision != "none":
                add_onnx(wanted, folder, vision)
            subject = open_subject(folder)
        else:
            subject = open_subject(bundle or "nano")
        settings = TtftSettings(
            picture.absolute(),
            pairs,
            threads or native.default_threads(),
            counts or default_counts(subject),
            (question, question[::-1]),
            answer_tokens,
            processes,
        )
        result = bench_ttft(subject, peer.absolute(), program, settings, _say(quiet), output)
    _show(result, as_json, output, table.markdown)


_data_options = together(
    click.option("--data", metavar="FILE", type=PATH, help="Samples: LLaVA's JSON, captions, or a text (.txt)."),
    click.option("--images", metavar="DIR", type=PATH, help="Where its pictures are; default: beside it."),
    click.option("--split", default="dev", show_default=True, help="The part of a caption file."),
    click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="The most samples."),
)


@bench.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE…")
@click.option("--reference", required=True, metavar="BUNDLE", help="What the others are compared with, F16 as a rule.")
@_data_options
@click.option("--answer-tokens", type=click.IntRange(1), default=64, show_default=True, help="Scored of each answer.")
@click.option("--cache", metavar="DIR", type=PATH, help="Where reference logits are kept; default: with other caches.")
@_outputs
@_common
def quality(
    bundles: tuple[str, ...],
    reference: str,
    data: Path | None,
    images: Path | None,
    split: str,
    limit: int,
    answer_tokens: int,
    cache: Path | None,
    threads: int | None,
    image_tokens: int | None,
    vision_backend: str,
    as_json: bool,
    output: Path | None,
    quiet: bool,
) -> None:
    """How far each BUNDLE is from the reference on answers given pictures.

    KL divergence, agreement of the most likely token and perplexity along the known answers of the data, and the
    models' own answers, each with a 95 % interval over pictures. What the reference says is kept on disk.

    \b
    llava-edge bench quality my-Q4_K_M --reference my-F16 --data captions.json --images pictures
    """
    from llava_edge import native
    from llava_edge.bench.models import open_subject, open_subjects
    from llava_edge.bench.quality.data import read_data
    from llava_edge.bench.quality.measure import QualitySettings, bench_quality
    from llava_edge.paths import cache_dir

    _check_output(output)
    if data is None:
        raise click.UsageError("quality needs --data: answers that are known")
    subjects = open_subjects(list(bundles), image_tokens, vision_backend)
    base = open_subject(reference, image_tokens, vision_backend)
    settings = QualitySettings(threads or native.default_threads(), answer_tokens, text_chunks=limit)
    samples = read_data(data, images, split=split, limit=limit)
    result = bench_quality(subjects, base, samples, settings, cache or cache_dir() / "bench", _say(quiet), output)
    _show(result, as_json, output)


@bench.command()
@click.argument("source", type=PATH)
@click.option("-o", "--output", required=True, metavar="DIR", type=PATH, help="Where the report goes.")
@click.option("--types", callback=_names, help="Of the language model; default: nine from F16 to Q2_K.")
@click.option("--vision", "vision_types", callback=_names, help="Of the ONNX tower: fp32, int8, or both.")
@click.option("--mmproj-types", callback=_names, help="Of the tower that llama.cpp runs: F16, Q8_0 and others.")
@click.option(
    "--task", "tasks", metavar="NAME=DIR", multiple=True, help="A task of `eval` and its data, such as easy-vqa=DIR."
)
@click.option("--task-limit", type=click.IntRange(1), default=200, show_default=True, help="The most samples a task.")
@_data_options
@click.option("--memory-limit", type=click.FloatRange(0, min_open=True), default=4, show_default=True, help="In GB.")
@click.option("--keep", is_flag=True, help="Keep the bundles that were made.")
@click.option("--restart", is_flag=True, help="Forget what a stopped run has measured.")
@_speed_options
@_passes_option(6)
@click.option("--json", "as_json", is_flag=True, help="Print the whole record as JSON, with the raw samples.")
@_common
def quants(
    source: Path,
    output: Path,
    types: tuple[str, ...],
    vision_types: tuple[str, ...],
    mmproj_types: tuple[str, ...],
    tasks: tuple[str, ...],
    task_limit: int,
    data: Path | None,
    images: Path | None,
    split: str,
    limit: int,
    memory_limit: float,
    keep: bool,
    restart: bool,
    as_json: bool,
    image_tokens: int | None,
    vision_backend: str,
    quiet: bool,
    **options: Any,
) -> None:
    """What each type costs: SOURCE, an F16 bundle or a checkpoint, is made in every type and measured.

    Speed and memory, with --data quality on answers given pictures, and with --task what it scores. Every type of the
    language model is tried with every tower; without --vision and --mmproj-types these are the ones that the bundle
    runs with. The report in --output is a table with plots as Markdown, CSV, JSON and one page of HTML. A run that was
    stopped goes on with the same command.

    \b
    llava-edge bench quants my-F16 -o report --data captions.json --images pictures --task easy-vqa=easy_vqa/data
    """
    from llava_edge.errors import require_extra

    require_extra("bench", "matplotlib")
    from llava_edge.bench.quality.data import read_data
    from llava_edge.bench.quality.measure import QualitySettings
    from llava_edge.bench.quants.plan import DEFAULT_TYPES, QuantsSettings
    from llava_edge.bench.quants.run import bench_quants
    from llava_edge.bench.report.files import write_report

    measured = _settings(**options)
    settings = QuantsSettings(
        types or DEFAULT_TYPES,
        mmproj_types,
        measured,
        QualitySettings(measured.threads, text_chunks=limit),
        int(memory_limit * 1e9),
        vision_types,
    )
    if vision_backend != "auto":
        raise click.UsageError("--vision and --mmproj-types say what reads the pictures; leave --vision-backend away")
    asked = [_read_task(task, images, task_limit) for task in tasks]
    samples = read_data(data, images, split=split, limit=limit) if data else None
    if samples is None and not asked:
        terminal.note("warning: without --data and --task nothing tells what the types cost in quality")
    try:
        result = bench_quants(
            source,
            output,
            settings,
            samples,
            tasks=asked,
            image_tokens=image_tokens,
            keep=keep,
            restart=restart,
            say=_say(quiet),
        )
    except KeyboardInterrupt:
        terminal.note("stopped: the same command goes on from here")
        raise
    _show(result, as_json, None)
    written = write_report(result, output, f"What quantisation costs: {result.rows[0].name}")
    if not quiet:
        terminal.note(f"written: {', '.join(map(str, written))}")


@bench.command()
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@debug_option
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Two results side by side, with the ratio of SECOND to FIRST and its interval.

    What else differs (machine, settings, files) is pointed out on stderr.
    """
    import json

    from llava_edge.bench.record import read_result
    from llava_edge.bench.report import compare as comparing

    compared = comparing.compare(read_result(first), read_result(second))
    for difference in compared.differences:
        terminal.note(f"warning: not the same {difference}")
    terminal.data(json.dumps(compared.to_dict()) + "\n" if as_json else comparing.markdown(compared))


def _read_task(text: str, images: Path | None, limit: int) -> Any:
    """A task from ``NAME=DIR``."""
    from llava_edge.bench.quants.tasks import read_task

    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise click.UsageError(f"--task is {text!r}; expected NAME=DIR, such as easy-vqa=easy_vqa/data")
    return read_task(name, Path(folder), images, limit)


def _llm_type(name: str) -> str:
    from llava_edge.bench.models import LLM_TYPES
    from llava_edge.convert.quantize import check_type

    return check_type(name, LLM_TYPES)


def _say(quiet: bool) -> Any:
    return (lambda _line: None) if quiet else terminal.note


def _check_output(output: Path | None) -> None:
    """Before hours of work, not after them."""
    from llava_edge.errors import InputError

    if output is None:
        return
    if not output.parent.is_dir() or output.is_dir() or not os.access(output.parent, os.W_OK | os.X_OK):
        raise InputError(f"can't write {output}", hint="Name a file in a directory that exists and that you may write.")


def _show(result: Result, as_json: bool, output: Path | None, table: Callable[[Result], str] | None = None) -> None:
    from llava_edge.bench.record import write_result
    from llava_edge.bench.report import text

    for warning in result.warnings:
        terminal.note(f"warning: {warning}")
    terminal.data(result.to_json() if as_json else (table or text.summary)(result))
    if output is not None:
        write_result(output, result)
