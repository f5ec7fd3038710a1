"""What the parity gate measures: is what a file computes what the checkpoint says?

Pictures go through the reference and through a vision file, and the cosine of every token is taken. Questions about
them go through the reference and through the language model, always with the reference's embeddings and along one
greedy answer, and the distributions of every next token are compared.

Shapes: P patches, D width, T tokens of an answer, V size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava_edge.bundle import Bundle, probe_picture
from llava_edge.convert.gguf_file import tensor_types

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Two next tokens this close, in logits, may change places between any two correct programs.
TIE = 0.05

# Why llama.cpp's libmtmd, as it is now, is wrong about a tower that has a class token.
CLASS_TOKEN_DEFECT = "llama.cpp appends the class token after the patches, but numbers positions as if it came first"


@dataclass(frozen=True)
class VisionLimits:
    """What the embeddings of a type must reach."""

    cosine_mean: float
    cosine_min: float


@dataclass(frozen=True)
class LlmLimits:
    """What the next-token distributions of a type must reach.

    Where the reference's two best tokens lie within ``tie`` logits, the type may choose the other one: rounding moves
    logits, and with few bits it moves them far. The divergence counts everywhere.
    """

    kl_mean: float
    top1_agreement: float
    tie: float = TIE


MMPROJ_LIMITS = {
    "F16": VisionLimits(0.999, 0.999),
    "Q8_0": VisionLimits(0.99, 0.97),
    "Q6_K": VisionLimits(0.99, 0.95),
    "Q5_K_M": VisionLimits(0.98, 0.9),
    "Q4_K_M": VisionLimits(0.95, 0.8),
    "Q4_0": VisionLimits(0.95, 0.8),
}
ONNX_LIMITS = {"fp32": VisionLimits(0.9999, 0.9999), "int8": VisionLimits(0.995, 0.0)}
LLM_LIMITS = {
    "F32": LlmLimits(0.001, 0.99),
    "F16": LlmLimits(0.001, 0.99),
    "BF16": LlmLimits(0.01, 0.97, 0.1),
    "Q8_0": LlmLimits(0.02, 0.95, 0.1),
    "Q6_K": LlmLimits(0.05, 0.9, 0.2),
    "Q5_K_M": LlmLimits(0.1, 0.85, 0.3),
    "Q5_K_S": LlmLimits(0.1, 0.85, 0.3),
    "Q4_K_M": LlmLimits(0.2, 0.75, 0.5),
    "Q4_K_S": LlmLimits(0.25, 0.75, 0.5),
    "Q4_0": LlmLimits(0.4, 0.75, 0.5),
    "IQ4_NL": LlmLimits(0.3, 0.75, 0.5),
    "Q3_K_M": LlmLimits(0.6, 0.6, 1.0),
    "Q3_K_S": LlmLimits(1.0, 0.5, 1.0),
    "Q2_K": LlmLimits(3.0, 0.3, 1.0),
}


@dataclass(frozen=True)
class VisionParity:
    """Cosines over all tokens of all pictures; ``relative_error`` is |difference| / |spread of the reference|."""

    tokens: int
    cosine_mean: float
    cosine_min: float
    relative_error: float

    def failures(self, limits: VisionLimits) -> list[str]:
        """What is below the limits, in words; negated comparisons so that NaN fails."""
        found = []
        if not self.cosine_mean >= limits.cosine_mean:
            found.append(f"mean cosine {self.cosine_mean:.5f}, at least {limits.cosine_mean} is needed")
        if not self.cosine_min >= limits.cosine_min:
            found.append(f"lowest cosine {self.cosine_min:.5f}, at least {limits.cosine_min} is needed")
        return found


@dataclass(frozen=True)
class LlmParity:
    """KL divergence (nats, from the reference) and agreement of the most likely token over all answers' tokens.

    ``ties`` are tokens whose reference has its two best within the type's limit; ``top1_agreement`` is over the others.
    """

    tokens: int
    kl_mean: float
    kl_max: float
    top1_agreement: float
    ties: int

    def failures(self, limits: LlmLimits) -> list[str]:
        """What is beyond the limits, in words."""
        found = []
        if not self.kl_mean <= limits.kl_mean:
            found.append(f"mean KL divergence {self.kl_mean:.5f}, at most {limits.kl_mean} is allowed")
        if not self.top1_agreement >= limits.top1_agreement:
            found.append(f"top-1 agreement {self.top1_agreement:.3f}, at least {limits.top1_agreement} is needed")
        return found


@dataclass(frozen=True)
class TokenizerParity:
    """How many texts get the same token ids."""

    texts: int
    identical: int
    first_difference: str | None

    def failures(self) -> list[str]:
        """What differs, in words."""
        return [] if self.identical == self.texts else [f"other token ids than the reference: {self.first_difference}"]


def mtmd_defect(bundle: Bundle) -> str | None:
    """Why llama.cpp can't be right about a bundle's mmproj; None if it should be."""
    measured = (bundle.manifest.parity or {}).get("mtmd", {})
    for figures in measured.values():
        if not figures.get("right", True):
            return str(figures.get("why", "its embeddings were not those of the checkpoint"))
    if not measured and "v.class_embd" in tensor_types(bundle.file("mmproj")):
        return CLASS_TOKEN_DEFECT
    return None


def pictures(size: int) -> list[Image.Image]:
    """The probe picture, and soft blobs in place of its hard edges."""
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * x * y + 4 * y), np.sin(9 * y - 2 * x)]
    soft = np.stack([(wave + 1) * 127 for wave in waves], axis=-1).astype(np.uint8)
    return [probe_picture(size), Image.fromarray(soft)]


def compare_embeddings(found: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]]) -> VisionParity:
    """Compare embeddings ``[P, D]`` of the same pictures, token by token."""
    if [rows.shape for rows in found] != [rows.shape for rows in expected]:
        return VisionParity(sum(map(len, found)), float("nan"), float("nan"), float("nan"))
    a, b = np.concatenate(found).astype(np.float64), np.concatenate(expected).astype(np.float64)
    cosine = (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    error = np.linalg.norm(a - b) / max(float(np.linalg.norm(b - b.mean(axis=0))), 1e-30)
    return VisionParity(len(a), float(cosine.mean()), float(cosine.min()), float(error))


def compare_logits(
    found: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]], tie: float = TIE
) -> LlmParity:
    """Compare the distributions ``[T, V]`` from which the tokens of several answers are chosen."""
    rows = [_compare(one, other, tie) for one, other in zip(found, expected, strict=True)]
    kl, decided, same = (np.concatenate(values) for values in zip(*rows, strict=True))
    agreement = float(same[decided].mean()) if decided.any() else 1.0
    return LlmParity(len(kl), float(kl.mean()), float(kl.max()), agreement, int((~decided).sum()))


def _compare(
    found: NDArray[np.float32], expected: NDArray[np.float32], tie: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Divergence, whether the reference is decided, and whether the best token is the same: each ``[T]``."""
    second, first = np.partition(expected, -2, axis=1)[:, -2:].T
    same = found.argmax(axis=1) == expected.argmax(axis=1)
    return kl_divergence(expected, found), first - second > tie, same


def kl_divergence(reference: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(reference || found) ``[T]`` of distributions given as logits ``[T, V]``, in nats."""
    p, q = _log_softmax(reference), _log_softmax(found)
    divergence: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return divergence


def as_dict(parity: VisionParity | LlmParity | TokenizerParity) -> dict[str, Any]:
    """For the report: six digits are more than repeat."""
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(parity).items() if v is not None}


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
