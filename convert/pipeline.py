"""The steps of a conversion, in order. Files grow in a directory beside the output, which is renamed at the end."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge import native
from llava_edge.bundle import MANIFEST_NAME, BundleFile, Manifest, Probe, Role, sha256_file
from llava_edge.convert import publish
from llava_edge.convert.checkpoint import Checkpoint, Weights, open_checkpoint
from llava_edge.convert.quantize import LLM_TYPES, MMPROJ_TYPES, Quantized, check_type, describe, quantize
from llava_edge.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava_edge.convert.gate import Gate
    from llava_edge.convert.reference import Reference

log = logging.getLogger(__name__)

PROBE_ROWS = 8


class ParityError(ModelError):
    """A written file does not compute what the checkpoint says."""


class Conversion:
    """One run of :func:`llava_edge.convert.convert_checkpoint`, whose parameters these are."""

    def __init__(
        self,
        checkpoint: Path,
        output: Path,
        llm_type: str,
        mmproj_type: str,
        verify: bool,
        force: bool,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.source = checkpoint
        self.output = output
        self.types: dict[Role, str] = {
            "llm": check_type(llm_type, LLM_TYPES),
            "mmproj": check_type(mmproj_type, MMPROJ_TYPES),
        }
        self.verify = verify
        self.force = force
        self.say = progress or log.info

    def run(self) -> dict[str, Any]:
        """Convert, measure, publish."""
        start = time.monotonic()
        if not self.source.is_dir():
            raise InputError(f"no such checkpoint: {self.source}", hint="Name a directory in Hugging Face format.")
        publish.check_output(self.output, self.force)
        checkpoint = open_checkpoint(self.source)
        try:
            with publish.working_directory(self.output) as work:
                quantized, manifest = self._make(checkpoint, work)
                (work / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
                publish.publish(work, self.output)
        except OSError as error:
            raise InputError(f"can't write {self.output}: {error}", hint="Is there room, and may you write?") from None
        self.report_path.unlink(missing_ok=True)
        return {
            "output": str(self.output),
            "files": [{"path": name, **asdict(file)} for name, file in quantized.items()],
            "parity": manifest.parity,
            "seconds": round(time.monotonic() - start, 1),
        }

    @property
    def report_path(self) -> Path:
        """Where the figures of a failed conversion are kept."""
        return self.output.with_name(self.output.name + ".parity.json")

    def _make(self, checkpoint: Checkpoint, work: Path) -> tuple[dict[str, Quantized], Manifest]:
        from llava_edge.convert.gate import Gate
        from llava_edge.convert.reference import Reference, load_tokenizer

        tokenizer = load_tokenizer(checkpoint.directory)
        self._write_floats(checkpoint, tokenizer, work)
        self.say("loading the reference")
        reference = Reference(checkpoint)
        gate = Gate(reference, tokenizer, checkpoint.description) if self.verify else None
        quantized = self._quantize(work, gate)
        files = [self._entry(work, role) for role in self.types]
        return quantized, self._manifest(checkpoint, reference, files, gate)

    def _write_floats(self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, work: Path) -> None:
        from llava_edge.convert.llm import write_llm
        from llava_edge.convert.mmproj import write_mmproj

        self.say("writing the language model and the vision tower as F16")
        weights = Weights(checkpoint.directory)
        write_llm(checkpoint, weights, tokenizer, work / file_name("llm", "F16"))
        write_mmproj(checkpoint, weights, work / file_name("mmproj", "F16"))
        weights.require_all_used()

    def _quantize(self, work: Path, gate: Gate | None) -> dict[str, Quantized]:
        """Measure the F16 files first: a fault of the conversion shows there, under the tightest limits."""
        self._measure(gate, work, dict.fromkeys(self.types, "F16"))
        quantized = {}
        for role, type_name in self.types.items():
            target = work / file_name(role, type_name)
            if type_name == "F16":
                quantized[target.name] = describe(target, type_name)
                continue
            self.say(f"quantising {target.name}")
            source = work / file_name(role, "F16")
            quantized[target.name] = quantize(source, target, type_name, threads=native.default_threads())
        if any(type_name != "F16" for type_name in self.types.values()):
            self._measure(gate, work, self.types)
        for role, type_name in self.types.items():
            if type_name != "F16":
                (work / file_name(role, "F16")).unlink()
        return quantized

    def _measure(self, gate: Gate | None, work: Path, types: dict[Role, str]) -> None:
        if gate is None:
            return
        names = {role: file_name(role, type_name) for role, type_name in types.items()}
        self.say(f"measuring {' and '.join(names.values())} against the checkpoint")
        failures = gate.measure(work / names["llm"], types["llm"], work / names["mmproj"], types["mmproj"])
        if failures:
            self.report_path.write_text(json.dumps({"failures": failures, **gate.report()}, indent=2) + "\n")
            raise ParityError(
                f"the converted files don't compute what the checkpoint says: {'; '.join(failures)}",
                hint=f"All figures are in {self.report_path}; nothing else was written.",
            )

    def _entry(self, work: Path, role: Role) -> BundleFile:
        path = work / file_name(role, self.types[role])
        return BundleFile(path.name, role, sha256_file(path), path.stat().st_size, self.types[role])

    def _manifest(
        self, checkpoint: Checkpoint, reference: Reference, files: list[BundleFile], gate: Gate | None
    ) -> Manifest:
        about = checkpoint.description
        return Manifest(
            name=about.name,
            family=about.family,
            license=about.license,
            source=about.source,
            files=tuple(files),
            prompt=about.prompt,
            image=about.image,
            visual_tokens=about.visual_tokens,
            feature_layers=checkpoint.feature_layers,
            backends=("mtmd",),
            probe=make_probe(checkpoint, reference),
            parity=gate.report() if gate else None,
        )


def make_probe(checkpoint: Checkpoint, reference: Reference) -> Probe:
    """A few evenly spread rows of the reference's embeddings of the probe picture."""
    from llava_edge.bundle import probe_picture

    full = checkpoint.description.visual_tokens.full
    count = min(PROBE_ROWS, full)
    rows = tuple((2 * i + 1) * full // (2 * count) for i in range(count))
    return Probe.of(rows, reference.encode(probe_picture(checkpoint.description.image.size)))


def file_name(role: Role, type_name: str) -> str:
    """The name of a bundle's GGUF file."""
    return f"{role}-{type_name}.gguf"
