"""The C functions through ctypes: bad input gives a status and a line, pictures are Python's, towers are right."""

from __future__ import annotations

import ctypes
import io
import json
import locale
import random
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib

import gguf
import mutate
import numpy as np
import PIL
import pytest
from clib import (
    BUSY,
    CONTEXT_FULL,
    IMAGE_INVALID,
    IMAGE_LIMIT,
    IMAGE_UNSUPPORTED,
    INVALID_ARGUMENT,
    IO,
    KNOWN,
    MODEL_INVALID,
    NOT_FOUND,
    OK,
    ROOT,
    STATE_INVALID,
    STOPPED,
    UNSUPPORTED,
    ModelParams,
    load,
    manifest_of,
    said,
)
from PIL import Image
from towers import Shape, Type, write


@pytest.fixture(scope="module")
def model(library, nano):
    handle, params = ctypes.c_void_p(), ModelParams()
    library.llava_edge_model_params_init(ctypes.byref(params))
    params.n_ctx = 512
    assert library.llava_edge_model_load(str(nano).encode(), ctypes.byref(params), ctypes.byref(handle)) == OK
    yield handle
    library.llava_edge_model_free(handle)


@pytest.fixture
def session(library, model):
    handle = ctypes.c_void_p()
    assert library.llava_edge_session_create(model, ctypes.byref(handle)) == OK
    yield handle
    library.llava_edge_session_free(handle)


def load_tower(library, path) -> int:
    handle = ctypes.c_void_p()
    status = library.llava_edge_tower_load(str(path).encode(), None, ctypes.byref(handle))
    library.llava_edge_tower_free(handle)
    return status


def ask(library, session, text: str) -> int:
    assert library.llava_edge_session_add_text(session, 1, text.encode()) == OK
    return library.llava_edge_session_generate(session, None, None, None, None)


def test_null_is_refused_everywhere_and_freed_anywhere(library):
    assert library.llava_edge_model_load(None, None, None) == INVALID_ARGUMENT
    assert said(library) == "directory is NULL"
    for name, args in {
        "session_create": (None, None), "session_add_image_file": (None, None), "session_add_text": (None, 1, None),
        "session_generate": (None,) * 5, "session_truncate": (None, 0), "session_reset": (None,),
        "session_save": (None, None), "session_load": (None, None), "tower_load": (None, None, None),
    }.items():  # fmt: skip
        assert getattr(library, f"llava_edge_{name}")(*args) == INVALID_ARGUMENT, name
    for name in ("model_free", "session_free", "tower_free", "session_stop", "model_params_init"):
        getattr(library, f"llava_edge_{name}")(None)


def test_every_status_has_words(library):
    words = {library.llava_edge_status_string(number) for number in KNOWN}
    assert len(words) == len(KNOWN)
    assert library.llava_edge_status_string(9999) == b"unknown status"


def test_a_struct_without_a_size_is_refused(library, nano):
    params = ModelParams()
    handle = ctypes.c_void_p()
    status = library.llava_edge_model_load(str(nano).encode(), ctypes.byref(params), ctypes.byref(handle))
    assert status == INVALID_ARGUMENT
    assert "struct_size" in said(library)


@pytest.mark.parametrize(
    ("field", "value"), [("n_ctx", -1), ("n_threads", 5000), ("image_tokens", 7), ("n_gpu_layers", -2)]
)
def test_a_parameter_out_of_range_is_named(library, nano, field, value):
    params, handle = ModelParams(), ctypes.c_void_p()
    library.llava_edge_model_params_init(ctypes.byref(params))
    setattr(params, field, value)
    status = library.llava_edge_model_load(str(nano).encode(), ctypes.byref(params), ctypes.byref(handle))
    assert status == INVALID_ARGUMENT
    assert field in said(library)


@pytest.fixture
def bundle(nano, tmp_path):
    """A copy of nano whose manifest may be changed; the large files are links."""
    for file in nano.iterdir():
        if file.suffix == ".gguf":
            (tmp_path / file.name).symlink_to(file)
    return tmp_path


def change(manifest: dict, path: str, value) -> None:
    *parents, last = path.split(".")
    for key in parents:
        manifest = manifest[int(key) if key.isdigit() else key]
    manifest[last] = value


@pytest.mark.parametrize(
    ("path", "value", "status", "words"),
    [
        ("schema", 2, MODEL_INVALID, "schema is 2"),
        ("surplus", 1, MODEL_INVALID, "surplus"),
        ("name", 3, MODEL_INVALID, "name is not a text"),
        ("files.0.path", "../llm.gguf", MODEL_INVALID, "path"),
        ("files.0.bytes", 5, MODEL_INVALID, "bytes"),
        ("files.1.role", "llm", MODEL_INVALID, "same role"),
        ("prompt.system", "none", MODEL_INVALID, "prompt.system"),
        ("image.mode", "anyres", MODEL_INVALID, "image.grid has 0 entries"),
        ("image.mode", "tiles", MODEL_INVALID, "image.mode is 'tiles'"),
        ("image.grid", [[224, 448]], MODEL_INVALID, "the others none"),
        ("image.grid", 3, MODEL_INVALID, "image.grid is not a list"),
        ("image.max_tiles", 2, MODEL_INVALID, "image.max_tiles is 2"),
        ("image.size", 0, MODEL_INVALID, "image.size is 0"),
        ("image.pad_color", [1, 2], MODEL_INVALID, "image.pad_color"),
        ("image.size", 336, MODEL_INVALID, "336"),
        ("visual_tokens.grid", [3, 3], MODEL_INVALID, "visual_tokens.grid"),
        ("visual_tokens.default", 9, MODEL_INVALID, "visual_tokens.default"),
        ("probe.embeddings", "?", MODEL_INVALID, "base64"),
        ("probe.token_rows", [1], 32, "cosine"),
    ],
)
def test_a_wrong_manifest_is_refused_by_its_key(library, bundle, nano, path, value, status, words):
    manifest = manifest_of(nano)
    change(manifest, path, value)
    (bundle / "llava-edge.json").write_text(json.dumps(manifest))
    assert load(library, bundle) == status
    assert words in said(library)


def test_a_default_system_text_needs_a_place(library, bundle, nano):
    manifest = manifest_of(nano)
    manifest["prompt"].update(system="", default_system="Be short.")
    (bundle / "llava-edge.json").write_text(json.dumps(manifest))
    assert load(library, bundle) == MODEL_INVALID
    assert "prompt.default_system" in said(library)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 1, "schema": 1}', '{"schema": NaN}', "\x00", '"\ud800"', "[" * 500]
)
def test_what_is_no_manifest_is_refused(library, tmp_path, text):
    (tmp_path / "llava-edge.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert load(library, tmp_path) == MODEL_INVALID


@pytest.fixture
def decimal_comma(tmp_path, monkeypatch):
    """A locale that writes 0,5: one of the machine's, or one that is made here."""
    before = locale.setlocale(locale.LC_NUMERIC)
    if localedef := shutil.which("localedef"):
        made = tmp_path / "locales"
        made.mkdir()
        german = made / "de_DE.UTF-8"
        subprocess.run([localedef, "-i", "de_DE", "-f", "UTF-8", german], check=False, capture_output=True)
        if german.exists():
            monkeypatch.setenv("LOCPATH", str(made))
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8"):
        try:
            locale.setlocale(locale.LC_NUMERIC, name)
            break
        except locale.Error:
            continue
    else:
        pytest.skip("no locale here has a decimal comma")
    yield
    locale.setlocale(locale.LC_NUMERIC, before)


def test_a_manifest_has_points_whatever_the_locale_has(library, bundle, nano, decimal_comma):
    # The files are missing, so that nothing is loaded.
    (bundle / "llava-edge.json").write_bytes((nano / "llava-edge.json").read_bytes().replace(b".gguf", b".none"))
    assert load(library, bundle) == NOT_FOUND, said(library)


def test_no_bundle_is_not_found(library, tmp_path):
    assert load(library, tmp_path / "none") == NOT_FOUND
    assert load(library, tmp_path) == NOT_FOUND


def test_swapped_files_are_refused(library, nano):
    assert load_tower(library, nano / "llm-IQ4_NL.gguf") == MODEL_INVALID
    assert "general.architecture" in said(library)


@pytest.mark.parametrize(
    ("key", "kind", "value", "words"),
    [
        ("llama.expert_group_count", 4, 2, "expert_group_count"),
        ("llama.attention.head_count_kv", 9, [2, 1], "head_count_kv"),
        ("llama.attention.head_count", 9, [4, 2], "head_count"),
        ("tokenizer.ggml.tokens", 9, b"a\0x", "zero byte"),
    ],
)
def test_a_language_model_that_would_abort_llama_cpp_is_refused(
    library, bundle, nano, make_llm, key, kind, value, words
):
    parts = mutate.parse(make_llm().read_bytes())
    if isinstance(value, bytes):
        next(entry for entry in parts.entries if entry.key == key.encode()).value[9] = value
    else:
        parts.entries = [entry for entry in parts.entries if entry.key != key.encode()]
        parts.entries.append(mutate.Entry(key.encode(), kind, value, 4 if kind == 9 else None))
    (bundle / "tiny.gguf").write_bytes(mutate.build(parts))
    manifest = manifest_of(nano)
    entry = next(entry for entry in manifest["files"] if entry["role"] == "llm")
    entry.update(path="tiny.gguf", bytes=(bundle / "tiny.gguf").stat().st_size)
    (bundle / "llava-edge.json").write_text(json.dumps(manifest))
    assert load(library, bundle) == MODEL_INVALID
    assert words in said(library)


def test_a_tower_that_is_too_wide_for_its_patches_is_refused(library, tmp_path):
    wide = Shape(width=32, hidden=1 << 16, heads=1, blocks=1, image=256, patch=4, layers=(1,))
    assert load_tower(library, write(tmp_path / "wide.gguf", wide, Type.F16)) == MODEL_INVALID
    assert "up to 65536 wide with 4096 patches" in said(library)


def test_attention_that_takes_too_much_memory_is_refused(library, tmp_path):
    large = Shape(width=64, hidden=32, heads=64, blocks=1, image=256, patch=4, layers=(1,))
    assert load_tower(library, write(tmp_path / "large.gguf", large, Type.F16)) == MODEL_INVALID
    assert "head_count is 64 with 4096 patches" in said(library)


def test_the_largest_graph_a_file_can_ask_for_fits(library, tmp_path, monkeypatch):
    # Keys of another type keep the three matrices apart, and every layer's features are joined to the others.
    add = gguf.GGUFWriter.add_tensor

    def mixed(writer, name, values, raw_dtype=None):
        keys = name.endswith("attn_k.weight")
        add(writer, name, values.astype(np.float16) if keys else values, raw_dtype=Type.F16 if keys else raw_dtype)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", mixed)
    deep = Shape(width=32, hidden=32, heads=1, blocks=167, image=28, layers=tuple(range(168)))
    assert load_tower(library, write(tmp_path / "deep.gguf", deep, Type.F32)) == OK, said(library)


def test_mutated_mmproj_files_give_statuses_only(library, nano, tmp_path):
    original = (nano / "mmproj-Q8_0.gguf").read_bytes()
    head = 16384
    chance = random.Random(5)
    path = tmp_path / "mutated.gguf"
    shutil.copy(nano / "mmproj-Q8_0.gguf", path)
    seen = set()
    for _ in range(400):
        data = bytearray(original[:head])
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(head)] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        with path.open("r+b") as file:
            file.write(data)
        seen.add(load_tower(library, path))
    assert seen <= KNOWN
    assert MODEL_INVALID in seen
    for size in (0, 3, 4, 24, 1000, 20000, len(original) - 1):
        path.write_bytes(original[:size])
        assert load_tower(library, path) == MODEL_INVALID


def test_mutated_manifests_give_statuses_only(library, bundle, nano):
    original = (nano / "llava-edge.json").read_bytes()
    chance = random.Random(6)
    for _ in range(400):
        data = bytearray(original)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(3000)] = chance.randrange(256)
        # The files are missing, so that nothing is loaded.
        (bundle / "llava-edge.json").write_bytes(data.replace(b".gguf", b".none"))
        assert load(library, bundle) in {NOT_FOUND, MODEL_INVALID, UNSUPPORTED}


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (50, 1), (300, 200), (224, 224), (1000, 20), (641, 777)])
@pytest.mark.parametrize("target", [(224, 224), (336, 336), (1, 1), (31, 500)])
def test_resizing_is_pillows(library, size, target):
    compare_with_pillow(library, size, target)


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="older ones always begin with the width")
@pytest.mark.parametrize(
    ("size", "target"),
    [((40, 70), (56, 56)), ((20, 300), (56, 56)), ((100, 101), (80, 59)), ((100, 101), (80, 61)), ((30, 99), (31, 99))],
)
def test_resizing_takes_width_and_height_in_pillows_order(library, size, target):
    compare_with_pillow(library, size, target)


def compare_with_pillow(library, size, target):
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC))
    found = np.zeros_like(expected)
    into, tight = found.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(0)
    status = library.llava_edge_resize(pixels.ctypes.data_as(ctypes.c_void_p), *size, tight, into, *target, tight)
    assert status == OK
    assert np.array_equal(found, expected)


def test_resizing_over_a_picture_that_is_too_large_is_refused(library):
    pixel = (ctypes.c_uint8 * 3)()
    tight = ctypes.c_size_t(0)
    for size, target in (((44690, 44690), (1, 1)), ((1, 1), (44690, 44690)), ((1, 1), (101, 1))):
        assert library.llava_edge_resize(pixel, *size, tight, pixel, *target, tight) == IMAGE_LIMIT
    assert library.llava_edge_resize(pixel, 0, 1, tight, pixel, 1, 1, tight) == INVALID_ARGUMENT


def add_bytes(library, session, data: bytes) -> int:
    return library.llava_edge_session_add_image_bytes(session, data, ctypes.c_size_t(len(data)))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pictures_that_are_none_are_refused(library, session, tmp_path):
    jpeg = (ROOT / "examples" / "cat.jpg").read_bytes()
    png = encoded(Image.new("RGB", (40, 30)), "PNG")
    assert add_bytes(library, session, b"") == IMAGE_UNSUPPORTED
    assert add_bytes(library, session, b"no picture at all") == IMAGE_UNSUPPORTED
    assert add_bytes(library, session, jpeg[: len(jpeg) // 2]) == IMAGE_INVALID
    assert add_bytes(library, session, png[:-30]) == IMAGE_INVALID
    assert add_bytes(library, session, b"P6 4 4 255\n123") == IMAGE_INVALID
    assert add_bytes(library, session, b"P6 100000 100000 255\n") == IMAGE_LIMIT
    assert add_bytes(library, session, encoded(Image.new("L", (600, 2)), "PNG")) == IMAGE_LIMIT
    assert library.llava_edge_session_add_image_file(session, str(tmp_path / "none.jpg").encode()) == NOT_FOUND
    assert library.llava_edge_session_add_image_file(session, str(tmp_path).encode()) == IO
    pixels = (ctypes.c_uint8 * 12)()
    for width, height, stride in ((0, 2, 0), (-1, 2, 0), (2, 2, 5)):
        status = library.llava_edge_session_add_image_rgb(session, pixels, width, height, ctypes.c_size_t(stride))
        assert status in (IMAGE_INVALID, INVALID_ARGUMENT)


def jpeg_head(scan_channels: int) -> bytes:
    """A JPEG of 48 megapixels that ends where its first scan begins."""
    data = encoded(Image.new("RGB", (16, 16)), "JPEG")
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    size = struct.pack(">HH", 6000, 8000)
    channels = b"".join(bytes([number + 1, 0x11 if number else 0]) for number in range(scan_channels))
    header = struct.pack(">HB", 6 + 2 * scan_channels, scan_channels) + channels + bytes([0, 63, 0])
    return data[: frame + 5] + size + data[frame + 9 : scan + 2] + header


def test_a_large_jpeg_is_read_if_it_has_one_scan(library, session):
    assert add_bytes(library, session, jpeg_head(1)) == IMAGE_LIMIT
    assert add_bytes(library, session, jpeg_head(3)) == IMAGE_INVALID
    assert "end" in said(library)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.skipif(sys.platform != "linux", reason="reads kilobytes of ru_maxrss")
def test_texts_in_a_png_take_no_memory(library, session):
    import resource

    png = encoded(Image.new("RGB", (40, 30)), "PNG")
    packed = zlib.compress(b"." * (16 << 20))
    texts = b"".join(
        chunk(b"zTXt", b"k%d\0\0" % number + packed) + chunk(b"iTXt", b"k%d\0\1\0\0\0" % number + packed)
        for number in range(25)
    )
    long = chunk(b"tEXt", b"long\0" + b"." * (20 << 20))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert add_bytes(library, session, png[:33] + texts + long + png[33:]) == OK, said(library)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 << 10


def test_a_question_that_fails_leaves_the_session_as_it_was(library, session):
    assert library.llava_edge_session_generate(session, None, None, None, None) == INVALID_ARGUMENT
    assert library.llava_edge_session_add_text(session, 1, b"\xff") == INVALID_ARGUMENT
    assert library.llava_edge_session_add_text(session, 7, b"?") == INVALID_ARGUMENT
    assert ask(library, session, "word " * 600) == CONTEXT_FULL
    assert "context 512" in said(library)
    assert library.llava_edge_session_turns(session) == 0
    assert library.llava_edge_session_reset(session) == OK
    assert ask(library, session, "What is a cat?") == OK
    assert library.llava_edge_session_turns(session) == 1
    assert library.llava_edge_session_add_text(session, 0, b"Be short.") == INVALID_ARGUMENT
    assert library.llava_edge_session_truncate(session, 2) == INVALID_ARGUMENT


def test_a_callback_can_stop_and_must_not_call_in(library, session):
    statuses = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p)
    def stop_at_third(_text, _length, _data):
        statuses.append(library.llava_edge_session_reset(session))
        return int(len(statuses) == 3)

    assert library.llava_edge_session_add_text(session, 1, b"Count to ten.") == OK
    assert library.llava_edge_session_generate(session, None, stop_at_third, None, None) == OK
    assert statuses == [BUSY] * 3
    assert library.llava_edge_session_turns(session) == 1


def test_a_stop_reaches_an_answer_that_waits_for_its_turn(library, model, session):
    other, statuses = ctypes.c_void_p(), []
    assert library.llava_edge_session_create(model, ctypes.byref(other)) == OK
    assert library.llava_edge_session_add_text(other, 1, b"What is a cat?") == OK

    def answer() -> None:
        statuses.append(library.llava_edge_session_generate(other, None, None, None, None))

    waiting = threading.Thread(target=answer)

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p)
    def stop_the_other(_text, _length, _data):
        statuses.append(library.llava_edge_session_create(model, ctypes.byref(ctypes.c_void_p())))
        statuses.append(library.llava_edge_session_turns(session))
        waiting.start()
        for _ in range(10):
            time.sleep(0.1)
            library.llava_edge_session_stop(other)
        return 1

    assert library.llava_edge_session_add_text(session, 1, b"Count to ten.") == OK
    assert library.llava_edge_session_generate(session, None, stop_the_other, None, None) == OK
    waiting.join()
    assert statuses == [BUSY, 0, STOPPED]
    # The next answer is none that was stopped.
    assert library.llava_edge_session_generate(other, None, None, None, None) == OK
    library.llava_edge_session_free(other)


def test_a_question_that_fails_leaves_the_last_answer_to_be_read(library, session):
    class Result(ctypes.Structure):
        _fields_ = (("struct_size", ctypes.c_size_t), ("text", ctypes.c_void_p), ("rest", ctypes.c_uint8 * 80))

    result = Result()
    library.llava_edge_result_init(ctypes.byref(result))
    assert library.llava_edge_session_add_text(session, 1, b"What is a cat?") == OK
    assert library.llava_edge_session_generate(session, None, None, None, ctypes.byref(result)) == OK
    text = ctypes.string_at(result.text)
    assert text
    assert library.llava_edge_session_generate(session, None, None, None, None) == INVALID_ARGUMENT
    assert ask(library, session, "many words " * 2000) == CONTEXT_FULL
    assert ctypes.string_at(result.text) == text


def test_a_session_of_another_prompt_format_is_refused(library, session, bundle, nano, tmp_path):
    assert ask(library, session, "What is a cat?") == OK
    path = str(tmp_path / "chat.session").encode()
    assert library.llava_edge_session_save(session, path) == OK
    manifest = manifest_of(nano)
    manifest["prompt"]["user_prefix"] = "<|im_start|>human\n"
    (bundle / "llava-edge.json").write_text(json.dumps(manifest))
    model, other, params = ctypes.c_void_p(), ctypes.c_void_p(), ModelParams()
    library.llava_edge_model_params_init(ctypes.byref(params))
    params.n_ctx = 512
    assert library.llava_edge_model_load(str(bundle).encode(), ctypes.byref(params), ctypes.byref(model)) == OK
    assert library.llava_edge_session_create(model, ctypes.byref(other)) == OK
    assert library.llava_edge_session_load(other, path) == STATE_INVALID
    library.llava_edge_session_free(other)
    library.llava_edge_model_free(model)


def test_a_saved_session_that_is_damaged_is_refused(library, session, tmp_path):
    assert ask(library, session, "What is a cat?") == OK
    path = tmp_path / "chat.session"
    assert library.llava_edge_session_save(session, str(path).encode()) == OK
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    (tmp_path / "short").write_bytes(data[:100])
    for name in ("damaged", "short"):
        assert library.llava_edge_session_load(session, str(tmp_path / name).encode()) == STATE_INVALID
    assert library.llava_edge_session_load(session, str(tmp_path / "none").encode()) == NOT_FOUND
    assert library.llava_edge_session_save(session, str(tmp_path / "no" / "folder").encode()) == IO
    assert library.llava_edge_session_turns(session) == 1
    assert library.llava_edge_session_load(session, str(path).encode()) == OK
    assert sorted(file.name for file in tmp_path.iterdir()) == ["chat.session", "damaged", "short"]
