from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import llava_edge
from llava_edge.bench.models import open_subject
from llava_edge.bench.speed import synthetic
from llava_edge.bench.speed.shapes import SHAPES, Shape, TowerShape, find_shape
from llava_edge.bench.speed.synthetic import llm_types, synthetic_bundle, write_synthetic
from llava_edge.bundle import open_bundle
from llava_edge.convert.gguf_file import tensor_types
from llava_edge.errors import InputError

TINY = Shape("tiny", 3, 256, 4, 2, 512, 300, 512, TowerShape(56, 14, 64, 3, 4, 128, 2), 4)


def test_a_synthetic_bundle_runs_and_has_the_shape(tmp_path: Path) -> None:
    bundle = open_bundle(write_synthetic(TINY, tmp_path, "Q4_K_M", "Q8_0"))
    bundle.verify()
    subject = open_subject(tmp_path)
    assert subject.synthetic
    assert "answers and quality mean nothing" in subject.row().notes[0]
    types = tensor_types(bundle.file("llm"))
    assert types["blk.2.ffn_down.weight"] == ("Q6_K", (512, 256))
    assert types["blk.1.attn_k.weight"] == ("Q4_K", (256, 128))
    assert tensor_types(bundle.file("mmproj"))["v.blk.0.ffn_up.weight"][0] == "Q8_0"
    with llava_edge.load(tmp_path, n_threads=1) as model, model.chat() as chat:
        encoded = model.encode(model.open_picture(np.zeros((60, 80, 3), np.uint8)))
        assert encoded.n_tokens == 4
        assert chat.ask("Hi", images=[np.zeros((60, 80, 3), np.uint8)], max_tokens=3).usage.image_tokens == 4
        logits = model.engine.logits()
        assert np.isfinite(logits).all()
        assert logits.std() > 0


@pytest.mark.parametrize("kind", ["F16", "IQ4_NL", "Q2_K"])
def test_every_type_can_be_written(tmp_path: Path, kind: str) -> None:
    write_synthetic(TINY, tmp_path, kind, "F16")
    with llava_edge.load(tmp_path, n_threads=1) as model, model.chat() as chat:
        chat.ask("Hi", max_tokens=2)
        logits = model.engine.logits()
        assert np.isfinite(logits).all()
        assert logits.std() > 0


def test_the_mix_of_types_is_that_of_the_real_model() -> None:
    nano = Path(str(resources.files("llava_edge"))) / "models" / "nano"
    if not nano.is_dir():
        pytest.skip("this installation has no embedded model")
    real = {name: kind for name, (kind, _) in tensor_types(open_bundle(nano).file("llm")).items()}
    made = llm_types(SHAPES["nano"], "Q4_K_M")
    assert made.keys() == real.keys()
    chosen = ("ffn_", "attn_v")  # nano has types of its own for these
    kept = {name for name in real if not any(part in name for part in chosen)}
    assert {made[name] for name in kept} == {"F32", "Q5_0", "Q8_0"}
    assert {name: made[name] for name in kept} == {name: real[name] for name in kept}


def test_shapes_have_the_size_of_their_models() -> None:
    """Parameters of the language models as published: 6.74, 13.02, 7.24 billion; SmolLM2-135M has 134.5 million."""
    for name, billions in (
        ("llava-1.5-7b", 6.738),
        ("llava-1.5-13b", 13.016),
        ("llava-1.6-mistral-7b", 7.242),
        ("nano", 0.1345),
    ):
        count = sum(int(np.prod(matrix.shape)) for matrix in synthetic._llm(SHAPES[name]))
        assert count / 1e9 == pytest.approx(billions, rel=2e-4)


def test_an_unknown_shape_or_type_is_named() -> None:
    with pytest.raises(InputError, match=r"no shape 'llava-1\.5-7'") as caught:
        find_shape("llava-1.5-7")
    assert caught.value.hint == "Did you mean llava-1.5-7b?"
    with pytest.raises(InputError, match="'Q5_K' is no type for this file; expected one of F16, Q8_0"):
        write_synthetic(TINY, Path(), "F16", "Q5_K")


def test_nothing_is_left_behind_and_nothing_begun_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(tmp_path))

    def interrupted() -> None:
        with synthetic_bundle(TINY, "Q8_0", "F16", lambda _line: None) as folder:
            assert open_bundle(folder).manifest.name == "synthetic tiny"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list((tmp_path / "bench").iterdir())
    killed = tmp_path / "bench" / "synthetic-of-a-killed-run"
    killed.mkdir()
    (killed / "llm-Q8_0.gguf").write_bytes(b"weights")
    with synthetic_bundle(TINY, "Q8_0", "F16", lambda _line: None) as held:
        assert not killed.exists()
        with synthetic_bundle(TINY, "Q8_0", "F16", lambda _line: None):
            assert held.exists()
    with pytest.raises(InputError, match=r"GB are needed in .*GB are free"):
        synthetic._check_space(tmp_path, 1 << 60)
