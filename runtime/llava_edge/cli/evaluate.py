"""``llava-edge eval``: ask a model about pictures with known answers, and score what it says."""

from __future__ import annotations

import importlib

import click

from llava_edge.cli import did_you_mean

TASKS = (
    "captions", "animals", "pope", "easy-vqa", "chair", "choices", "questions",
    "scienceqa", "mme", "vqav2", "gqa", "textvqa", "llava-bench",
)  # fmt: skip
TOOLS = ("judge", "compare", "merge", "sweep", "report", "make-sets")
# name -> module:attribute
COMMANDS = {
    **{name: f"eval_tasks:{name.replace('-', '_')}" for name in TASKS},
    **{name: f"eval_tools:{name.replace('-', '_')}" for name in TOOLS},
}


class EvalGroup(click.Group):
    """Tasks and tools, imported when one of them is run or listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(f"llava_edge.cli.{module}"), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(f"no such task: {args[0]}{did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group("eval", cls=EvalGroup, short_help="Score a model on pictures with known answers.")
def evaluate() -> None:
    """Score a model, greedily, on a benchmark in its published format.

    Every answer is a line of samples.jsonl in the run's folder; a run that was stopped goes on with --resume.

    \b
    llava-edge eval easy-vqa --data easy_vqa/data --model nano
    llava-edge eval pope --data pope --model nano --limit 500 --json
    """
