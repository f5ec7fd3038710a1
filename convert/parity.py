"""The parity gate: is what llama.cpp computes from the written files what the checkpoint says?

Pictures go through the reference and through the mmproj, and the cosine of every token is taken. Questions about
them go through the reference and through the language model, always with the reference's embeddings and along the
reference's greedy answer, and the distributions of every next token are compared.

Shapes: P patches, D width, T tokens of an answer, V size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava_edge.bundle import probe_picture
from llava_edge.engine import Engine
from llava_edge.vision.mtmd import MtmdEncoder
from llava_edge.vision.tokens import pool

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from llava_edge.convert.checkpoint import Description
    from llava_edge.convert.reference import Reference

QUESTIONS = ("What is in this picture?", "Describe the image briefly.", "Which colours do you see? Name 2.")
ANSWER_TOKENS = 24
# Two next tokens this close, in logits, may change places between any two correct programs.
TIE = 0.05
TEXTS = (
    "What animal is in this picture?",
    "  two  spaces,   three\tand a tab \n\n and lines\r\n",
    "In 1984, 3.14159 x 20,000 = 62831.8; 100% of  42 — №7, ½, ٣, Ⅻ.",
    "I'll say it's they've, we'd, DON'T and “quotes” …",
    "Größe, naïve café, señor, Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย",
    "你好,世界。日本語のテキスト、한국어",
    "👩‍👩‍👧‍👦 🐈‍⬛ 🇨🇭 e\u0301 a\u0308 \u200b \u00a0\u3000end",
    "def f(x):\n\treturn x**2 if x != 0 else None  # code\n<b>html</b> & {json: [1, 2]}",
    "https://example.org/a_b-c?d=e%20f&g=#h user@example.org C:\\path",
    "aAAaAaaaaaaaaaaaaaaaaaaaaa!!!!!!!! ???? ----- ______ ~~~ \x07\x7f",
    "",
    " ",
    "\n",
)


@dataclass(frozen=True)
class MmprojLimits:
    """What the embeddings of a type must reach."""

    cosine_mean: float
    cosine_min: float


@dataclass(frozen=True)
class LlmLimits:
    """What the next-token distributions of a type must reach; ties are not held against the agreement."""

    kl_mean: float
    top1_agreement: float


MMPROJ_LIMITS = {
    "F16": MmprojLimits(0.999, 0.999),
    "Q8_0": MmprojLimits(0.99, 0.97),
    "Q6_K": MmprojLimits(0.99, 0.95),
    "Q5_K_M": MmprojLimits(0.98, 0.9),
    "Q4_K_M": MmprojLimits(0.95, 0.8),
    "Q4_0": MmprojLimits(0.95, 0.8),
}
LLM_LIMITS = {
    "F16": LlmLimits(0.002, 0.99),
    "Q8_0": LlmLimits(0.02, 0.95),
    "Q6_K": LlmLimits(0.05, 0.9),
    "Q5_K_M": LlmLimits(0.1, 0.85),
    "Q5_K_S": LlmLimits(0.1, 0.85),
    "Q4_K_M": LlmLimits(0.2, 0.75),
    "Q4_K_S": LlmLimits(0.25, 0.75),
    "Q4_0": LlmLimits(0.4, 0.75),
    "IQ4_NL": LlmLimits(0.3, 0.75),
    "Q3_K_M": LlmLimits(0.6, 0.6),
    "Q3_K_S": LlmLimits(1.0, 0.5),
}


@dataclass(frozen=True)
class MmprojParity:
    """Cosines over all tokens of all pictures; ``relative_error`` is |difference| / |spread of the reference|."""

    tokens: int
    cosine_mean: float
    cosine_min: float
    relative_error: float

    def failures(self, limits: MmprojLimits) -> list[str]:
        """What is below the limits, in words; negated comparisons so that NaN fails."""
        found = []
        if not self.cosine_mean >= limits.cosine_mean:
            found.append(f"mean cosine {self.cosine_mean:.5f}, at least {limits.cosine_mean} is needed")
        if not self.cosine_min >= limits.cosine_min:
            found.append(f"lowest cosine {self.cosine_min:.5f}, at least {limits.cosine_min} is needed")
        return found


@dataclass(frozen=True)
class LlmParity:
    """KL divergence (nats, from the reference) and agreement of the most likely token over all answers' tokens."""

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
        agreement = self.top1_agreement + self.ties / self.tokens
        if not agreement >= limits.top1_agreement:
            found.append(f"top-1 agreement {agreement:.3f}, at least {limits.top1_agreement} is needed")
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


@dataclass(frozen=True)
class Case:
    """One prompt with a picture, and what the reference answers: ``logits`` ``[T, V]`` of ``tokens`` ``[T]``."""

    before: list[int]
    picture: NDArray[np.float32]
    after: list[int]
    tokens: list[int]
    logits: NDArray[np.float32]


def pictures(size: int) -> list[Image.Image]:
    """The probe picture, and soft blobs in place of its hard edges."""
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * x * y + 4 * y), np.sin(9 * y - 2 * x)]
    soft = np.stack([(wave + 1) * 127 for wave in waves], axis=-1).astype(np.uint8)
    return [probe_picture(size), Image.fromarray(soft)]


def make_cases(
    reference: Reference,
    tokenizer: PreTrainedTokenizerBase,
    description: Description,
    embeddings: Sequence[NDArray[np.float32]],
) -> list[Case]:
    """Ask the reference every question about every picture, with the default number of visual tokens."""
    prompt, visual = description.prompt, description.visual_tokens
    before = _ids(tokenizer, prompt.bos + prompt.user_prefix)
    cases = []
    for full in embeddings:
        picture = pool(full, visual.grid, visual.default)
        for question in QUESTIONS:
            text = prompt.image_suffix + question + prompt.user_suffix + prompt.assistant_prefix
            after = _ids(tokenizer, text)
            cases.append(Case(before, picture, after, *reference.answer(before, picture, after, ANSWER_TOKENS)))
    return cases


def measure_tokenizer(engine: Engine, tokenizer: PreTrainedTokenizerBase, scaffold: Sequence[str]) -> TokenizerParity:
    """Compare ids on varied texts, and on the prompt's scaffold with its special tokens."""
    pairs = [(text, _ids(tokenizer, text), engine.tokenize(text, special=False)) for text in TEXTS]
    pairs += [(text, _ids(tokenizer, text), engine.tokenize(text, special=True)) for text in scaffold]
    different = [f"{text!r} gives {found}, expected {ids}" for text, ids, found in pairs if ids != found]
    return TokenizerParity(len(pairs), len(pairs) - len(different), different[0] if different else None)


def measure_mmproj(
    path: Path, engine: Engine, images: Sequence[Image.Image], expected: Sequence[NDArray[np.float32]]
) -> MmprojParity:
    """Encode the pictures through libmtmd and compare with the reference's ``[P, D]``."""
    encoder = MtmdEncoder(path, engine)
    try:
        found = encoder.encode(images)
    finally:
        encoder.close()
    return compare_embeddings(found, expected)


def compare_embeddings(found: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]]) -> MmprojParity:
    """Compare embeddings ``[P, D]`` of the same pictures, token by token."""
    if [rows.shape for rows in found] != [rows.shape for rows in expected]:
        return MmprojParity(sum(map(len, found)), float("nan"), float("nan"), float("nan"))
    a, b = np.concatenate(found).astype(np.float64), np.concatenate(expected).astype(np.float64)
    cosine = (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    error = np.linalg.norm(a - b) / max(float(np.linalg.norm(b - b.mean(axis=0))), 1e-30)
    return MmprojParity(len(a), float(cosine.mean()), float(cosine.min()), float(error))


def measure_llm(engine: Engine, cases: Sequence[Case]) -> LlmParity:
    """Follow the reference's answers and compare the distributions from which their tokens were chosen."""
    reference = np.concatenate([case.logits for case in cases])
    found = np.concatenate([_logits(engine, case) for case in cases])
    best = reference.argmax(axis=1)
    differs = found.argmax(axis=1) != best
    two_best = np.partition(reference, -2, axis=1)[:, -2:]
    ties = differs & (two_best[:, 1] - two_best[:, 0] <= TIE)
    kl = kl_divergence(reference, found)
    agreement = 1 - float(differs.mean())
    return LlmParity(len(kl), float(kl.mean()), float(kl.max()), agreement, int(ties.sum()))


def kl_divergence(reference: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(reference || found) ``[T]`` of distributions given as logits ``[T, V]``, in nats."""
    p, q = _log_softmax(reference), _log_softmax(found)
    divergence: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return divergence


def as_dict(parity: MmprojParity | LlmParity | TokenizerParity) -> dict[str, Any]:
    """For the report: six digits are more than repeat."""
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(parity).items() if v is not None}


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _logits(engine: Engine, case: Case) -> NDArray[np.float32]:
    engine.truncate(0)
    engine.decode_tokens(case.before, logits=False)
    engine.decode_embeddings(case.picture)
    engine.decode_tokens(case.after)
    rows = [engine.logits()]
    for token in case.tokens[:-1]:
        engine.decode_tokens([token])
        rows.append(engine.logits())
    return np.stack(rows)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
