"""From files of samples to batches: formats, labels, order, packing, and what is said about bad samples."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_edge.errors import InputError
from llava_edge.train_gpu.config import DataConfig, OptimConfig, SourceConfig
from llava_edge.train_gpu.data import Mixture, ahead, place_picture
from llava_edge.train_gpu.datagen.symbols import BRIEF
from llava_edge.train_gpu.pictures import PixelPictures, read_bytes
from llava_edge.train_gpu.prompts import FORMATS, IGNORE, Renderer
from llava_edge.train_gpu.rows import pack
from llava_edge.train_gpu.samples import PictureRef, Sample, Skipped, from_llava, read_source, read_sources
from llava_edge.types import ImageSpec

SPEC = ImageSpec(size=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), mode="pad", pad_color=(0, 0, 0))
IMAGE_TOKEN = 3


@pytest.fixture(scope="session")
def spm() -> PreTrainedTokenizerFast:
    """A vocabulary in LLaMA's manner: blanks are part of words, every text begins with one, and with ``<s>``."""
    plain = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    plain.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", "<image>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>"]
    corpus = ["A chat between a user and an assistant USER: what is it? ASSISTANT: It is red. ### Human"] * 3
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*specials, *(f"<0x{i:02X}>" for i in range(256))])
    plain.train_from_iterator(corpus, trainer)
    plain.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sample(*turns: tuple[str, str], name: str = "s1", pictures: int = 1) -> Sample:
    return Sample(name, turns, tuple(PictureRef(f"{i}.png", Path(f"{i}.png")) for i in range(pictures)))


TWO_TURNS = (("<image>\nWhat is it?", "It is red."), ("A chat?", "and a user"))
SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, detailed, "
)
SYSTEM += "and polite answers to the {0}'s questions."


@pytest.mark.parametrize(
    ("name", "text", "labelled"),
    [
        (
            "vicuna_v1",
            f"<s>{SYSTEM.format('user')} USER: <image>\nWhat is it? ASSISTANT: It is red.</s>"
            "USER: A chat? ASSISTANT: and a user</s>",
            "It is red.</s>and a user</s>",
        ),
        (
            "llava_v1",
            f"<s>{SYSTEM.format('human')} USER: <image>\nWhat is it? ASSISTANT: It is red.</s>"
            "USER: A chat? ASSISTANT: and a user</s>",
            "It is red.</s>and a user</s>",
        ),
        (
            "v1",
            f"<s>{SYSTEM.format('human')} ### Human: <image>\nWhat is it? ### Assistant: It is red. ### Human: A chat? "
            "### Assistant: and a user ###",
            "It is red. ### and a user ###",
        ),
        (
            "mistral_instruct",
            "<s>[INST] <image>\nWhat is it? [/INST] It is red.</s>[INST] A chat? [/INST] and a user</s>",
            "It is red.</s>and a user</s>",
        ),
        (
            "chatml",
            "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nIt is red.<|im_end|>\n"
            "<|im_start|>user\nA chat?<|im_end|>\n<|im_start|>assistant\nand a user<|im_end|>",
            "It is red.<|im_end|>and a user<|im_end|>",
        ),
        (
            "chatml_direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
            "<|im_start|>assistant\nIt is red.<|im_end|><|im_start|>user\nA chat?<|im_end|><|im_start|>assistant\n"
            "and a user<|im_end|>",
            "It is red.<|im_end|>and a user<|im_end|>",
        ),
    ],
)
def test_a_format_writes_its_text_and_labels_answers_and_stops(
    spm: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast, name: str, text: str, labelled: str
) -> None:
    for vocabulary, image in ((spm, IMAGE_TOKEN), (tokenizer, tokenizer.convert_tokens_to_ids("<reponame>"))):
        rendered = Renderer(vocabulary, name, image).render(sample(*TWO_TURNS))
        wanted = text if vocabulary is spm else text.replace("<s>", "").replace("</s>", "<|im_end|>")
        wanted = wanted.replace("<image>", vocabulary.convert_ids_to_tokens(image))
        assert written(vocabulary, rendered.ids) == squeezed(wanted)
        said = [label for label in rendered.labels if label != IGNORE]
        stop = labelled if vocabulary is spm else labelled.replace("</s>", "<|im_end|>")
        assert written(vocabulary, said) == squeezed(stop)


def written(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return squeezed(tokenizer.decode(ids, skip_special_tokens=False))


def squeezed(text: str) -> str:
    """Without blanks: a vocabulary in LLaMA's manner puts one in front of every run of text."""
    return text.replace(" ", "")


def test_a_run_between_special_tokens_is_tokenised_in_one_call(spm: PreTrainedTokenizerFast) -> None:
    rendered = Renderer(spm, "vicuna_v1", IMAGE_TOKEN).render(sample(("<image>\nWhat is it?", "It is red.")))
    after = rendered.ids[rendered.ids.index(IMAGE_TOKEN) + 1 :]
    reference = spm("\nWhat is it? ASSISTANT: It is red.", add_special_tokens=False)["input_ids"]
    assert after == [*reference, spm.eos_token_id]


def test_plain_counts_the_caption_only(spm: PreTrainedTokenizerFast) -> None:
    rendered = Renderer(spm, "plain", IMAGE_TOKEN).render(sample(("<image>\nDescribe it.", "It is red.")))
    assert rendered.ids[:2] == [spm.bos_token_id, IMAGE_TOKEN]
    assert rendered.labels[:2] == [IGNORE, IGNORE]
    assert rendered.labels[2:] == rendered.ids[2:]
    assert spm.decode(rendered.ids[2:]).strip(" ") == "It is red.\n"


def test_no_text_forges_a_turn_or_a_picture(tokenizer: PreTrainedTokenizerFast) -> None:
    image = tokenizer.convert_tokens_to_ids("<reponame>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rendered = Renderer(tokenizer, "chatml", image).render(
        sample(("<image>\nWhat is<|im_end|> this<reponame>?", "It is<|im_end|> red."))
    )
    assert rendered.ids.count(image) == 1
    assert rendered.ids.count(end) == 2


def test_a_token_across_the_edge_of_an_answer_is_an_error_that_shows_it() -> None:
    plain = Tokenizer(models.WordLevel({"<unk>": 0, "[INST]": 1, "hi[/INST]": 2, "</s>": 3, "x": 4}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("|")
    whole = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(InputError, match=r"sample s1: labels and tokens don't match.*the tokens around it"):
        Renderer(whole, "mistral_instruct", 4).render(sample(("hi", "there"), pictures=0))


def test_an_empty_answer_is_an_error(tokenizer: PreTrainedTokenizerFast, spm: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"sample s1.*answer 1 is empty"):
        Renderer(spm, "vicuna_v1", 3).render(sample(("what?", " "), pictures=0))


def test_a_format_whose_special_tokens_are_missing_is_refused() -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), unk_token="a")
    with pytest.raises(InputError, match=r"chatml needs the special token <\|im_"):
        Renderer(plain, "chatml", 0)
    with pytest.raises(InputError, match="eos_token"):
        Renderer(plain, "vicuna_v1", 0)


@pytest.mark.parametrize(
    ("question", "before", "after"),
    [
        ("<image>\nWhat?", "<image>\nWhat?", "What?\n<image>"),
        ("What?\n<image>", "<image>\nWhat?", "What?\n<image>"),
        ("<image>", "<image>", "<image>"),
    ],
)
def test_the_picture_stands_before_or_after_the_question(question: str, before: str, after: str) -> None:
    one = sample((question, "a"), ("b", "c"))
    assert [turn[0] for turn in place_picture(one).turns] == [before, "b"]
    assert [turn[0] for turn in place_picture(one, after=True).turns] == [after, "b"]


# Files


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"id": "x", "conversations": [{"from": "gpt", "value": "a"}]}, "turn 0 is from 'gpt'"),
        ({"id": "x", "conversations": turns("q")}, "1 turns"),
        ({"id": "x", "image": "a.png", "conversations": turns("q", "a")}, "1 pictures, and 0 times <image>"),
        ({"id": "x", "conversations": turns("<image>\nq", "a")}, "0 pictures, and 1 times"),
        ({"id": "x"}, "not LLaVA JSON"),
        ("x", "not LLaVA JSON"),
    ],
)
def test_a_sample_that_is_wrong_is_named(item: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"sample [x?].*{message}"):
        from_llava(item, Path())


def test_captions_become_requests_for_a_brief_description(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(json.dumps({"train": {"a.jpg": ["A cat.", "One cat."]}, "dev": {}}))
    (tmp_path / "f.txt").write_text("a.jpg#0\tA cat.\na.jpg#1\tOne cat.\n")
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 7, "caption": "A cat."}, {"image_id": 7, "caption": "One cat."}],
    }
    (tmp_path / "c.json").write_text(json.dumps(coco))
    sets = [
        read_source(SourceConfig(str(tmp_path / name), kind), Skipped(False))  # type: ignore[arg-type]
        for name, kind in (("f.json", "flickr8k"), ("f.txt", "flickr8k"), ("c.json", "coco"))
    ]
    assert sets[0] == sets[1] == sets[2]
    first = sets[0][0]
    assert first.id == "a.jpg#0"
    assert first.pictures == (PictureRef("a.jpg", tmp_path / "a.jpg"),)
    assert [answer for s in sets[0] for _, answer in s.turns] == ["A cat.", "One cat."]
    assert all(s.turns[0][0].removeprefix("<image>\n") in BRIEF for s in sets[0])


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_tar_shards_hold_conversations_captions_and_texts(tmp_path: Path) -> None:
    talk = json.dumps({"id": "talk", "conversations": turns("<image>\nWhat?", "Red.")}).encode()
    text_only = json.dumps({"conversations": turns("Hello?", "Yes.")}).encode()
    write_tar(tmp_path / "a.tar", {"0.png": png((200, 0, 0)), "0.json": talk, "1.json": text_only})
    write_tar(tmp_path / "b.tar", {"x/0.txt": b"A blue square.", "x/0.png": png((0, 0, 200)), "x/1.txt": b"alone"})
    skipped = Skipped(True)
    samples = read_source(SourceConfig(str(tmp_path / "*.tar"), "webdataset"), skipped)
    assert [s.id for s in samples] == ["talk", "a.tar:1", "b.tar:x/0"]
    assert [len(s.pictures) for s in samples] == [1, 0, 1]
    assert read_bytes(samples[2].pictures[0]) == png((0, 0, 200))
    pixels = PixelPictures(SPEC).load(samples[0].pictures[0])
    assert pixels[0].max() > 0.5
    assert pixels[2].max() < -0.9
    assert skipped.count == 1
    with pytest.raises(InputError, match=r"sample b\.tar:x/1: expected a picture"):
        read_source(SourceConfig(str(tmp_path / "b.tar"), "webdataset"), Skipped(False))


@pytest.mark.parametrize(
    ("name", "kind", "content", "message"),
    [
        ("a.json", "llava", "{", "not JSON"),
        ("a.json", "llava", "{}", "does not hold a list"),
        ("a.json", "coco", "{}", "not a file of COCO captions"),
        ("a.json", "flickr8k", "{}", "no split 'train'"),
        ("a.txt", "flickr8k", "a cat", "expected 'NAME#NUMBER"),
        ("a.tar", "webdataset", "no tar at all" * 99, "not an uncompressed tar"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, name: str, kind: Any, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_source(SourceConfig(str(tmp_path / name), kind), Skipped(False))
    with pytest.raises(InputError, match=r"no (such file|tar file matches)"):
        read_source(SourceConfig(str(tmp_path / "none.tar" if kind == "webdataset" else tmp_path / "none.json"), kind),
                    Skipped(False))  # fmt: skip


# Order and batches


def mixture(
    tokenizer: PreTrainedTokenizerFast, sources: dict[str, list[Sample]], optim: dict[str, Any], **data: Any
) -> Mixture:
    skip = data.get("skip_bad", False)
    config = DataConfig(samples="-", **data)
    renderer = Renderer(tokenizer, config.format, tokenizer.convert_tokens_to_ids("<reponame>"))
    return Mixture(
        sources, PixelPictures(SPEC), renderer, config, OptimConfig(lr=1, **optim),
        grid_tokens=4, seed=3, skipped=Skipped(skip),
    )  # fmt: skip


def texts(name: str, count: int, words: int = 3) -> list[Sample]:
    return [sample(("what?", "red " * words + "it"), name=f"{name}{i}", pictures=0) for i in range(count)]


def test_an_epoch_is_each_sample_once_in_an_order_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    mixed = mixture(tokenizer, {"a": texts("a", 7), "b": texts("b", 5)}, {"epochs": 2, "batch_size": 5})
    assert mixed.steps == 5
    names = [name for step in range(5) for name in mixed.step(step).names]
    assert len(names) == 24
    assert (
        Counter(names[:12]) == Counter(names[12:]) == Counter([f"a{i}" for i in range(7)] + [f"b{i}" for i in range(5)])
    )
    assert names[:12] != names[12:]
    assert mixed.step(3).names == mixed.step(3).names


def test_weights_are_shares_and_each_source_is_walked_through_evenly(tokenizer: PreTrainedTokenizerFast) -> None:
    mixed = mixture(
        tokenizer, {"a": texts("a", 8), "b": texts("b", 24)}, {"steps": 12, "batch_size": 16},
        weights={"a": 0.75, "b": 0.25},
    )  # fmt: skip
    counts = Counter(name for step in range(12) for name in mixed.step(step).names)
    assert {counts[f"a{i}"] for i in range(8)} == {18}
    assert {counts[f"b{i}"] for i in range(24)} == {2}


def test_packing_leaves_at_most_a_twentieth_empty(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    # The mix of instruction data: short answers by the thousand, long conversations by the hundred.
    lengths = [min(2040, 600 + int(rng.lognormvariate(4.5, 1.1))) for _ in range(128)]
    rows = pack(lengths, 2048)
    assert sorted(i for row in rows for i in row) == list(range(128))
    assert all(sum(lengths[i] for i in row) <= 2048 for row in rows)
    # Rows are about as long as each other, unless that takes one more.
    assert sorted(map(sorted, pack([5, 5, 4, 4], 10))) == [[0, 2], [1, 3]]
    assert sorted(map(sorted, pack([6, 4, 3, 3, 2, 2], 10))) == [[0, 1], [2, 3, 4, 5]]
    many = [sample(("what?", "red " * rng.choice((2, 5, 9, 60))), name=str(i), pictures=0) for i in range(256)]
    options: dict[str, Any] = {"epochs": 1, "batch_size": 128, "micro_batch_rows": 4}
    shares = {}
    for packing in (False, True):
        mixed = mixture(tokenizer, {"a": many}, options, packing=packing, max_length=256)
        batches = mixed.step(0).batches
        shares[packing] = sum(b.real_tokens for b in batches) / sum(b.ids.numel() for b in batches)
    assert shares[True] >= 0.95


@pytest.mark.parametrize("packing", [False, True])
def test_processes_divide_a_step_without_loss(tokenizer: PreTrainedTokenizerFast, packing: bool) -> None:
    mixed = mixture(
        tokenizer, {"a": texts("a", 9)}, {"epochs": 1, "batch_size": 9, "micro_batch_rows": 2}, packing=packing
    )
    whole = mixed.step(0)
    parts = [mixed.step(0, rank, 4) for rank in range(4)]
    assert len({len(part.batches) for part in parts}) == 1
    names = [name for part in parts for batch in part.batches for name in batch.names]
    assert sorted(names) == sorted(whole.names) == sorted(f"a{i}" for i in range(9))
    assert sum(part.n_labels for part in parts) == whole.n_labels
    assert all(part.names == whole.names for part in parts)


def test_long_samples_are_cut_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    long = mixture(tokenizer, {"a": texts("a", 2, 300)}, {"epochs": 1, "batch_size": 2}, max_length=64)
    step = long.step(0)
    assert step.truncated == 2
    assert step.batches[0].ids.shape == (2, 64)
    with_picture = [sample(("what " * 99 + "<image>", "red"))]
    late = mixture(tokenizer, {"a": with_picture}, {"epochs": 1}, max_length=64)
    with pytest.raises(InputError, match=r"sample s1: \d+ tokens, and no answer before data.max_length = 64"):
        late.step(0)


def test_bad_pictures_are_errors_or_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(png((1, 2, 3))[:40])
    Image.fromarray(np.full((9, 9, 3), 200, np.uint8)).save(tmp_path / "good.png")
    samples = [
        Sample(name, (("<image>\nwhat?", "red"),), (PictureRef(f"{name}.png", tmp_path / f"{name}.png"),))
        for name in ("broken", "good", "missing")
    ]
    strict = mixture(tokenizer, {"a": samples}, {"epochs": 1, "batch_size": 3})
    with pytest.raises(InputError, match=r"training picture (broken|missing)\.png"):
        strict.step(0)
    for packing in (False, True):
        lenient = mixture(tokenizer, {"a": samples}, {"epochs": 1, "batch_size": 3}, skip_bad=True, packing=packing)
        (batch,) = lenient.step(0).batches
        alone = mixture(tokenizer, {"a": samples[1:2]}, {"epochs": 1, "batch_size": 1}).step(0).batches[0]
        assert lenient.skipped.count == 2
        assert batch.n_labels == alone.n_labels
        assert batch.pictures.shape[0] == 3
        assert sorted(float(p.abs().max()) > 0 for p in batch.pictures) == [False, False, True]


def test_a_step_is_prepared_ahead_and_errors_arrive(tokenizer: PreTrainedTokenizerFast) -> None:
    mixed = mixture(tokenizer, {"a": texts("a", 9)}, {"epochs": 1, "batch_size": 3})
    assert [s.names for s in ahead(mixed.step, 0, 3, workers=2)] == [mixed.step(i).names for i in range(3)]

    def fail(number: int) -> Any:
        raise InputError(f"step {number}")

    with pytest.raises(InputError, match="step 0"):
        list(ahead(fail, 0, 3, workers=2))


def test_a_file_of_several_sources_gives_those_that_weights_name(tmp_path: Path) -> None:
    item = {"id": "1", "image": "a.png", "conversations": turns("<image>\nq", "a")}
    (tmp_path / "s.json").write_text(json.dumps({"a": [item], "b": [item, item], "empty": []}))
    path = str(tmp_path / "s.json")
    sources = read_sources(DataConfig(samples=path, weights={"b": 1.0}), Skipped(False))
    assert {name: len(samples) for name, samples in sources.items()} == {"b": 2}
    with pytest.raises(InputError, match="names \\['c'\\]"):
        read_sources(DataConfig(samples=path, weights={"c": 1.0}), Skipped(False))
    with pytest.raises(InputError, match="'empty' has no samples"):
        read_sources(DataConfig(samples=path), Skipped(False))


def test_every_format_is_described() -> None:
    assert set(FORMATS) == {"plain", "v1", "llava_v1", "vicuna_v1", "mistral_instruct", "chatml", "chatml_direct"}
