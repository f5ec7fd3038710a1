"""``llava-edge list``, ``show``, ``remove`` and ``verify``: the models that are here."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from llava_edge import store
from llava_edge.bundle import embedded_models, open_bundle
from llava_edge.cli import debug_option, did_you_mean, terminal
from llava_edge.cli.terminal import size
from llava_edge.errors import InputError, ModelError
from llava_edge.paths import models_dir
from llava_edge.registry import known_models


@click.command("list", short_help="List the models that are here.")
@click.option("--known", is_flag=True, help="List the models that can be pulled by a name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
@debug_option
def list_models(known: bool, as_json: bool) -> None:
    """List the models that are here, or those that can be pulled by a name."""
    rows = [asdict(model) for model in known_models().values()] if known else _here()
    if as_json:
        terminal.data(json.dumps(rows, ensure_ascii=False) + "\n")
    elif known:
        table = [[r["name"], r["parameters"], f"{r['memory_gib']} GiB", r["license"],
                  "" if r["verified"] else "not tried yet", r["about"]] for r in rows]  # fmt: skip
        terminal.table(["name", "size", "memory", "licence", "", ""], table)
    else:
        table = [[r["name"], r["types"], size(r["bytes"]), r["license"], r["source"]] for r in rows]
        terminal.table(["name", "types", "size", "licence", "from"], table)


@click.command(short_help="Show what is known of a model.")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def show(name: str, as_json: bool) -> None:
    """Show what is known of a model: files, source, licence, memory, prompt format."""
    pulled, known = find(name), known_models().get(name)
    if pulled is None and known is None:
        raise unknown(name)
    facts: dict[str, Any] = {**(asdict(known) if known else {}), **(as_dict(pulled) if pulled else {"here": False})}
    if as_json:
        terminal.data(json.dumps(facts, ensure_ascii=False) + "\n")
        return
    for key, value in facts.items():
        if key == "files":
            for file in value:
                terminal.data(f"  {file['role']:<12} {file['type']:<8} {size(file['bytes']):>9}  {file['path']}\n")
        elif value not in (None, []):
            terminal.data(f"{key.replace('_', ' ')}: {'; '.join(value) if isinstance(value, list) else value}\n")


@click.command(short_help="Delete a pulled model.")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Don't ask.")
@debug_option
def remove(name: str, yes: bool) -> None:
    """Delete a pulled model and free its space."""
    if name in embedded_models():
        raise InputError(f"{name} is part of the package and can't be removed")
    pulled = models_dir() / store.check_name(name)
    if pulled.is_dir() and not yes:
        click.confirm(f"Delete {pulled}?", abort=True, err=True)
    terminal.note(f"{name} is gone, {size(store.remove(name))} are free")


@click.command(short_help="Compare models' files with their checksums.")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
@debug_option
def verify(names: tuple[str, ...], as_json: bool) -> None:
    """Compare every file of a model (of all models, without NAME) with the SHA-256 that it had when it arrived."""
    results = []
    for name in names or (*embedded_models(), *store.pulled_names()):
        pulled = find(name)
        if pulled is None:
            raise unknown(name)
        damaged = store.verify(pulled)
        results.append({"name": name, "files": len(pulled.files), "damaged": damaged})
        if not as_json:
            terminal.data(f"{name}: " + (f"damaged: {', '.join(damaged)}" if damaged else "good") + "\n")
    if as_json:
        terminal.data(json.dumps(results, ensure_ascii=False) + "\n")
    if bad := [str(result["name"]) for result in results if result["damaged"]]:
        raise ModelError(f"damaged: {', '.join(bad)}", hint=f"Remove and pull again: llava-edge remove {bad[0]}")


def find(name: str) -> store.Pulled | None:
    """A model that is here, by name: part of the package, or pulled."""
    embedded = embedded_models().get(name)
    if embedded is not None:
        manifest = open_bundle(embedded).manifest
        return store.Pulled(name, embedded, "part of the package", manifest.license, manifest.files, None)
    return store.find(name)


def unknown(name: str) -> ModelError:
    """An error that lists what there is."""
    names = [*embedded_models(), *store.pulled_names(), *known_models()]
    here = ", ".join(dict.fromkeys([*embedded_models(), *store.pulled_names()])) or "none"
    return ModelError(
        f"no model {name!r}{did_you_mean(name, names)}. Here are: {here}",
        hint="`llava-edge list --known` lists what can be pulled.",
    )


def as_dict(pulled: store.Pulled) -> dict[str, Any]:
    """A model that is here, for JSON."""
    return {
        "name": pulled.name,
        "here": True,
        "directory": str(pulled.directory),
        "source": pulled.source,
        "license": pulled.license,
        "bytes": pulled.n_bytes,
        "files": [asdict(file) for file in pulled.files],
        "warnings": list(pulled.pair.warnings) if pulled.pair else [],
    }


def _here() -> list[dict[str, Any]]:
    rows = []
    for name in (*embedded_models(), *store.pulled_names()):
        try:
            pulled = find(name)
        except ModelError as error:
            terminal.note(f"warning: {error}")
            continue
        if pulled is not None:
            rows.append({**as_dict(pulled), "types": " + ".join(file.type for file in pulled.files)})
    return rows
