"""What ``llava-edge doctor`` looks at. Nothing private goes into a report: no paths, names of people or machines,
addresses or tokens, so that it can be put into a bug report as it is.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from llava_edge import memory, native, store
from llava_edge.bundle import Bundle, embedded_models, open_bundle
from llava_edge.errors import LlavaEdgeError
from llava_edge.gguf_check import check_gguf
from llava_edge.onnx_check import check_onnx
from llava_edge.paths import cache_dir, models_dir

Level = Literal["good", "note", "bad"]

PACKAGES = ("llava-edge", "llama-cpp-python", "onnxruntime", "numpy", "pillow", "gguf", "jinja2", "huggingface_hub",
            "torch", "transformers", "pillow-heif")  # fmt: skip
# The oldest versions without known holes, and why.
MINIMUM = {
    "jinja2": ("3.1.6", "earlier ones let a chat template out of the sandbox (CVE-2025-27516)"),
    "pillow": ("12.2", "earlier ones overflow in decoders and unpack decompression bombs"),
    "llama-cpp-python": ("0.3.36", "the bindings that this version was tested with"),
}
_FEATURES = ("SSE3", "AVX", "AVX2", "F16C", "FMA", "AVX512", "AVX512_VNNI", "AVX512_BF16", "AMX_INT8", "NEON",
             "ARM_FMA", "DOTPROD", "MATMUL_INT8", "SVE", "METAL", "OPENMP", "REPACK", "LLAMAFILE")  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``advice`` is what to do about it, empty where nothing is."""

    topic: str
    level: Level
    text: str
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def examine(*, quick: bool = False) -> Iterator[Finding]:
    """All findings, as they come. ``quick`` leaves out what reads whole files: checksums and the self-check."""
    yield _system()
    yield from _packages()
    yield _cpu()
    yield _memory()
    for name, directory in embedded_models().items():
        yield from _model(name, partial(_open_embedded, directory), quick)
    for name in store.pulled_names():
        yield from _model(name, partial(store.open_pulled, models_dir() / name), quick)
    if not quick:
        yield from _self_checks()
    yield from _disk()


def _system() -> Finding:
    facts = {
        "python": platform.python_version(),
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
    }
    return Finding("system", "good", f"Python {facts['python']} on {facts['system']} {facts['machine']}", facts=facts)


def _packages() -> Iterator[Finding]:
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield Finding("packages", "good", shown, facts=versions)
    for name, (least, why) in MINIMUM.items():
        version = versions.get(name)
        if version is None or _numbers(version) < _numbers(least):
            text = f"{name} is {version or 'not installed'}; {least} or later is needed: {why}"
            yield Finding("packages", "bad", text, f"pip install '{name}>={least}'")


def _cpu() -> Finding:
    said = native.llama().llama_print_system_info().decode("utf-8", "replace")
    found = [name for name in _FEATURES if f"{name} = 1" in said]
    cores = native.default_threads()
    facts = {"features": found, "threads": cores, "gpu_offload": bool(native.llama().llama_supports_gpu_offload())}
    text = f"{cores} cores; llama.cpp uses {', '.join(found) or 'no extensions'}"
    if native.multiplies_with_amx():
        text += "; AMX is left alone for a defect of llama.cpp, and weights are not rearranged"
    if platform.machine() in ("x86_64", "AMD64") and "AVX2" not in found:
        advice = "llama.cpp was compiled without AVX2; reinstall llama-cpp-python on this machine, from source."
        return Finding("cpu", "note", text, advice, facts)
    return Finding("cpu", "good", text, facts=facts)


def _memory() -> Finding:
    total = memory.total_bytes()
    if total is None:
        return Finding("memory", "note", "the system doesn't tell how much memory there is")
    facts = {"total_bytes": total}
    text = f"{total / memory.GIB:.1f} GiB"
    if total < memory.GIB:
        return Finding("memory", "note", text, "That is enough for nano; larger models need more.", facts)
    return Finding("memory", "good", text, facts=facts)


def _open_embedded(directory: Path) -> store.Pulled:
    manifest = open_bundle(directory).manifest
    return store.Pulled(directory.name, directory, manifest.source, manifest.license, manifest.files, None)


def _model(name: str, find: Callable[[], store.Pulled], quick: bool) -> Iterator[Finding]:
    """Files that are there, well-formed and as they arrived."""
    try:
        pulled = find()
        for file in pulled.files:
            path = pulled.directory / file.path
            if file.role == "vision_onnx":
                check_onnx(path)
            else:
                check_gguf(path, "mmproj" if file.role == "mmproj" else "llm")
        damaged = [] if quick else store.verify(pulled)
    except LlavaEdgeError as error:
        text = f"{name}: {_without_paths(str(error))}"
        yield Finding(f"model {name}", "bad", text, f"Get it again: llava-edge remove {name}, then pull it.")
        return
    facts = {"types": [file.type for file in pulled.files], "bytes": pulled.n_bytes}
    if damaged:
        text = f"{name}: {', '.join(damaged)} is damaged: its content is not what arrived"
        yield Finding(f"model {name}", "bad", text, "Get it again.", facts)
        return
    checked = "well-formed" if quick else "well-formed, checksums right"
    yield Finding(f"model {name}", "good", f"{name}: {len(pulled.files)} files, {checked}", facts=facts)
    for warning in pulled.pair.warnings if pulled.pair else ():
        yield Finding(f"model {name}", "note", f"{name}: {warning}")


def _self_checks() -> Iterator[Finding]:
    """Load each bundle and let each of its vision backends encode the probe picture."""
    from llava_edge.vision.backends import candidates

    directories = {**embedded_models(), **{name: models_dir() / name for name in store.pulled_names()}}
    for name, directory in directories.items():
        try:
            bundle = open_bundle(directory)
        except LlavaEdgeError:
            continue  # a raw pair, which has no probe, or a damaged one, which was reported
        if bundle.manifest.probe is None:
            text = f"{name} has no probe: nothing tells whether its vision tower is right here"
            yield Finding(f"self-check {name}", "note", text)
            continue
        try:
            usable = candidates(bundle, "auto")
        except LlavaEdgeError as error:
            yield Finding(f"self-check {name}", "bad", f"{name}: {error}", error.hint or "")
            continue
        for backend in usable:
            yield _self_check(name, bundle, backend, preferred=backend == usable[0])


def _self_check(name: str, bundle: Bundle, backend: str, *, preferred: bool) -> Finding:
    """What one backend makes of the probe. A fault of one that chat would not take is only noted."""
    from llava_edge.bundle import probe_picture
    from llava_edge.engine import Engine
    from llava_edge.gguf_check import check_gguf
    from llava_edge.trial import require_trial
    from llava_edge.vision.backends import make_encoder
    from llava_edge.vision.selfcheck import MIN_COSINE, mean_cosine

    assert bundle.manifest.probe is not None
    topic = f"self-check {name}"
    fault: Level = "bad" if preferred else "note"
    package = "llama-cpp-python" if backend == "mtmd" else "onnxruntime"
    try:
        mmproj = check_gguf(bundle.file("mmproj"), "mmproj") if bundle.has("mmproj") else None
        require_trial(check_gguf(bundle.file("llm"), "llm"), mmproj)
        engine = Engine(bundle.file("llm"), n_ctx=256)
        try:
            encoder = make_encoder(bundle, engine, backend)
            (embeddings,) = encoder.encode([probe_picture(bundle.manifest.image.size)])
            encoder.close()
        finally:
            engine.close()
    except LlavaEdgeError as error:
        return Finding(topic, fault, f"{name}: {_without_paths(str(error))}", f"Reinstall {package}.")
    cosine = mean_cosine(embeddings, bundle.manifest.probe)
    facts = {"backend": backend, "cosine": round(cosine, 6)}
    if cosine < MIN_COSINE:
        text = f"{name}: {backend} is wrong here, cosine {cosine:.4f} to the expected embeddings"
        advice = f"Reinstall {package} on this machine." if preferred else "Nothing: chat takes a better one."
        return Finding(topic, fault, text, advice, facts)
    return Finding(topic, "good", f"{name}: {backend} is right, cosine {cosine:.4f}", facts=facts)


def _disk() -> Iterator[Finding]:
    places = {"pulled models": models_dir(), "unfinished downloads": models_dir() / ".partial",
              "self-checks": cache_dir() / "checks", "trials": cache_dir() / "trials"}  # fmt: skip
    for name, place in places.items():
        files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else []
        n_bytes = sum(path.stat().st_size for path in files)
        facts = {"files": len(files), "bytes": n_bytes}
        if name == "unfinished downloads" and files:
            text = f"{name}: {len(files)} files, {n_bytes / 1e6:.1f} MB"
            yield Finding("disk", "note", text, "Pull the model again to go on, or delete the folder .partial.", facts)
        else:
            yield Finding("disk", "good", f"{name}: {len(files)} files, {n_bytes / 1e6:.1f} MB", facts=facts)
    if not _writable(models_dir()):
        advice = "Set LLAVA_EDGE_HOME to a folder of yours."
        yield Finding("disk", "bad", "the folder for models can't be written", advice)


def _writable(place: Path) -> bool:
    while not place.exists() and place != place.parent:
        place = place.parent
    return os.access(place, os.W_OK)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


def _without_paths(text: str) -> str:
    """A message without the folders in it: they have people's names in them."""
    words = (Path(word).name or word if os.sep in word else word for word in text.split())
    return " ".join(words).replace(str(Path.home()), "~").replace(sys.prefix, "")
