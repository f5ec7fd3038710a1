"""The files that a model is made of: those of a bundle, of a pulled pair, or of a pair that was named."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llava_edge import store
from llava_edge.bundle import MANIFEST_NAME, Bundle, embedded_models, resolve_model
from llava_edge.errors import InputError
from llava_edge.gguf_check import check_gguf
from llava_edge.gguf_mmproj import known_defects
from llava_edge.onnx_check import check_onnx
from llava_edge.paths import is_file
from llava_edge.trial import require_trial
from llava_edge.vision.tokens import pooled_counts

log = logging.getLogger(__name__)

DEFAULT_MODEL = "nano"


@dataclass(frozen=True)
class Parts:
    """The files of a model, and the bundle if it is one."""

    name: str
    llm: Path
    mmproj: Path | None
    bundle: Bundle | None = None
    image_tokens: int | None = None
    vision_backend: str = "auto"
    hashes: Mapping[Path, str] = field(default_factory=dict)

    @property
    def contents(self) -> dict[Path, str | None]:
        """Every file that answers depend on, with its SHA-256 where a manifest lists it."""
        paths = {self.llm: None, **({self.mmproj: None} if self.mmproj else {})}
        return {**paths, **self.hashes}


def find_parts(
    model: str | os.PathLike[str] | None,
    llm: str | os.PathLike[str] | None,
    mmproj: str | os.PathLike[str] | None,
    image_tokens: int | None,
    vision_backend: str,
) -> Parts:
    """The files of a model by its name or directory, or of the pair ``llm`` and ``mmproj``."""
    if llm or mmproj:
        return _raw_pair(model, llm, mmproj, vision_backend)
    pulled = _pulled_parts(model or DEFAULT_MODEL, vision_backend)
    return pulled or _bundle_parts(model or DEFAULT_MODEL, image_tokens, vision_backend)


def _raw_pair(
    model: str | os.PathLike[str] | None,
    llm: str | os.PathLike[str] | None,
    mmproj: str | os.PathLike[str] | None,
    vision_backend: str,
) -> Parts:
    if model is not None:
        raise InputError("give a model's name, or llm and mmproj, not both")
    if not (llm and mmproj):
        have, lack = ("llm", "mmproj") if llm else ("mmproj", "llm")
        raise InputError(f"{have} without {lack}: a raw pair needs both", hint=f"Give {lack} too.")
    _require_mtmd(vision_backend)
    return Parts(Path(llm).stem, Path(llm), Path(mmproj))


def _require_mtmd(vision_backend: str) -> None:
    if vision_backend not in ("auto", "mtmd"):
        raise InputError(f"vision_backend is {vision_backend!r}; a raw pair of GGUF files runs only with mtmd")


def pulled_pair(model: str | os.PathLike[str]) -> store.Pulled | None:
    """A raw pair that was pulled, by its name or directory; None if it is something else."""
    directory = Path(model)
    if is_file(directory / store.PAIR_NAME):
        pulled: store.Pulled | None = store.open_pulled(directory)
    elif is_file(directory / MANIFEST_NAME) or os.fspath(model) in embedded_models():
        return None
    else:
        pulled = store.find(os.fspath(model))
    return pulled if pulled is not None and pulled.pair is not None else None


def _pulled_parts(model: str | os.PathLike[str], vision_backend: str) -> Parts | None:
    pulled = pulled_pair(model)
    if pulled is None or pulled.pair is None:
        return None
    _require_mtmd(vision_backend)
    hashes = {pulled.directory / file.path: file.sha256 for file in pulled.files}
    llm, mmproj = (pulled.directory / pulled.pair.file(role) for role in ("llm", "mmproj"))
    return Parts(pulled.name, llm, mmproj, hashes=hashes)


def llm_file(model: str | os.PathLike[str] | None, llm: str | os.PathLike[str] | None) -> Path:
    """The language model's file alone, whatever else the model lacks."""
    if llm:
        return Path(llm)
    pulled = pulled_pair(model or DEFAULT_MODEL)
    if pulled is not None and pulled.pair is not None:
        return pulled.directory / pulled.pair.file("llm")
    return resolve_model(model or DEFAULT_MODEL).file("llm")


def preflight(parts: Parts) -> None:
    """Check the files before native code sees them, and say what llama.cpp is known to compute wrongly."""
    llm = check_gguf(parts.llm, "llm")
    if parts.bundle is not None and any(file.role == "vision_onnx" for file in parts.bundle.manifest.files):
        check_onnx(parts.bundle.file("vision_onnx"))
    mmproj = None if parts.mmproj is None else check_gguf(parts.mmproj, "mmproj")
    if mmproj and parts.bundle is None:  # a bundle's manifest ranks what computes it, and its probe shows what is wrong
        for defect in known_defects(mmproj):
            log.warning("%s: %s", parts.name, defect)
    require_trial(llm, mmproj)


def _bundle_parts(model: str | os.PathLike[str], image_tokens: int | None, vision_backend: str) -> Parts:
    from llava_edge.vision.backends import candidates

    bundle = resolve_model(model)
    manifest = bundle.manifest
    candidates(bundle, vision_backend)  # refuses here what could not run later
    if manifest.parity is None:
        log.warning(
            "%s was never compared with its checkpoint: its answers may differ from the reference's", manifest.name
        )
    tokens = manifest.visual_tokens
    count = tokens.default if image_tokens is None else image_tokens
    if count not in pooled_counts(tokens.grid):
        raise InputError(
            f"image_tokens is {count}; {manifest.name} can't pool its grid to that",
            hint=f"Possible are {', '.join(map(str, pooled_counts(tokens.grid)))}.",
        )
    if count not in tokens.trained:
        trained = ", ".join(map(str, tokens.trained))
        log.warning("%s has not learnt to read %d tokens a picture, only %s", manifest.name, count, trained)
    mmproj = bundle.file("mmproj") if bundle.has("mmproj") else None
    hashes = {bundle.directory / file.path: file.sha256 for file in manifest.files}
    return Parts(manifest.name, bundle.file("llm"), mmproj, bundle, count, vision_backend, hashes)
