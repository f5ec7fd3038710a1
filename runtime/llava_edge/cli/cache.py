"""``llava-edge cache``: what was computed once and lies on disk."""

from __future__ import annotations

import json

import click

from llava_edge.cli import debug_option, terminal


@click.group("cache", short_help="Show or delete what was computed once and kept on disk.")
def cache() -> None:
    """Embeddings of pictures, and the KV cache up to a picture, which another process finds again."""


@cache.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def info(as_json: bool) -> None:
    """Where the cache is, what it holds and how large it may become."""
    from llava_edge.cache import LIMIT_VARIABLE, DiskCache

    disk = DiskCache()
    usage = disk.usage()
    if as_json:
        kinds = {kind: {"entries": found.entries, "bytes": found.n_bytes} for kind, found in usage.items()}
        total = sum(found.n_bytes for found in usage.values())
        facts = {"directory": str(disk.root), "limit_bytes": disk.limit, "bytes": total, "kinds": kinds}
        terminal.data(json.dumps(facts, ensure_ascii=False) + "\n")
        return
    terminal.data(f"{disk.root}\n")
    for kind, found in usage.items():
        terminal.data(f"{kind:<10}  {found.entries:>5}  {terminal.size(found.n_bytes):>9}\n")
    terminal.data(f"limit              {terminal.size(disk.limit):>9}  ({LIMIT_VARIABLE} changes it, in megabytes)\n")


@cache.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def clear(as_json: bool) -> None:
    """Delete everything in the cache. Models, and what the self-check has found, stay."""
    from llava_edge.cache import DiskCache

    freed = DiskCache().clear()
    if as_json:
        terminal.data(json.dumps({"removed_entries": freed.entries, "removed_bytes": freed.n_bytes}) + "\n")
    else:
        terminal.note(f"{freed.entries} entries are gone, {terminal.size(freed.n_bytes)} are free")
