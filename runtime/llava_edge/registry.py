"""Models that can be pulled by a name, from ``registry.json``.

``verified`` says whether somebody pulled the entry and asked the model about a picture. No hash stands in the list:
those come from the hub, with the files.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

from llava_edge.strict_json import Fields, parse_object


@dataclass(frozen=True)
class KnownModel:
    """An entry. ``repo`` is None for a model that is part of the package; ``memory_gib`` is an estimate for 4 bits,
    with the vision tower in 16 and a context of 4096 tokens.
    """

    name: str
    repo: str | None
    parameters: str
    prompt: str
    license: str
    memory_gib: float
    about: str
    verified: bool


@functools.cache
def known_models() -> dict[str, KnownModel]:
    """All entries by name."""
    text = resources.files("llava_edge").joinpath("registry.json").read_text(encoding="utf-8")
    root = parse_object(text)
    return {name: root.object(name).build(functools.partial(_entry, name)) for name in root.raw()}


def _entry(name: str, f: Fields) -> KnownModel:
    return KnownModel(
        name=name,
        repo=None if f.is_null("repo") else f.text("repo"),
        parameters=f.text("parameters"),
        prompt=f.text("prompt"),
        license=f.text("license"),
        memory_gib=f.number("memory_gib"),
        about=f.text("about"),
        verified=f.boolean("verified"),
    )
