"""The cache on disk: whatever is odd is a miss, and a hit gives the bits of a miss."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import llava_edge
from llava_edge import cache, images
from llava_edge.bundle import embedded_models
from llava_edge.cache import DiskCache, key_of
from llava_edge.engine import Engine
from llava_edge.errors import InputError
from llava_edge.remembered import Remembered
from llava_edge.types import ImageSpec
from llava_edge.vision.backends import open_encoder

KEY, OTHER = key_of(a=1), key_of(a=2)
PAYLOAD = bytes(range(256)) * 8


@pytest.fixture
def disk(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "computed", limit=100_000)


def entry(disk: DiskCache, key: str = KEY) -> Path:
    return disk.root / "prefixes" / key


def damages() -> dict[str, Callable[[bytes], bytes]]:
    def flip(place: int) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            at = place % len(data)
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

        return change

    return {
        "empty": lambda data: b"",
        "half a header": lambda data: data[:40],
        "no payload": lambda data: data[:80],
        "torn": lambda data: data[:-1],
        "too long": lambda data: data + b"\0",
        "zeros": lambda data: bytes(len(data)),
        "another magic": flip(0),
        "another key": flip(8),
        "another checksum": flip(40),
        "another length": flip(72),
        "a huge length": lambda data: data[:72] + b"\xff" * 8 + data[80:],
        "a flipped bit at the start": flip(80),
        "a flipped bit in the middle": flip(1000),
        "a flipped bit at the end": flip(-1),
        "random bytes": lambda data: np.random.default_rng(1).bytes(len(data)),
    }


def test_what_was_put_is_found(disk: DiskCache) -> None:
    assert disk.get("prefixes", KEY) is None
    disk.put("prefixes", KEY, [PAYLOAD[:100], memoryview(PAYLOAD)[100:]])
    found = disk.get("prefixes", KEY)
    assert found is not None
    assert bytes(found) == PAYLOAD
    assert disk.get("prefixes", OTHER) is None
    assert disk.get("embeddings", KEY) is None


@pytest.mark.parametrize("name", damages())
def test_a_damaged_entry_is_a_miss_and_is_replaced(disk: DiskCache, name: str) -> None:
    disk.put("prefixes", KEY, [PAYLOAD])
    entry(disk).write_bytes(damages()[name](entry(disk).read_bytes()))
    assert disk.get("prefixes", KEY) is None
    assert not disk.has("prefixes", KEY)
    disk.put("prefixes", KEY, [PAYLOAD])
    assert disk.get("prefixes", KEY) is not None


def test_every_flipped_bit_is_noticed(disk: DiskCache) -> None:
    disk.put("prefixes", KEY, [PAYLOAD[:64]])
    good = entry(disk).read_bytes()
    for bit in range(8 * len(good)):
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << bit % 8
        entry(disk).write_bytes(changed)
        assert disk.get("prefixes", KEY) is None, bit


def test_an_entry_under_another_name_is_a_miss(disk: DiskCache) -> None:
    disk.put("prefixes", KEY, [PAYLOAD])
    entry(disk).rename(entry(disk, OTHER))
    assert disk.get("prefixes", OTHER) is None


def test_what_is_no_file_is_a_miss_and_is_replaced(disk: DiskCache, tmp_path: Path) -> None:
    entry(disk).mkdir(parents=True)
    (entry(disk) / "inside").touch()
    assert disk.get("prefixes", KEY) is None
    os.mkfifo(entry(disk))
    assert disk.get("prefixes", KEY) is None
    entry(disk).symlink_to(tmp_path / "nowhere")
    assert disk.get("prefixes", KEY) is None
    disk.put("prefixes", KEY, [PAYLOAD])
    assert disk.get("prefixes", KEY) is not None
    assert not entry(disk).is_symlink()


def test_the_least_recently_used_go_first(disk: DiskCache) -> None:
    keys = [key_of(number=number) for number in range(4)]
    for number, key in enumerate(keys[:3]):
        disk.put("prefixes", key, [bytes(30_000)])
        os.utime(entry(disk, key), (number, number))
    assert disk.get("prefixes", keys[0]) is not None  # now it is the latest
    disk.put("prefixes", keys[3], [bytes(30_000)])
    assert [disk.has("prefixes", key) for key in keys] == [True, False, True, True]
    assert sum(found.n_bytes for found in disk.usage().values()) <= disk.limit
    disk.put("prefixes", OTHER, [bytes(200_000)])  # would push out everything
    assert disk.usage()["prefixes"].entries == 3


def test_what_killed_processes_left_is_cleaned_up(disk: DiskCache) -> None:
    disk.put("prefixes", KEY, [PAYLOAD])
    old, young = disk.root / "prefixes" / ".new-old", disk.root / "prefixes" / ".new-young"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (1, 1))
    disk.put("prefixes", OTHER, [PAYLOAD])
    assert not old.exists()
    assert young.exists()


def test_clear_empties_it(disk: DiskCache) -> None:
    disk.put("prefixes", KEY, [PAYLOAD])
    disk.put("embeddings", OTHER, [PAYLOAD])
    assert disk.clear().entries == 2
    assert disk.get("prefixes", KEY) is None
    assert all(found.entries == 0 for found in disk.usage().values())


@pytest.fixture
def not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_warned", False)


@pytest.mark.usefixtures("not_warned")
def test_a_full_disk_warns_once_and_goes_on(disk: DiskCache, caplog: pytest.LogCaptureFixture) -> None:
    disk.put("prefixes", KEY, [PAYLOAD])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # writing more fails, as on a full disk
    try:
        for number in range(3):
            disk.put("prefixes", key_of(number=number), [PAYLOAD])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "the disk is full" in warnings[0]
    assert disk.get("prefixes", KEY) is not None
    assert [path.name for path in (disk.root / "prefixes").iterdir()] == [KEY]


@pytest.mark.usefixtures("not_warned")
def test_a_place_that_can_not_be_written_costs_the_cache_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    disk = DiskCache(tmp_path / "file" / "computed", limit=100_000)
    disk.put("prefixes", KEY, [PAYLOAD])
    assert disk.get("prefixes", KEY) is None
    assert disk.clear().entries == 0
    assert "can't be written" in caplog.text


@pytest.mark.usefixtures("not_warned")
def test_a_place_that_can_not_be_looked_into_costs_the_cache_only(
    tmp_path: Path, not_root: Callable[[], AbstractContextManager[None]]
) -> None:
    tmp_path.chmod(0)
    disk = DiskCache(tmp_path / "computed", limit=100_000)
    with not_root():
        disk.put("prefixes", KEY, [PAYLOAD])
        assert disk.get("prefixes", KEY) is None
        assert not disk.has("prefixes", KEY)
    tmp_path.chmod(0o700)


def test_clear_counts_what_is_gone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    not_root: Callable[[], AbstractContextManager[None]],
) -> None:
    monkeypatch.chdir(tmp_path)
    disk = DiskCache(Path("computed"), limit=100_000)
    disk.put("prefixes", KEY, [PAYLOAD])
    for path in (Path(), Path("computed"), Path("computed/prefixes")):
        path.chmod(0o555)
    with not_root():
        assert disk.clear() == cache.Usage(0, 0)
    assert "1 entries in computed can't be deleted" in caplog.text
    Path("computed/prefixes").chmod(0o700)
    assert disk.clear().entries == 1


def test_several_processes_use_it_at_a_time(tmp_path: Path) -> None:
    """Each writes, reads, evicts and clears; whatever is found is whole."""
    code = """
import sys, random
from pathlib import Path
from llava_edge.bundle import embedded_models
from llava_edge.cache import DiskCache, key_of
disk = DiskCache(Path(sys.argv[1]), limit=60_000)
choose, hits = random.Random(int(sys.argv[2])), 0
for step in range(600):
    number = choose.randrange(6)
    found = disk.get("prefixes", key_of(number=number))
    if found is None:
        disk.put("prefixes", key_of(number=number), [bytes([number]) * 15_000])
    else:
        assert bytes(found) == bytes([number]) * 15_000
        hits += 1
    if step % 200 == 199:
        disk.clear()
assert hits > 50, hits
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "computed")]
    running = [subprocess.Popen([*command, str(n)], stderr=subprocess.PIPE, text=True) for n in range(3)]
    for process in running:
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said
        assert said == ""


@pytest.mark.parametrize("text", ["much", "-1", "1.5", ""])
def test_a_wrong_limit_is_said(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(cache.LIMIT_VARIABLE, text)
    with pytest.raises(InputError, match=f"{cache.LIMIT_VARIABLE} is '{text}'"):
        DiskCache()


def test_a_hundred_thousand_cases_of_keys_have_no_false_hit(engine: Engine, tmp_path: Path, disk: DiskCache) -> None:
    """Same bytes in other sizes, other crops, other preparations, other models of the same shapes."""
    random = np.random.default_rng(0)
    models = []
    for number in range(4):
        path = tmp_path / f"model{number}.gguf"
        path.write_bytes(b"same size")
        os.utime(path, (1, 1))
        models.append(Remembered(disk, engine, {path: f"{number:064x}"}))
    base = ImageSpec(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    specs = (base, replace(base, size=64), replace(base, mode="crop"), replace(base, mean=(0.5, 0.5, 0.4)), None)
    pixels = {}
    while len(pixels) < 1700:
        flat = random.integers(0, 256, 72, np.uint8)
        shapes = ((4, 6), (6, 4), (2, 12), (12, 2), (3, 8), (8, 3), (1, 24), (24, 1))
        for shape in shapes:
            picture = Image.fromarray(flat.reshape(*shape, 3))
            crop = picture.crop((0, 0, picture.width, picture.height - 1)) if picture.height > 1 else picture
            for image in (picture, crop):
                pixels[image.size, image.tobytes()] = images.content_hash(image)
    cases, keys = 0, set()
    for content in pixels.values():
        for model in models:
            for spec in specs:
                for count, backend in ((4, "onnx"), (4, "mtmd"), (16, "mtmd")):
                    key = model.picture_key(content, spec, count, backend)
                    assert key is not None
                    keys.add(key)
                    cases += 1
    assert cases >= 100_000
    assert len(keys) == cases
    again = Remembered(disk, engine, {tmp_path / "model0.gguf": f"{0:064x}"})
    assert again.picture_key(content, None, 16, "mtmd") in keys


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(cache.LIMIT_VARIABLE)
    return tmp_path / "home"


def ask(model: llava_edge.Model, pictures: list[Path], question: str = "What is it?") -> tuple[Any, ...]:
    """Tokens of an answer and all logits behind it; what was found."""
    with model.chat() as chat:
        reply = chat.ask(question, pictures, max_tokens=8)
    return reply.token_ids, model.cache.logits().tobytes(), reply.usage.cached_tokens


@pytest.mark.usefixtures("home")
def test_a_hit_gives_the_bits_of_a_miss(tiny_bundle: Path, pictures: list[Path]) -> None:
    options: dict[str, Any] = {"n_threads": 1, "n_ctx": 512}
    with llava_edge.load(tiny_bundle, cache=False, **options) as model:
        ids, logits, cached = ask(model, pictures[:2])
        other = ask(model, pictures[:2], "Where?")
    assert cached == 0
    with llava_edge.load(tiny_bundle, **options) as model:
        assert ask(model, pictures[:2]) == (ids, logits, 0)
    with llava_edge.load(tiny_bundle, **options) as model:
        found_ids, found_logits, cached = ask(model, pictures[:2])
        assert (found_ids, found_logits) == (ids, logits)
        assert cached > 8
        assert model.vision_backend is None  # the tower was not needed
        assert ask(model, pictures[:2], "Where?")[:2] == other[:2]


def test_damage_anywhere_in_a_models_cache_changes_nothing(tiny_bundle: Path, pictures: list[Path], home: Path) -> None:
    options: dict[str, Any] = {"n_threads": 1, "n_ctx": 512}
    with llava_edge.load(tiny_bundle, **options) as model:
        ids, logits, _ = ask(model, pictures[:1])
    good = {path: path.read_bytes() for path in (home / "computed").rglob("*") if path.is_file()}
    assert {path.parent.name for path in good} == {"embeddings", "prefixes"}
    for change in damages().values():
        for path, data in good.items():
            path.write_bytes(change(data))
        with llava_edge.load(tiny_bundle, **options) as model:
            assert ask(model, pictures[:1]) == (ids, logits, 0)
        assert {path: path.read_bytes() for path in good} == good  # written again, to the bit


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    "change", [{"n_ctx": 256}, {"image_tokens": 16}, {"flash_attention": False}, {"n_threads": 2}, {"n_seq_max": 2}]
)
def test_other_settings_find_nothing_of_the_prompt(
    tiny_bundle: Path, pictures: list[Path], change: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"n_threads": 1, "n_ctx": 512}
    with llava_edge.load(tiny_bundle, **options) as model:
        ask(model, pictures[:1])
    with llava_edge.load(tiny_bundle, **{**options, **change}) as model:
        assert ask(model, pictures[:1])[2] == 0


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_hit_gives_the_bits_of_a_miss_with_nano(kv_type: str) -> None:
    if "nano" not in embedded_models():
        pytest.skip("the embedded model nano is not there")
    picture = Path(__file__).parents[2] / "examples" / "coffee.jpg"
    found = []
    for step in range(3):
        with llava_edge.load("nano", kv_type=kv_type, cache=step > 0) as model:
            found.append(ask(model, [picture]))
    assert found[0] == found[1]
    assert found[2][:2] == found[0][:2]
    assert [cached > 0 for _, _, cached in found] == [False, False, True]


@pytest.mark.usefixtures("home")
def test_what_was_asked_is_no_part_of_what_is_kept(tiny_bundle: Path, pictures: list[Path]) -> None:
    sizes = []
    for question in ("What is it?", "What is it? " * 8):
        DiskCache().clear()
        with llava_edge.load(tiny_bundle, n_threads=1, n_ctx=512) as model:
            ask(model, pictures[:1], question)
        sizes.append(DiskCache().usage()["prefixes"])
    assert sizes[0].entries == 1
    assert sizes[0] == sizes[1]


@pytest.mark.usefixtures("home")
def test_what_was_read_ahead_is_kept(tiny_bundle: Path, pictures: list[Path]) -> None:
    with llava_edge.load(tiny_bundle, n_threads=1, n_ctx=512) as model, model.chat() as chat:
        chat.add_image(pictures[0])
        chat.read_ahead()
        first = chat.ask("What is it?", max_tokens=8)
    assert DiskCache().usage()["prefixes"].entries == 1
    with llava_edge.load(tiny_bundle, n_threads=1, n_ctx=512) as model, model.chat() as chat:
        second = chat.ask("What is it?", pictures[:1], max_tokens=8)
    assert second.token_ids == first.token_ids
    assert second.usage.cached_tokens > second.usage.image_tokens


@pytest.mark.usefixtures("home")
def test_a_raw_pair_is_known_by_its_content_from_the_second_time_on(
    tiny_llm: Path, tiny_mmproj: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """Hashing and writing go on beside the answer: what is sure is that a third process finds everything."""
    llm = tmp_path / "llm.gguf"
    llm.write_bytes(tiny_llm.read_bytes())
    cached = []
    for step in range(5):
        if step == 3:
            llm.write_bytes(tiny_llm.read_bytes())
            os.utime(llm, (time.time() + 5, time.time() + 5))  # changed, for all that is known without reading it
        with llava_edge.load(llm=llm, mmproj=tiny_mmproj, n_threads=1, n_ctx=256) as model:
            cached.append(ask(model, pictures[:1])[2] > 0)
    assert cached[0::2] == [False, True, True]
    assert DiskCache().usage()["prefixes"].entries == 1


@pytest.mark.usefixtures("home")
def test_without_the_cache_nothing_is_written(tiny_bundle: Path, pictures: list[Path], home: Path) -> None:
    with llava_edge.load(tiny_bundle, n_threads=1, n_ctx=256, cache=False) as model:
        ask(model, pictures[:1])
    assert not (home / "computed").exists()


@pytest.mark.usefixtures("home")
def test_a_damaged_tower_is_not_hidden_for_long(tiny_bundle: Path, pictures: list[Path]) -> None:
    """Only a picture that was seen before is answered without the tower."""
    with llava_edge.load(tiny_bundle, n_threads=1, n_ctx=512) as model:
        ask(model, pictures[:1])
        assert model.bundle is not None
        _, encoder = open_encoder(model.bundle, model.engine, "auto")
        encoder.close()
    with llava_edge.load(tiny_bundle, n_threads=1, n_ctx=512) as model:
        ask(model, pictures[1:2])
        assert model.vision_backend == "mtmd"
