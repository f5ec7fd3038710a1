"""Which model is asked, and the paper's ablations that need no training: a bundle with another manifest."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.bundle import MANIFEST_NAME, Bundle, Manifest, resolve_model, sha256_file
from llava_edge.convert.prompts import NAMED
from llava_edge.engine import DEFAULT_CTX
from llava_edge.errors import InputError
from llava_edge.gguf_header import read_header
from llava_edge.memory import context_bytes
from llava_edge.parts import llm_file, pulled_pair
from llava_edge.types import FitMode
from llava_edge.vision.backends import candidates

if TYPE_CHECKING:
    from llava_edge.model import Model

PROMPT_FORMATS = {
    **{name: NAMED[name]("", "</s>") for name in ("vicuna_v1", "llava_v1", "mistral_instruct", "chatml_direct")},
    "plain": replace(NAMED["plain"]("", "</s>"), stop=()),
}
"""The conversation formats of LLaVA. A bundle's own token for the beginning and its own stop texts stay."""

# Questions that are read side by side, and what their contexts may take: nano's take 94 MB each.
_QUESTIONS = 8
_CONTEXTS_BYTES = 768 * 1024 * 1024


@dataclass(frozen=True)
class ModelChoice:
    """A model and how it is run. ``image_mode``, ``prompt_format`` and ``feature_layers`` override a bundle's."""

    model: str | None = None
    llm: Path | None = None
    mmproj: Path | None = None
    image_tokens: int | None = None
    image_reduction: str = "pool"
    n_ctx: int | None = None
    threads: int | None = None
    n_gpu_layers: int | None = None
    system: str | None = None
    image_mode: FitMode | None = None
    prompt_format: str | None = None
    feature_layers: tuple[int, ...] | None = None
    vision_backend: str = "auto"

    @property
    def _changed(self) -> bool:
        return bool(self.image_mode or self.prompt_format or self.feature_layers)

    def describe(self) -> dict[str, Any]:
        """What makes two runs' models the same; it costs no loading and names no path. The files of a raw pair are read
        for their hashes.

        ``vision_backend`` is what was asked for; a run's summary has what read the pictures.
        """
        asked: dict[str, Any] = {"vision_backend": self.vision_backend, "system": self.system}
        if self.n_gpu_layers is not None:
            asked["n_gpu_layers"] = self.n_gpu_layers
        if self.llm or self.mmproj:
            self._need_bundle()
            files = {path.name: sha256_file(path) for path in (self.llm, self.mmproj) if path and path.is_file()}
            return {"name": self.llm.stem if self.llm else None, "files": files, **asked}
        pulled = pulled_pair(self.model or "nano")
        if pulled is not None:
            self._need_bundle()
            return {"name": pulled.name, "files": {file.path: file.sha256 for file in pulled.files}, **asked}
        bundle = self._bundle()
        candidates(bundle, self.vision_backend)
        manifest = changed_manifest(bundle.manifest, self)
        return {
            "name": manifest.name,
            "files": {file.path: file.sha256 for file in manifest.files},
            "types": {file.role: file.type for file in manifest.files},
            "image_tokens": self.image_tokens or manifest.visual_tokens.default,
            **({} if self.image_reduction == "pool" else {"image_reduction": self.image_reduction}),
            "image_mode": manifest.image.mode,
            "prompt_format": self.prompt_format,
            "prompt_sha256": hashlib.sha256(repr(manifest.prompt).encode()).hexdigest(),
            "feature_layers": list(manifest.feature_layers),
            **asked,
        }

    def _need_bundle(self) -> None:
        if self._changed or self.image_tokens is not None:
            raise InputError("image tokens, image mode, prompt format and feature layers need a bundle")

    def _bundle(self) -> Bundle:
        return resolve_model(self.model or "nano")

    def _contexts(self) -> int:
        """How many questions are read side by side."""
        header = read_header(llm_file(self.model, self.llm))
        needed = context_bytes(header, self.n_ctx or DEFAULT_CTX, "f16")
        return 1 if needed is None else max(1, min(_QUESTIONS, int(_CONTEXTS_BYTES // needed)))

    @contextmanager
    def load(self) -> Iterator[Model]:
        """The loaded model."""
        import llava_edge

        with tempfile.TemporaryDirectory(prefix="llava-edge-") as folder:
            name: str | Path | None = self.model or (None if self.llm or self.mmproj else "nano")
            if self._changed:
                name = write_variant(self._bundle(), self, Path(folder) / "variant")
            with llava_edge.load(
                name,
                llm=self.llm,
                mmproj=self.mmproj,
                n_ctx=self.n_ctx,
                n_threads=self.threads,
                n_gpu_layers=self.n_gpu_layers,
                image_tokens=self.image_tokens,
                vision_backend=self.vision_backend,
                image_reduction=self.image_reduction,
                n_seq_max=self._contexts(),
                cache=False,
            ) as model:
                yield model


def changed_manifest(manifest: Manifest, choice: ModelChoice) -> Manifest:
    """The manifest with the choice's ablations; InputError where the bundle can't have them."""
    if choice.image_mode:
        grid, max_tiles = manifest.image.grid, manifest.image.max_tiles
        if choice.image_mode != "anyres":
            grid, max_tiles = (), 0
        image = replace(manifest.image, mode=choice.image_mode, grid=grid, max_tiles=max_tiles)
        manifest = replace(manifest, image=image)
    if choice.prompt_format:
        if choice.prompt_format not in PROMPT_FORMATS:
            raise InputError(f"prompt format is {choice.prompt_format!r}; expected one of {', '.join(PROMPT_FORMATS)}")
        own, wanted = manifest.prompt, PROMPT_FORMATS[choice.prompt_format]
        stops = (*own.stop, *(text for text in wanted.stop if text not in own.stop))
        manifest = replace(manifest, prompt=replace(wanted, bos=own.bos, stop=stops))
    if choice.feature_layers and choice.feature_layers != manifest.feature_layers:
        wanted_layers = len(manifest.feature_layers)
        if len(choice.feature_layers) != wanted_layers:
            raise InputError(
                f"{len(choice.feature_layers)} feature layers; the projector of {manifest.name} reads {wanted_layers} "
                f"(it has {', '.join(map(str, manifest.feature_layers))})"
            )
        if list(choice.feature_layers) != sorted(set(choice.feature_layers)):
            raise InputError("feature layers must rise: llama.cpp puts them side by side in the order of the tower")
        if not any(file.role == "mmproj" for file in manifest.files):
            raise InputError(f"{manifest.name} has no mmproj file, the only one whose feature layers can be changed")
        if any(file.role == "vision_onnx" for file in manifest.files):
            raise InputError(
                f"the ONNX vision tower of {manifest.name} has its feature layers built in",
                hint="Convert the checkpoint once for each choice of layers.",
            )
        # The probe was made with the bundle's own layers.
        manifest = replace(manifest, feature_layers=choice.feature_layers, probe=None)
    return manifest


def write_variant(bundle: Bundle, choice: ModelChoice, folder: Path) -> Path:
    """A bundle of links to the files of another one, with the changed manifest."""
    manifest = changed_manifest(bundle.manifest, choice)
    files = []
    for file in manifest.files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.role == "mmproj" and manifest.feature_layers != bundle.manifest.feature_layers:
            shutil.copyfile(bundle.directory / file.path, target)
            _set_feature_layers(target, manifest.feature_layers)
            file = replace(file, sha256=sha256_file(target))
        else:
            target.symlink_to((bundle.directory / file.path).resolve())
        files.append(file)
    (folder / MANIFEST_NAME).write_text(replace(manifest, files=tuple(files)).to_json(), encoding="utf-8")
    return folder


def _set_feature_layers(mmproj: Path, layers: tuple[int, ...]) -> None:
    """Overwrite the numbers in place; the file keeps its size."""
    import gguf

    reader = gguf.GGUFReader(mmproj, "r+")
    field = reader.fields.get("clip.vision.feature_layer")
    blocks = reader.fields["clip.vision.block_count"].contents()
    if field is None or len(field.data) != len(layers):
        raise InputError(f"{mmproj.name} has no list of {len(layers)} feature layers that could be changed")
    if not all(0 <= layer <= blocks for layer in layers):
        raise InputError(
            f"feature layers are {', '.join(map(str, layers))}; the file has 0 (the input) to {blocks}",
            hint="A bundle keeps only the blocks that it reads: later ones are gone, earlier ones can be tried.",
        )
    for place, layer in zip(field.data, layers, strict=True):
        field.parts[place][0] = layer
    reader.data.flush()
