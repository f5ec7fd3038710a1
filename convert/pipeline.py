"""The steps of a conversion, in order. Files grow in a directory beside the output, which is renamed at the end."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge import native
from llava_edge.bundle import MANIFEST_NAME, Backend, BundleFile, Manifest, Probe, Role, probe_picture, sha256_file
from llava_edge.convert import publish
from llava_edge.convert.checkpoint import Checkpoint, Options, open_checkpoint
from llava_edge.convert.memory import release
from llava_edge.convert.norms import open_tuned, set_norms
from llava_edge.convert.quantize import (
    LLM_TYPES,
    MMPROJ_TYPES,
    Quantized,
    check_tensor_types,
    check_type,
    describe,
    quantize,
    require_tensors,
)
from llava_edge.errors import InputError, ParityError
from llava_edge.quant_types import VISION_TYPES

if TYPE_CHECKING:
    from llava_edge.convert.gate import Gate
    from llava_edge.convert.gguf_file import FloatType
    from llava_edge.convert.reference import Reference
    from llava_edge.convert.weights import Weights

log = logging.getLogger(__name__)

PROBE_ROWS = 8
# Smaller than this and a step is over before a line about it is read.
_SLOW_STEP_SECONDS = 5.0


@dataclass(frozen=True)
class Plan:
    """What is asked of a conversion; see :func:`llava_edge.convert.convert_checkpoint`."""

    checkpoint: Path
    output: Path
    llm_type: str = "Q4_K_M"
    mmproj_type: str = "Q8_0"
    vision: str = "auto"
    imatrix: Path | None = None
    tensor_types: Mapping[str, str] = field(default_factory=dict)
    norms: Path | None = None
    verify: bool = True
    force: bool = False
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        object.__setattr__(self, "llm_type", check_type(self.llm_type, LLM_TYPES))
        object.__setattr__(self, "mmproj_type", check_type(self.mmproj_type, MMPROJ_TYPES))
        check_tensor_types(self.tensor_types, self.llm_type)
        if self.norms is not None and self.llm_type in ("F32", "F16", "BF16"):
            raise InputError(f"norms are tuned for rounded matrices; {self.llm_type} has none")
        object.__setattr__(self, "vision", check_type(self.vision, ("auto", *VISION_TYPES)))


class Conversion:
    """One run of :func:`llava_edge.convert.convert_checkpoint`."""

    def __init__(self, plan: Plan, progress: Callable[[str], None] | None) -> None:
        self.plan = plan
        self.say = progress or log.info

    def run(self) -> dict[str, Any]:
        """Convert, measure, publish."""
        start = time.monotonic()
        plan = self.plan
        for directory in (plan.checkpoint, *([plan.norms] if plan.norms is not None else [])):
            if not directory.is_dir():
                raise InputError(f"no such checkpoint: {directory}", hint="Name a checkpoint's directory.")
        publish.check_output(plan.output, plan.force)
        checkpoint = open_checkpoint(plan.checkpoint, plan.options)
        for note in checkpoint.notes:
            self.say(note)
        try:
            with publish.working_directory(plan.output) as work:
                files, manifest = _Work(self, checkpoint, work).make()
                (work / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
                publish.publish(work, plan.output)
        except OSError as error:
            raise InputError(f"can't write {plan.output}: {error}", hint="Is there room, and may you write?") from None
        self.report_path.unlink(missing_ok=True)
        return {
            "output": str(plan.output),
            "files": [{"path": name, **asdict(file)} for name, file in files.items()],
            "backends": list(manifest.backends),
            "notes": list(checkpoint.notes),
            "parity": manifest.parity,
            "seconds": round(time.monotonic() - start, 1),
        }

    @property
    def report_path(self) -> Path:
        """Where the figures of a failed conversion are kept."""
        return self.plan.output.with_name(self.plan.output.name + ".parity.json")


class _Work:
    """The directory in the making: float files first, measured under the tightest limits, then what is made of them."""

    def __init__(self, conversion: Conversion, checkpoint: Checkpoint, work: Path) -> None:
        self._conversion = conversion
        self._plan = conversion.plan
        self._say = conversion.say
        self._checkpoint = checkpoint
        self._work = work
        self._weights: Weights = checkpoint.open_weights()
        self._tuned = open_tuned(self._plan.norms, checkpoint) if self._plan.norms is not None else None
        self._float: FloatType = "F16"
        if self._plan.llm_type in ("F32", "BF16"):
            self._float = "BF16" if self._plan.llm_type == "BF16" else "F32"
        self._types: dict[Role, str] = {"llm": self._plan.llm_type, "mmproj": self._plan.mmproj_type}
        if (vision := self._vision_type()) != "none":
            self._types["vision_onnx"] = vision
        self._floats: dict[Role, str] = {"llm": self._float, "mmproj": "F16", "vision_onnx": "fp32"}

    def make(self) -> tuple[dict[str, Quantized], Manifest]:
        """Everything but the manifest's file."""
        from llava_edge.convert.gate import Gate
        from llava_edge.convert.reference import Reference
        from llava_edge.convert.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self._checkpoint.tokenizer_directory)
        self._write_floats()
        self._say("computing the reference")
        reference = Reference(self._checkpoint, self._weights)
        probe = self._probe(reference)
        gate = Gate(self._checkpoint, reference, tokenizer) if self._plan.verify else None
        reference.release_tower()
        self._measure(gate, dict.fromkeys(self._types), first=True)
        files = {self._path(role).name: self._finish(role) for role in self._types}
        self._measure(gate, dict(self._types), first=False)
        self._remove_floats()
        return files, self._manifest(probe, gate)

    def _vision_type(self) -> str:
        """``auto`` adds an ONNX file where llama.cpp can't run the tower, and only there."""
        from llava_edge.convert.gate import misread

        if self._plan.vision != "auto":
            return self._plan.vision
        return "int8" if misread(self._checkpoint) or self._checkpoint.image_newline else "none"

    def _write_floats(self) -> None:
        from llava_edge.convert.llm import write_llm
        from llava_edge.convert.mmproj import write_mmproj
        from llava_edge.convert.tokenizer import load_tokenizer
        from llava_edge.convert.vision_onnx import write_onnx

        checkpoint, weights = self._checkpoint, self._weights
        self._say(f"writing the language model as {self._float}")
        tokenizer = load_tokenizer(checkpoint.tokenizer_directory)
        write_llm(checkpoint, weights, tokenizer, self._float_path("llm"), self._float, self._counter("tensors"))
        require_tensors(self._float_path("llm"), self._plan.tensor_types)
        release()
        self._say("writing the vision tower")
        write_mmproj(checkpoint, weights, self._float_path("mmproj"))
        weights.require_all_used()
        if "vision_onnx" in self._types:
            write_onnx(checkpoint, weights, self._float_path("vision_onnx"))

    def _counter(self, things: str) -> Callable[[int, int], None]:
        """A line now and then, in what takes long."""
        last = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > _SLOW_STEP_SECONDS:
                last = time.monotonic()
                self._say(f"  {done} of {total} {things}")

        return tell

    def _measure(self, gate: Gate | None, types: dict[Role, str | None], *, first: bool) -> None:
        """Measure the float files, or those of the types that were asked for and are others."""
        if gate is None:
            return
        chosen = {role: name or self._floats[role] for role, name in types.items()}
        if not first:
            chosen = {role: name for role, name in chosen.items() if name != self._floats[role]}
        if not chosen:
            return
        paths = {role: self._work / file_name(role, name) for role, name in chosen.items()}
        self._say(f"measuring {', '.join(path.name for path in paths.values())} against the checkpoint")
        failures: list[str] = []
        if "mmproj" in paths:
            failures += gate.measure_mmproj(paths["mmproj"], chosen["mmproj"])
            release()
        engine = gate.open_engine(paths.get("llm", self._float_path("llm")))
        try:
            if "mmproj" in paths:
                failures += gate.measure_mtmd(paths["mmproj"], chosen["mmproj"], engine)
                release()
            if "vision_onnx" in paths:
                failures += gate.measure_onnx(paths["vision_onnx"], chosen["vision_onnx"], engine, self._deepen)
                release()
            if "llm" in paths:
                failures += gate.measure_llm(engine, chosen["llm"], self._counter)
        finally:
            engine.close()
        if failures:
            self._fail(failures, gate)

    def _deepen(self) -> Path:
        from llava_edge.convert.vision_onnx import write_onnx

        path = self._work / "hidden.onnx"
        write_onnx(self._checkpoint, self._weights, path, hidden=True)
        return path

    def _fail(self, failures: list[str], gate: Gate) -> None:
        report = self._conversion.report_path
        report.write_text(json.dumps({"failures": failures, **gate.report()}, indent=2) + "\n")
        raise ParityError(
            f"the converted files don't compute what the checkpoint says: {'; '.join(failures)}",
            hint=f"All figures are in {report}; nothing else was written.",
        )

    def _finish(self, role: Role) -> Quantized:
        """The file of the type that was asked for, made from the floats."""
        type_name, source, target = self._types[role], self._float_path(role), self._path(role)
        if type_name == self._floats[role]:
            return _onnx_file(target, type_name) if role == "vision_onnx" else describe(target, type_name)
        self._say(f"quantising {target.name}")
        if role == "vision_onnx":
            from llava_edge.convert.vision_onnx import quantize_onnx

            quantize_onnx(source, target)
            return _onnx_file(target, type_name)
        plan, threads = self._plan, native.default_threads()
        if role != "llm":
            return quantize(source, target, type_name, threads=threads)
        made = quantize(
            source, target, type_name, threads=threads, imatrix=plan.imatrix, tensor_types=plan.tensor_types
        )
        if self._tuned is not None:
            set_norms(target, self._tuned)
        return made

    def _remove_floats(self) -> None:
        for role in self._types:
            if self._types[role] != self._floats[role]:
                self._float_path(role).unlink()

    def _manifest(self, probe: Probe, gate: Gate | None) -> Manifest:
        about = self._checkpoint.description
        backends: tuple[Backend, ...] = ("onnx", "mtmd") if "vision_onnx" in self._types else ("mtmd",)
        report = gate.report() if gate else None
        if report and not report["mtmd"][self._plan.mmproj_type]["right"]:
            self._say(
                f"note: llama.cpp's mtmd reads this mmproj wrongly: {report['mtmd'][self._plan.mmproj_type]['why']}"
            )
            if backends == ("mtmd",):
                self._say("note: no vision backend of this bundle is right; --vision int8 adds one")
        return Manifest(
            name=about.name,
            family=about.family,
            license=about.license,
            source=about.source,
            files=tuple(self._entry(role) for role in self._types),
            prompt=about.prompt,
            image=about.image,
            visual_tokens=about.visual_tokens,
            feature_layers=self._checkpoint.feature_layers,
            backends=backends,
            probe=probe,
            parity=report,
        )

    def _entry(self, role: Role) -> BundleFile:
        path = self._path(role)
        return BundleFile(path.name, role, sha256_file(path), path.stat().st_size, self._types[role])

    def _path(self, role: Role) -> Path:
        return self._work / file_name(role, self._types[role])

    def _float_path(self, role: Role) -> Path:
        return self._work / file_name(role, self._floats[role])

    def _probe(self, reference: Reference) -> Probe:
        """A few evenly spread rows of the reference's embeddings of the probe picture."""
        about = self._checkpoint.description
        full = about.visual_tokens.full
        count = min(PROBE_ROWS, full)
        rows = tuple((2 * i + 1) * full // (2 * count) for i in range(count))
        return Probe.of(rows, reference.encode(probe_picture(about.image.size)))


def _onnx_file(path: Path, type_name: str) -> Quantized:
    return Quantized(type_name, path.stat().st_size, 0, {})


def file_name(role: Role, type_name: str) -> str:
    """The name of a bundle's file."""
    return f"vision-{type_name}.onnx" if role == "vision_onnx" else f"{role}-{type_name}.gguf"
