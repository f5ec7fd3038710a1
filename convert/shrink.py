"""A bundle with fewer bits: its files quantised, and measured against those that they were made of."""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llava_edge
from llava_edge import native
from llava_edge.bundle import MANIFEST_NAME, BundleFile, Manifest, Role, probe_picture, resolve_model, sha256_file
from llava_edge.convert import publish
from llava_edge.convert.parity import mtmd_defect
from llava_edge.convert.quantize import (
    LLM_TYPES,
    MMPROJ_TYPES,
    Quantized,
    check_tensor_types,
    check_type,
    describe,
    quantize,
)
from llava_edge.errors import InputError, ParityError
from llava_edge.quant_types import VISION_TYPES

if TYPE_CHECKING:
    from llava_edge.convert.cases import Case

log = logging.getLogger(__name__)

_FLOATS = {"llm": ("F32", "F16", "BF16"), "mmproj": ("F16", "F32"), "vision_onnx": ("fp32",)}
_STEP_SECONDS = 2.0


@dataclass(frozen=True)
class QuantizePlan:
    """What is asked; see :func:`llava_edge.convert.quantize_bundle`. None leaves a file as it is."""

    bundle: Path
    output: Path
    llm_type: str
    mmproj_type: str | None = None
    vision: str | None = None
    imatrix: Path | None = None
    tensor_types: Mapping[str, str] = field(default_factory=dict)
    verify: bool = True
    force: bool = False


class Quantization:
    """One run of :func:`llava_edge.convert.quantize_bundle`."""

    def __init__(self, plan: QuantizePlan, progress: Callable[[str], None] | None) -> None:
        self._plan = plan
        self._say = progress or log.info
        self._bundle = resolve_model(plan.bundle)
        self._old: dict[Role, BundleFile] = {file.role: file for file in self._bundle.manifest.files}
        self._types = self._wanted()

    def run(self) -> dict[str, Any]:
        """Quantise, measure, publish."""
        start, plan = time.monotonic(), self._plan
        publish.check_output(plan.output, plan.force)
        warnings = self._losses()
        for warning in warnings:
            log.warning("%s", warning)
        try:
            with publish.working_directory(plan.output) as work:
                made = {role: self._make(role, work) for role in self._types}
                measured = self._measure(work, made) if plan.verify else None
                (work / MANIFEST_NAME).write_text(self._manifest(work, measured).to_json(), encoding="utf-8")
                publish.publish(work, plan.output)
        except OSError as error:
            raise InputError(f"can't write {plan.output}: {error}", hint="Is there room, and may you write?") from None
        sizes = {role: file.bytes for role, file in self._old.items()}
        return {
            "output": str(plan.output),
            "files": [
                {"path": self._name(role), "bytes_before": sizes[role], **asdict(file)} for role, file in made.items()
            ],
            "bytes_before": sum(sizes.values()),
            "bytes": sum(file.bytes for file in made.values()),
            "measured": measured,
            "warnings": warnings,
            "seconds": round(time.monotonic() - start, 1),
        }

    def _wanted(self) -> dict[Role, str]:
        """The type of every file of the new bundle; InputError for what can't be made of what is there."""
        plan = self._plan
        wanted: dict[Role, str] = {"llm": check_type(plan.llm_type, LLM_TYPES)}
        check_tensor_types(plan.tensor_types, wanted["llm"])
        if plan.mmproj_type is not None:
            wanted["mmproj"] = check_type(plan.mmproj_type, MMPROJ_TYPES)
        if plan.vision is not None:
            wanted["vision_onnx"] = check_type(plan.vision, VISION_TYPES)
        for role, type_name in wanted.items():
            old = self._old.get(role)
            if type_name == "none":
                continue
            if old is None:
                raise InputError(
                    f"{self._bundle.directory} has no file of role {role} to make {type_name} of",
                    hint="Convert the checkpoint again.",
                )
            if old.type != type_name and old.type not in _FLOATS[role]:
                raise InputError(
                    f"{old.path} is {old.type} already; only floats ({', '.join(_FLOATS[role])}) are quantised",
                    hint="Convert the checkpoint with --llm-type F16 --mmproj-type F16 --vision fp32 first.",
                )
        kept = {role: old.type for role, old in self._old.items()}
        return {role: name for role, name in {**kept, **wanted}.items() if name != "none"}

    def _losses(self) -> list[str]:
        """What the new bundle can't do any more."""
        if "vision_onnx" not in self._old or "vision_onnx" in self._types:
            return []
        defect = mtmd_defect(self._bundle) if "mmproj" in self._types else "there is no mmproj file"
        if defect is None:
            return []
        return [
            f"without {self._old['vision_onnx'].path} the new bundle can't look at pictures: only mtmd is left, and "
            f"{defect}. --vision int8 keeps an exact backend"
        ]

    def _make(self, role: Role, work: Path) -> Quantized:
        source, target, type_name = self._bundle.file(role), work / self._name(role), self._types[role]
        if type_name == self._old[role].type:
            shutil.copyfile(source, target)
            return describe(target, type_name) if role != "vision_onnx" else _onnx(target, type_name)
        self._say(f"quantising {source.name} to {type_name}")
        if role == "vision_onnx":
            from llava_edge.convert.vision_onnx import quantize_onnx

            quantize_onnx(source, target)
            return _onnx(target, type_name)
        plan = self._plan
        return quantize(
            source,
            target,
            type_name,
            threads=native.default_threads(),
            imatrix=plan.imatrix if role == "llm" else None,
            tensor_types=plan.tensor_types if role == "llm" else None,
            progress=self._counter("tensors"),
        )

    def _counter(self, unit: str) -> Callable[[int, int], None]:
        last = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > _STEP_SECONDS:
                last = time.monotonic()
                self._say(f"  {done} of {total} {unit}")

        return tell

    def _measure(self, work: Path, made: dict[Role, Quantized]) -> dict[str, Any]:
        """The language model against the old one, vision files against the probe."""
        changed = [role for role in made if self._types[role] != self._old[role].type]
        found: dict[str, Any] = {}
        failures: list[str] = []
        if "llm" in changed:
            self._say(f"comparing {self._name('llm')} with {self._old['llm'].path}")
            found["llm"], wrong = self._compare_llm(work)
            failures += [f"{self._name('llm')}: {words}" for words in wrong]
        for role in ("mmproj", "vision_onnx"):
            if role in changed and self._bundle.manifest.probe is not None:
                found[role], wrong = self._compare_vision(work, role)
                failures += wrong
        if failures:
            raise ParityError(
                f"the quantised files are too far from those that they were made of: {'; '.join(failures)}",
                hint="Take a type with more bits, or --no-verify.",
            )
        return found

    def _compare_llm(self, work: Path) -> tuple[dict[str, Any], list[str]]:
        from llava_edge.convert import cases, parity
        from llava_edge.engine import Engine

        with llava_edge.load(self._bundle.directory, n_gpu_layers=0, cache=False) as model:
            size = self._bundle.manifest.image.size
            shown = [model.encode(model.open_picture(image)) for image in parity.pictures(size)]
            rows = [image.chunks[0].embeddings for image in shown]
            asked: list[Case] = cases.ask(
                model.engine,
                self._bundle.manifest.prompt,
                [r for r in rows if r is not None],
                self._counter("positions"),
            )
        longest = max(len(row) for row in rows if row is not None) + cases.TEXT_TOKENS
        engine = Engine(work / self._name("llm"), n_ctx=longest, n_gpu_layers=0)
        try:
            answers = cases.follow(engine, asked)
        finally:
            engine.close()
        limits = parity.LLM_LIMITS[self._types["llm"]]
        said = parity.compare_logits(answers, [case.logits for case in asked], limits.tie)
        figures = {"against": self._old["llm"].type, **parity.as_dict(said)}
        return figures, said.failures(limits)

    def _compare_vision(self, work: Path, role: Role) -> tuple[dict[str, Any], list[str]]:
        from llava_edge.engine import Engine
        from llava_edge.vision import selfcheck
        from llava_edge.vision.mtmd import MtmdEncoder
        from llava_edge.vision.onnx import OnnxEncoder

        manifest = self._bundle.manifest
        assert manifest.probe is not None
        engine = Engine(work / self._name("llm"), n_ctx=64, n_gpu_layers=0)
        path = work / self._name(role)
        encoder = OnnxEncoder(path, manifest.image, engine) if role == "vision_onnx" else MtmdEncoder(path, engine)
        try:
            (rows,) = encoder.encode([probe_picture(manifest.image.size)])
        finally:
            encoder.close()
            engine.close()
        cosine = selfcheck.mean_cosine(rows, manifest.probe)
        # A file that llama.cpp has never read rightly can't be judged by what it makes of it.
        judged = role == "vision_onnx" or mtmd_defect(self._bundle) is None
        wrong = (
            [f"{path.name}: cosine {cosine:.4f} to the probe"] if judged and not cosine >= selfcheck.MIN_COSINE else []
        )
        return {"probe_cosine": round(cosine, 6)}, wrong

    def _manifest(self, work: Path, measured: dict[str, Any] | None) -> Manifest:
        old = self._bundle.manifest
        files = tuple(self._entry(work, role) for role in self._types)
        backends = tuple(name for name in old.backends if name != "onnx" or "vision_onnx" in self._types)
        parity = copy.deepcopy(old.parity) if measured is not None else None
        if parity is not None and measured and "llm" in measured:
            parity.setdefault("llm", {})[self._types["llm"]] = measured["llm"]
        return replace(old, files=files, backends=backends, parity=parity)

    def _entry(self, work: Path, role: Role) -> BundleFile:
        path = work / self._name(role)
        return BundleFile(path.name, role, sha256_file(path), path.stat().st_size, self._types[role])

    def _name(self, role: Role) -> str:
        type_name = self._types[role]
        return f"vision-{type_name}.onnx" if role == "vision_onnx" else f"{role}-{type_name}.gguf"


def _onnx(path: Path, type_name: str) -> Quantized:
    return Quantized(type_name, path.stat().st_size, 0, {})
