"""Bundles of a checkpoint in other types. A part is made once, and bundles link to it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_edge.bench.models import SYNTHETIC, Subject, open_subject
from llava_edge.bench.progress import Say
from llava_edge.bench.quants.plan import (
    QuantsSettings,
    Variant,
    check_room,
    conversion_bytes,
    reference_tower,
    towers,
)
from llava_edge.bench.record import write_atomically
from llava_edge.bundle import MANIFEST_NAME, BundleFile, Role, open_bundle, sha256_file
from llava_edge.convert.quantize import quantize
from llava_edge.errors import InputError, require_extra

REFERENCE, SOURCE = "reference", "source.json"
_FLOATS: dict[Role, tuple[str, ...]] = {
    "llm": ("F16", "BF16", "F32"),
    "mmproj": ("F16", "BF16", "F32"),
    "vision_onnx": ("fp32",),
}
_PROBED = ("F16", "Q8_0", "fp32", "int8")


def open_source(source: Path, settings: QuantsSettings, image_tokens: int | None) -> Subject | None:
    """The source as a bundle without quantisation, None if it is a directory without a manifest: a checkpoint."""
    if (source / MANIFEST_NAME).is_file():
        subject = open_subject(source, image_tokens)
        manifest = subject.bundle.manifest
        if manifest.family == SYNTHETIC:
            raise InputError(
                f"{source} has random weights: what quantisation costs can't be seen on it",
                hint="`llava-edge bench speed --synthetic` compares the speed of types.",
            )
        used = {"llm", *(tower.role for tower in (reference_tower(manifest), *towers(settings, subject.bundle)))}
        for file in manifest.files:
            floats = _FLOATS.get(file.role, ())
            if file.role in used and file.type not in floats:
                raise InputError(
                    f"{source} can't be quantised: its {file.role} is {file.type}, {' or '.join(floats)} is needed",
                    hint="Give the checkpoint, or convert it with --llm-type F16 --mmproj-type F16 --vision fp32.",
                )
        return subject
    if not source.is_dir():
        raise InputError(
            f"no such bundle or checkpoint: {source}", hint="Name the directory of an F16 bundle or of a checkpoint."
        )
    return None


def check_checkpoint(source: Path) -> None:
    """InputError where a directory is no checkpoint that can be converted."""
    require_extra("convert", "torch", "transformers", "safetensors", "onnx")
    from llava_edge.convert.checkpoint import open_checkpoint

    open_checkpoint(source)


def convert_source(source: Path, work: Path, settings: QuantsSettings, image_tokens: int | None, say: Say) -> Subject:
    """What a conversion of the checkpoint makes of it, kept in ``work`` with the checkpoint's identity.

    Raises
    ------
    InputError
        ``work`` holds the conversion of another checkpoint, or there is no room for one.
    """
    converted, kept = work / REFERENCE, work / SOURCE
    wanted = json.dumps(identity(source), indent=1)
    if (converted / MANIFEST_NAME).is_file():
        if not kept.is_file() or kept.read_text(encoding="utf-8") != wanted:
            raise InputError(
                f"{work.parent} holds a run with other settings: its reference was not made of {source} as it is now",
                hint="Give the same checkpoint to go on, --restart to begin anew, or another --output.",
            )
    else:
        require_extra("convert", "torch", "transformers", "safetensors", "onnx")
        from llava_edge.convert import convert_checkpoint
        from llava_edge.convert.checkpoint import open_checkpoint

        check_room(conversion_bytes(settings, open_checkpoint(source)), work)
        write_atomically(kept, wanted)
        convert_checkpoint(source, converted, llm_type="F16", mmproj_type="F16", vision="fp32", progress=say)
    towers(settings, open_bundle(converted))
    return open_subject(converted, image_tokens)


def identity(checkpoint: Path) -> dict[str, Any]:
    """What tells a checkpoint from another one, and from itself after more training, without reading it.

    A report that is written into the same directory is no part of it.
    """
    found = [path for path in sorted(checkpoint.iterdir()) if path.is_file()]
    states = {path.name: path.stat() for path in found if path.stem != "report" and path.suffix != ".png"}
    files = {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
    return {"checkpoint": str(checkpoint.resolve()), "files": files}


class Maker:
    """Makes bundles below ``folder`` from the reference's files."""

    def __init__(self, reference: Subject, folder: Path, threads: int, say: Say) -> None:
        self._reference = reference
        self._parts = folder / "parts"
        self._bundles = folder / "bundles"
        self._threads = threads
        self._say = say
        for path in (self._parts, self._bundles):
            path.mkdir(parents=True, exist_ok=True)

    def make(self, variant: Variant) -> Subject:
        """The variant's bundle, with a manifest that says what it is."""
        manifest, tower = self._reference.bundle.manifest, variant.tower
        types: dict[Role, str] = {"llm": variant.llm_type, tower.role: tower.type}
        directory = self._bundles / variant.name
        directory.mkdir(exist_ok=True)
        files = []
        for file in manifest.files:
            if file.role not in types and not (file.role == "mmproj" and manifest.image.mode == "anyres"):
                continue  # another backend's; anyres takes its image_newline from the mmproj
            kind = types.get(file.role, file.type)
            path = directory / _name(file.role, kind)
            _link(self._part(file, kind), path)
            files.append(BundleFile(path.name, file.role, sha256_file(path), path.stat().st_size, kind))
        # The probe tells a wrong build from a right one, and would refuse a coarse type.
        probe = manifest.probe if tower.type in _PROBED else None
        made = replace(manifest, files=tuple(files), probe=probe, backends=(tower.backend,))
        write_atomically(directory / MANIFEST_NAME, made.to_json())
        return Subject(open_bundle(directory), variant.label, self._reference.image_tokens)

    def forget(self, variants: list[Variant]) -> None:
        """Delete bundles, and the parts that only they used."""
        for variant in variants:
            shutil.rmtree(self._bundles / variant.name, ignore_errors=True)
        for kind in {variant.llm_type for variant in variants}:
            (self._parts / _name("llm", kind)).unlink(missing_ok=True)

    def _part(self, file: BundleFile, kind: str) -> Path:
        source = self._reference.bundle.directory / file.path
        if kind == file.type:
            return source
        path = self._parts / _name(file.role, kind)
        if not path.exists():
            self._say(f"quantising {path.name}")
            partial = path.with_suffix(".partial")
            try:
                if file.role == "vision_onnx":
                    require_extra("convert", "onnx")
                    from llava_edge.convert.vision_onnx import quantize_onnx

                    quantize_onnx(source, partial)
                else:
                    quantize(source, partial, kind, threads=self._threads)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return path


def _name(role: Role, kind: str) -> str:
    return f"vision-{kind}.onnx" if role == "vision_onnx" else f"{role}-{kind}.gguf"


def _link(source: Path, path: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
