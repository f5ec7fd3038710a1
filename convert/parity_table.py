"""``python -m llava_edge.convert.parity_table > docs/parity.md``: every family converted, and what came out.

The checkpoints are those of :mod:`llava_edge.convert.tiny`. Answers are compared with transformers' own classes: its
image processor, its tokenizer, and ``generate``. A checkpoint in the original format is compared with the same weights
in transformers' format.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image

import llava_edge
from llava_edge.convert import convert_checkpoint
from llava_edge.convert.checkpoint import open_checkpoint
from llava_edge.convert.parity import TIE
from llava_edge.convert.reference import Prompt, Reference
from llava_edge.convert.tiny import FAMILIES, Family, make
from llava_edge.convert.token_ids import reference_prompt
from llava_edge.convert.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from llava_edge.convert.checkpoint import Checkpoint

QUESTION = "What is in this picture?"
TOKENS = 64
# portrait, landscape, square, tiny, panorama
SIZES = ((90, 160), (200, 120), (112, 112), (20, 14), (400, 90))


def pictures() -> list[Image.Image]:
    """Five pictures of different shapes: waves of colour with some noise."""
    found = []
    for number, (width, height) in enumerate(SIZES):
        y, x = np.mgrid[0:height, 0:width] / 60
        waves = np.stack([np.sin(x * 3 + number), np.cos(y * 4 - x), np.sin(x * y + number)], axis=-1)
        noise = np.random.default_rng(number).normal(0, 0.1, waves.shape)
        found.append(Image.fromarray(((waves + noise).clip(-1, 1) * 127 + 127).astype(np.uint8)))
    return found


class Transformers:
    """The answers of transformers to a checkpoint in its own format."""

    def __init__(self, directory: Path) -> None:
        self._checkpoint = open_checkpoint(directory)
        self._tokenizer = load_tokenizer(directory)
        self._processor = transformers.AutoImageProcessor.from_pretrained(directory)
        kind: Any = transformers.AutoModelForImageTextToText
        self._model = kind.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(
        self, picture: Image.Image, checkpoint: Checkpoint | None = None
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Tokens of the greedy answer and the logits from which each was chosen.

        ``checkpoint`` is that whose prompt is used, this one's own if there is none.
        """
        before, after = reference_prompt(self._tokenizer, checkpoint or self._checkpoint, QUESTION)
        inputs = self._processor(picture, return_tensors="pt")
        shown = self._features(inputs)
        embed = self._model.get_input_embeddings()
        rows = torch.cat([embed(torch.tensor(before)), shown, embed(torch.tensor(after))])[None]
        out = self._model.generate(
            inputs_embeds=rows,
            attention_mask=torch.ones(rows.shape[:2], dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.sequences[0].tolist(), [step[0] for step in out.logits]

    def _features(self, inputs: Any) -> torch.Tensor:
        sizes = {"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}
        (features,) = self._model.get_image_features(inputs["pixel_values"], **sizes).pooler_output
        found: torch.Tensor = features
        return found


class OwnReference:
    """The same answers from the parity gate's reference, for towers that transformers runs in another way."""

    def __init__(self, directory: Path) -> None:
        self._checkpoint = open_checkpoint(directory)
        self._tokenizer = load_tokenizer(self._checkpoint.tokenizer_directory)
        self._reference = Reference(self._checkpoint, self._checkpoint.open_weights())

    def answer(
        self, picture: Image.Image, checkpoint: Checkpoint | None = None
    ) -> tuple[list[int], list[torch.Tensor]]:
        """See :meth:`Transformers.answer`."""
        from llava_edge.images import fit

        before, after = reference_prompt(self._tokenizer, self._checkpoint, QUESTION)
        shown = self._reference.encode(fit(picture, self._checkpoint.description.image))
        tokens: list[int] = []
        logits: list[torch.Tensor] = []
        ends = end_tokens(self._checkpoint.text_config)
        while len(tokens) < TOKENS and ends.isdisjoint(tokens):
            first, last = self._reference.embed([before, [*after, *tokens]])
            (step,) = self._reference.logits([Prompt(np.concatenate([first, shown]), [last])], [1])
            logits.append(torch.from_numpy(step[0]))
            tokens.append(int(step[0].argmax()))
        return tokens, logits


def same_answer(found: Sequence[int], expected: Sequence[int], logits: Sequence[torch.Tensor]) -> bool:
    """Whether an answer is the expected one, or leaves it first where its two best tokens lie within a tie."""
    for index, token in enumerate(expected):
        if index >= len(found):
            return False
        if found[index] != token:
            return bool(logits[index][token] - logits[index][found[index]] <= TIE)
    return True


def chat_answers(bundle: Path, backend: str, shown: Sequence[Image.Image]) -> list[list[int]]:
    """Token ids of the answers that ``llava-edge chat`` gives, the one that ended them left out."""
    answers = []
    with llava_edge.load(bundle, n_threads=1, n_gpu_layers=0, vision_backend=backend, cache=False) as model:
        for picture in shown:
            with model.chat() as chat:
                answers.append(list(chat.ask(QUESTION, [picture], max_tokens=TOKENS).token_ids))
    return answers


def end_tokens(config: Any) -> set[int]:
    """Tokens that end an answer."""
    found = config.eos_token_id
    return set(found) if isinstance(found, list) else {found}


def twin(family: Family) -> Family:
    """The family whose checkpoint holds the same weights in transformers' format."""
    return replace(family, format="hf", own_tower=False, pickled=False)


def compare(name: str, work: Path) -> dict[str, Any]:
    """Convert one family with everything in float, and ask both sides about the pictures."""
    family = FAMILIES[name]
    directory = make(family, work / "checkpoint")
    report = convert_checkpoint(directory, work / "bundle", llm_type="F16", mmproj_type="F16", vision="int8")
    convert_checkpoint(directory, work / "exact", llm_type="F16", mmproj_type="F16", vision="fp32", verify=False)
    reference: Transformers | OwnReference
    own = family.projector != 2 or family.lora or not family.class_token
    if own:
        reference = OwnReference(directory)
    else:
        reference = Transformers(directory if family.format == "hf" else make(twin(family), work / "twin"))
    checkpoint = open_checkpoint(directory)
    shown = pictures()
    ends = end_tokens(checkpoint.text_config)
    same = 0
    for picture, found in zip(shown, chat_answers(work / "exact", "onnx", shown), strict=True):
        tokens, logits = reference.answer(picture, checkpoint)
        same += same_answer(found, [token for token in tokens if token not in ends], logits)
    return {**report["parity"], "same": same, "asked": len(shown), "own": own}


def row(name: str, figures: dict[str, Any]) -> str:
    """One line of the table."""
    onnx, mmproj, mtmd, llm = (figures[key] for key in ("onnx", "mmproj", "mtmd", "llm"))
    cells = [
        f"{name}{' ¹' if figures['own'] else ''}",
        f"{onnx['fp32']['cosine_min']:.6f}",
        f"{onnx['int8']['cosine_mean']:.4f} / {onnx['int8']['cosine_min']:.4f}",
        f"{mmproj['F16']['cosine_min']:.6f}",
        f"{mtmd['F16']['cosine_mean']:.3f}",
        f"{llm['F16']['kl_mean']:.1e}",
        f"{100 * llm['F16']['top1_agreement']:.1f} % of {llm['F16']['tokens'] - llm['F16']['ties']}",
        f"{figures['tokenizer']['identical']} of {figures['tokenizer']['texts']}",
        f"{figures['same']} of {figures['asked']}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = """# Parity

Made by `python -m llava_edge.convert.parity_table > docs/parity.md`.

Every family is a random checkpoint of a few hundred thousand parameters (`llava_edge.convert.tiny`), so the table
proves formats, names, graphs and tokenizers. It says nothing about how a trained model takes 8 bits: that stands in the
manifest of each bundle, under `parity`. Cosines are between the embeddings of a written file and those of the
reference, per image token. The reference is {versions}.

- *ONNX fp32*: lowest cosine (at least 0.9999 is needed). *int8*: mean (at least 0.995) and lowest.
- *mmproj F16*: lowest cosine through a correct reader (at least 0.999). *in mtmd*: mean cosine as llama.cpp's own
  libmtmd reads the same file; where it is wrong, the manifest ranks ONNX first.
- *LLM F16*: mean KL divergence (at most 1e-3 nats) and agreement of the likeliest token (at least 99 %) over the
  positions of greedy answers at which the reference's two best tokens lie more than 0.05 logits apart.
- *token ids*: texts and prompts whose ids are those of transformers.
- *same answers*: greedy answers of 64 tokens in `chat` (LLM F16, ONNX fp32) that are those of transformers' own
  classes, on five pictures: portrait, landscape, square, tiny, panorama. An answer counts as the same up to a first
  difference at which the reference's two best tokens lie within 0.05 logits. ¹ compared with the gate's own float32
  reference, because transformers has no class for it.

| family | ONNX fp32 | int8 | mmproj F16 | in mtmd | LLM KL | agreement | token ids | same answers |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Write the whole page to standard output."""
    rows, versions = [], ""
    for name in FAMILIES:
        sys.stderr.write(f"{name}\n")
        with tempfile.TemporaryDirectory() as work:
            figures = compare(name, Path(work))
        versions = figures["reference"]
        rows.append(row(name, figures))
    page = HEADER.format(versions=versions) + "\n".join(rows) + "\n"
    sys.stdout.write(page)


if __name__ == "__main__":
    main()
