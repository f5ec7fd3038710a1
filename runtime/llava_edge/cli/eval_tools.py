"""``llava-edge eval judge``, ``compare``, ``merge``, ``sweep``, ``report``, ``make-sets``: what is done with runs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_edge.cli import debug_option, terminal
from llava_edge.cli.eval_options import (
    PATH,
    interval,
    make_job,
    model_options,
    number,
    progress_bar,
    run_options,
    table,
)

if TYPE_CHECKING:
    from llava_edge.bench.tasks.judge import Judge

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.argument("run", type=PATH)
@click.option("--judge-url", metavar="URL", help="An OpenAI-compatible endpoint, such as http://127.0.0.1:8080/v1.")
@click.option("--judge-model", metavar="NAME", help="The endpoint's model.")
@click.option("--judge", "local", metavar="NAME|DIR", help="Instead: a model on this machine.")
@click.option("--rules", metavar="FILE", type=PATH, help="LLaVA's rule.json, for published figures.")
@click.option("--threads", metavar="N", type=click.IntRange(1, 1024), help="Threads of a judge on this machine.")
@click.option("--max-tokens", metavar="N", type=click.IntRange(1), default=1024, show_default=True, help="Longest.")
@click.option("--overwrite", is_flag=True, help="Ask again what was judged already.")
@json_option
@click.option("--quiet", is_flag=True, help="Show no progress.")
@debug_option
def judge(
    run: Path,
    judge_url: str | None,
    judge_model: str | None,
    local: str | None,
    rules: Path | None,
    threads: int | None,
    max_tokens: int,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Let a judge see the answers in RUN (of llava-bench or scienceqa). Judgements that are there are kept.

    The endpoint's key is read from LLAVA_EDGE_JUDGE_KEY or OPENAI_API_KEY.
    """
    if (local is None) == (judge_url is None):
        raise click.UsageError("give --judge-url with --judge-model, or --judge")
    if judge_url is not None and judge_model is None:
        raise click.UsageError("--judge-url needs --judge-model")
    from llava_edge.bench.tasks.judge import HttpJudge, LocalJudge
    from llava_edge.bench.tasks.review import read_rules, review_run
    from llava_edge.bench.tasks.run import open_run

    opened = open_run(run)
    known = read_rules(rules) if rules is not None else {}
    with contextlib.ExitStack() as stack:
        judge: Judge
        if judge_url is not None:
            judge = HttpJudge(judge_url, judge_model or "")
        else:
            import llava_edge

            judge = LocalJudge(stack.enter_context(llava_edge.load(local, n_threads=threads, cache=False)))
        step = stack.enter_context(progress_bar(quiet)(len(opened.records), 0, f"judge {judge.name}"))
        judged = review_run(opened, judge, rules=known, overwrite=overwrite, step=step, max_tokens=max_tokens)
    if as_json:
        terminal.data(json.dumps(judged, ensure_ascii=False) + "\n")
        return
    terminal.data(table(judged) + f"judged by {judge.name}; {judged['unreadable']} judgements can't be read\n")


@click.command()
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@json_option
@debug_option
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Is the run SECOND better than FIRST? Paired bootstrap over pictures, and McNemar's test for right and wrong."""
    from llava_edge.bench.tasks.compare import compare as paired
    from llava_edge.bench.tasks.run import open_run

    result = paired(open_run(first), open_run(second))
    if as_json:
        terminal.data(json.dumps(result, ensure_ascii=False) + "\n")
        return
    terminal.data(_comparison(result, first, second))


def _comparison(result: dict[str, Any], first: Path, second: Path) -> str:
    difference = result["difference"]
    lines = [
        f"{result['task']} · {result['samples']} samples, {result['left_out']} left out",
        f"  {first}  {number(result['mean_first'])}",
        f"  {second}  {number(result['mean_second'])}",
        f"  difference  {difference['value']:+.4f}{interval(difference, '+.4f')}",
        f"  same answer  {result['same_answer']}",
    ]
    if result["mcnemar"] is not None:
        test = result["mcnemar"]
        lines.append(
            f"  only the first right {test['only_first']}, only the second {test['only_second']}, "
            f"p = {test['p_value']:.3g} (McNemar)"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("parts", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", metavar="DIR", type=PATH, required=True, help="The folder of the joined run.")
@json_option
@debug_option
def merge(parts: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Join the PARTS of a run that was split with --shard. The summary is that of a run in one piece."""
    from llava_edge.bench.tasks.run import merge as join

    summary = join(parts, output)
    terminal.data(json.dumps(summary, ensure_ascii=False) + "\n" if as_json else table(summary))


@click.command()
@click.argument("task")
@click.option("--data", metavar="DIR", type=PATH, required=True, help="The benchmark's folder.")
@click.option(
    "--grid",
    metavar="KEY=A,B",
    multiple=True,
    help="Values to try; every combination is run. May be given several times.",
)
@model_options
@run_options
def sweep(task: str, data: Path, grid: tuple[str, ...], **values: Any) -> None:
    """Run TASK over a grid of settings into folders below --output. What is finished is not run again.

    Keys are model, image-tokens, image-reduction, image-mode, prompt-format, feature-layers (10+11), vision-backend,
    system, max-tokens, limit, and the task's own options, such as suffix, or format of scienceqa.

    \b
    llava-edge eval sweep pope --data pope --grid image-tokens=64,16 --grid image-mode=pad,crop -o sweep
    """
    if values["output"] is None:
        raise click.UsageError("a sweep needs --output")
    from llava_edge.bench.tasks.sweep import parse_grid, run_sweep

    job = make_job(task, data, values)
    rows = run_sweep(job, parse_grid(grid), values["output"], progress_bar(values["quiet"]))
    if values["as_json"]:
        terminal.data(json.dumps(rows, ensure_ascii=False) + "\n")
        return
    width = max(len(row["run"]) for row in rows)
    for row in rows:
        interval = "" if row["low"] is None else f"   {number(row['low'])} to {number(row['high'])}"
        terminal.data(f"{row['run']:{width}}  {row['metric']}  {number(row['value'])}{interval}\n")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--into", metavar="FILE", type=PATH, help="Write the table between the marks of this document.")
@debug_option
def report(runs: tuple[Path, ...], into: Path | None) -> None:
    """The RUNS as a table in Markdown: tasks by models, with 95 % intervals."""
    from llava_edge.bench.tasks.report import markdown_table, write_into
    from llava_edge.bench.tasks.run import open_run

    text = markdown_table([open_run(run) for run in runs])
    if into is not None:
        write_into(into, text)
    else:
        terminal.data(text)


@click.command("make-sets")
@click.argument("file", type=PATH)
@click.argument("images", type=PATH)
@click.option("--split", default="dev", show_default=True, help="The split, for files that have several.")
@click.option("--pictures", metavar="N", type=click.IntRange(1), default=500, show_default=True, help="For POPE.")
@click.option("-o", "--output", metavar="DIR", type=PATH, required=True, help="Where the sets go.")
@debug_option
def make_sets(file: Path, images: Path, split: str, pictures: int, output: Path) -> None:
    """Make POPE-style questions and CHAIR-style annotations from the captions in FILE of the pictures in IMAGES."""
    from llava_edge.bench.tasks.caption_files import read_captions
    from llava_edge.bench.tasks.make_sets import make_sets as make
    from llava_edge.bench.tasks.reading import Data

    captions = read_captions(Data(file.parent, images=[images]), file, split)
    counts = make({name: texts for name, (_, texts) in captions.items()}, output, pictures=pictures)
    terminal.data("".join(f"{name}  {count}\n" for name, count in counts.items()))
