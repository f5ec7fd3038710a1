"""The tower of the C library against what the file says, computed by torch in float32."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from towers import KINDS, Type, write

from llava_edge.bundle import probe_picture
from llava_edge.convert.mmproj_reader import MmprojReader
from llava_edge.images import normalize
from llava_edge.types import ImageSpec

pytest.importorskip("torch")

# Least cosine of a token to the float32 reference, by the type of the weights.
BARS = {Type.F32: 0.9999, Type.F16: 0.999, Type.Q8_0: 0.995}


def encode(library, path, picture) -> np.ndarray:
    tower = ctypes.c_void_p()
    assert library.llava_edge_tower_load(str(path).encode(), None, ctypes.byref(tower)) == 0, (
        library.llava_edge_last_error()
    )
    try:
        shape = (library.llava_edge_tower_n_tokens(tower), library.llava_edge_tower_n_embd(tower))
        out = np.empty(shape, np.float32)
        room = ctypes.c_size_t(out.size)
        into = out.ctypes.data_as(ctypes.c_void_p)
        status = library.llava_edge_tower_encode(tower, picture.tobytes(), ctypes.c_size_t(0), into, room)
        assert status == 0, library.llava_edge_last_error()
        assert (
            library.llava_edge_tower_encode(tower, picture.tobytes(), ctypes.c_size_t(0), into, ctypes.c_size_t(1))
            == 10
        )
        return out
    finally:
        library.llava_edge_tower_free(tower)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", KINDS)
def test_a_tower_computes_what_its_file_says(library, tmp_path, name, kind):
    shape = KINDS[name]
    picture = probe_picture(shape.image)
    spec = ImageSpec(size=shape.image, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    reference = MmprojReader(write(tmp_path / "f32.gguf", shape, Type.F32))
    (expected,) = reference.encode([normalize(picture, spec)])
    found = encode(library, write(tmp_path / "typed.gguf", shape, kind), picture)
    assert found.shape == expected.shape
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((found * expected).sum(axis=1) / lengths).min() >= BARS[kind]
