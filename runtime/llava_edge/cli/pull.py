"""``llava-edge pull``: download a model, checked."""

from __future__ import annotations

import json
import sys

import click

from llava_edge.cli import debug_option, terminal
from llava_edge.cli.terminal import size


@click.command(short_help="Download a model by name, or from any repository of the hub.")
@click.argument("model", metavar="NAME_OR_REPO[:TYPE]")
@click.option("--mmproj", metavar="TYPE", help="Precision of the vision tower.  [default: F16]")
@click.option("--as", "name", metavar="NAME", help="The name that the model gets here.")
@click.option("--force", is_flag=True, help="Pull it even if it doesn't fit the memory.")
@click.option("--json", "as_json", is_flag=True, help="Print what was pulled as one JSON object.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@debug_option
def pull(model: str, mmproj: str | None, name: str | None, force: bool, as_json: bool, quiet: bool) -> None:
    """Download a model: a known NAME (see `llava-edge list --known`), or owner/name of a repository of the Hugging Face
    hub that has a GGUF file and its mmproj, or a bundle. Interrupted downloads go on where they were.

    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are respected.

    \b
    llava-edge pull llava-1.5-7b
    llava-edge pull ggml-org/SmolVLM-500M-Instruct-GGUF:Q8_0
    llava-edge chat --model llava-1.5-7b --image cat.jpg
    """
    from llava_edge import pull as pulling

    plan = pulling.plan(model, name=name, mmproj=mmproj)
    repository = plan.repository
    say = (lambda _line: None) if quiet else terminal.note
    origin = f"{repository.name} at {repository.commit[:12]}"
    say(f"{plan.name}: {len(plan.files)} files, {size(plan.n_bytes)}, from {origin}")
    gate = " (gated: to be accepted on the repository's page)" if repository.gated else ""
    say(f"licence: {repository.license}{gate}")
    if not force:
        pulling.check_room(plan)
    with terminal.Bar(plan.n_bytes, shown=not quiet and sys.stderr.isatty()) as bar:
        pulled = pulling.pull(plan, progress=bar.advance, say=terminal.note)
    if as_json:
        from llava_edge.cli.models import as_dict

        terminal.data(json.dumps(as_dict(pulled), ensure_ascii=False) + "\n")
        return
    terminal.data(f"{pulled.name}\n")
    say(f"try: llava-edge chat --model {pulled.name} --image PICTURE")
