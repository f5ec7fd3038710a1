"""What the tasks of ``llava-edge eval`` have in common: their options, the progress bar, the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli import debug_option, terminal
from llava_edge.cli.model_options import (
    how_it_runs,
    image_reduction_option,
    image_tokens_option,
    together,
    which_model,
)

if TYPE_CHECKING:
    from llava_edge.bench.tasks.evaluate import Job, Outcome

PATH = click.Path(path_type=Path)


def model_options(command: Any) -> Any:
    """Which model, how it is run, and the ablations."""
    return which_model(how_it_runs(image_tokens_option(ablations(command))))


ablations = together(
    click.option("--system", metavar="TEXT", help="The system message."),
    image_reduction_option,
    click.option(
        "--image-mode",
        type=click.Choice(["pad", "crop", "squash"]),
        help="How pictures are brought to the tower's square.  [default: the bundle's]",
    ),
    click.option("--prompt-format", metavar="NAME", help="vicuna_v1, llava_v1, mistral_instruct, …"),
    click.option("--feature-layers", metavar="N[,N]", help="The tower's layers that the projector reads."),
)


def parse_shard(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int]:
    """``K/N`` with K from 1 to N."""
    if value is None:
        return 1, 1
    part, slash, parts = value.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise click.BadParameter(f"{value!r}; expected K/N, such as 1/4", ctx, parameter)
    return int(part), int(parts)


run_options = together(
    click.option("--images", metavar="DIR", type=PATH, multiple=True, help="Where the pictures are."),
    click.option("--limit", metavar="N", type=click.IntRange(1), help="Only the first so many samples."),
    click.option("--max-tokens", metavar="N", type=click.IntRange(1), help="Longest answer."),
    click.option("--skip-bad", is_flag=True, help="Leave malformed entries out, and count them."),
    click.option("-o", "--output", metavar="DIR", type=PATH, help="The run's folder.  [default: eval-runs/…]"),
    click.option("--resume", is_flag=True, help="Go on with a run that was stopped."),
    click.option("--overwrite", is_flag=True, help="Begin a run anew."),
    click.option("--shard", metavar="K/N", callback=parse_shard, help="Only part K of N; see merge."),
    click.option(
        "--measure-sharing",
        is_flag=True,
        help="Instead of a run: measure what it saves to read a picture once for all its questions.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON."),
    click.option("--quiet", is_flag=True, help="Show no progress."),
    debug_option,
)


def task_options(command: Any) -> Any:
    """All options of a task, with the folder of its data."""
    data = click.option("--data", metavar="DIR", type=PATH, required=True, help="The benchmark's folder.")
    return data(model_options(run_options(command)))


def make_job(
    task: str, data: Path, values: dict[str, Any], inputs: dict[str, Any] | None = None, **options: Any
) -> Job:
    """A job from the values of :func:`model_options` and :func:`run_options`; ``options`` are the task's own, and
    ``inputs`` those that name files.
    """
    from llava_edge.bench.tasks.evaluate import Job

    if values["resume"] and values["overwrite"]:
        raise click.UsageError("--resume goes on with a run and --overwrite deletes it: give one of them")
    return Job(
        task=task,
        data=data,
        choice=make_choice(values),
        options={name: value for name, value in options.items() if value is not None},
        inputs=inputs or {},
        images=values["images"],
        max_tokens=values["max_tokens"],
        limit=values["limit"],
        part=values["shard"],
        output=values["output"],
        resume=values["resume"],
        overwrite=values["overwrite"],
        skip_bad=values["skip_bad"],
    )


def make_choice(values: dict[str, Any]) -> Any:
    """A ModelChoice from the values of :func:`model_options`."""
    from llava_edge.bench.tasks.models import ModelChoice
    from llava_edge.cli.chat import check_model_choice

    check_model_choice(values)
    layers = values["feature_layers"]
    if layers is not None:
        try:
            layers = tuple(int(layer) for layer in layers.split(","))
        except ValueError:
            raise click.UsageError(f"--feature-layers is {layers!r}; expected whole numbers such as 10,11") from None
    plain = ("model", "llm", "mmproj", "image_tokens", "image_reduction", "n_ctx", "threads", "n_gpu_layers")
    changes = ("vision_backend", "system", "image_mode", "prompt_format")
    return ModelChoice(**{name: values[name] for name in (*plain, *changes)}, feature_layers=layers)


def run_task(
    task: str, data: Path, values: dict[str, Any], inputs: dict[str, Any] | None = None, **options: Any
) -> None:
    """Run a task and show its summary."""
    job = make_job(task, data, values, inputs, **options)
    if values["measure_sharing"]:
        _show_sharing(job, values)
        return
    outcome = run_job(job, quiet=values["quiet"])
    if values["as_json"]:
        terminal.data(json.dumps(outcome.summary, ensure_ascii=False) + "\n")
    else:
        terminal.data(table(outcome.summary))
        if not values["quiet"]:
            terminal.note(f"{outcome.folder} has every answer")


def _show_sharing(job: Job, values: dict[str, Any]) -> None:
    from llava_edge.bench.tasks.sharing import measure_sharing

    result = measure_sharing(job, progress_bar(values["quiet"]))
    if values["as_json"]:
        terminal.data(json.dumps(result, ensure_ascii=False) + "\n")
        return
    faster = result["times_faster"]
    lines = [
        f"{result['questions']} questions on {result['pictures']} pictures, {result['same_answers']} answers the same",
        f"  one reading a picture   {result['shared_seconds']:.2f} s",
        f"  one reading a question  {result['separate_seconds']:.2f} s",
        f"  times faster            {faster['value']:.2f}{interval(faster, '.2f')}",
    ]
    terminal.data("\n".join(lines) + "\n")


def run_job(job: Job, *, quiet: bool) -> Outcome:
    """Run a job with a progress bar."""
    from llava_edge.bench.tasks.evaluate import evaluate as run

    try:
        outcome = run(job, progress_bar(quiet))
    except KeyboardInterrupt:
        terminal.note(
            "\nstopped; the answers so far are kept: run the same command again with --resume, not --overwrite"
        )
        raise
    for line in outcome.skipped[:5]:
        terminal.note(f"skipped: {line}")
    if len(outcome.skipped) > 5:
        terminal.note(f"skipped: {len(outcome.skipped) - 5} more")
    return outcome


def progress_bar(quiet: bool) -> Any:
    """What :func:`llava_edge.bench.tasks.evaluate.evaluate` reports its progress to."""

    @contextmanager
    def bar(length: int, done: int, label: str) -> Iterator[Callable[[int], None]]:
        with click.progressbar(length=length, label=label, file=sys.stderr, hidden=quiet, show_pos=True) as shown:
            shown.update(done)
            yield shown.update

    return bar


def table(summary: dict[str, Any]) -> str:
    """The summary for people: a metric a line, with its 95 % interval."""
    model = summary["model"]
    head = f"{summary['task']} · {model['name']} · {summary['asked']} samples"
    if summary["skipped"]:
        head += f" · {summary['skipped']} malformed entries skipped"
    if "judge" not in summary and summary["unreadable"]:
        head += f" · {summary['unreadable']} questions that could not be asked"
    width = max(map(len, summary["metrics"]), default=0)
    lines = [head]
    for name, metric in summary["metrics"].items():
        mark = "*" if name == summary["headline"] else " "
        interval = "" if metric["low"] is None else f"   {number(metric['low'])} to {number(metric['high'])}"
        lines.append(f"{mark} {name:{width}}  {number(metric['value']):>8}{interval}")
    return "\n".join(lines) + "\n"


def interval(metric: dict[str, Any], digits: str) -> str:
    """A metric's bounds behind its value; nothing where there are none."""
    return "" if metric["low"] is None else f"   {metric['low']:{digits}} to {metric['high']:{digits}}"


def number(value: float | None) -> str:
    """Four digits after the point for shares, fewer for large numbers."""
    if value is None:
        return "-"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4f}"
