"""Fewer bits: bundles quantised and measured, and importance matrices that have seen pictures."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import llava_edge
from llava_edge import native
from llava_edge.bundle import MANIFEST_NAME, open_bundle
from llava_edge.cli import cli
from llava_edge.convert import convert_checkpoint, error_feedback, imatrix, make_imatrix, parity, quantize_bundle
from llava_edge.convert.gguf_file import tensor_types
from llava_edge.convert.imatrix_file import read_correlations, read_imatrix
from llava_edge.convert.observe import GgmlTensor, Observer, rows_of
from llava_edge.convert.tiny import FAMILIES, make
from llava_edge.engine import Engine
from llava_edge.errors import InputError, ParityError


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exact")
    make(FAMILIES["v1.5"], root / "checkpoint")
    convert_checkpoint(root / "checkpoint", root / "exact", llm_type="F16", mmproj_type="F16", vision="fp32")
    return root / "exact"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    samples = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat is in this picture?"},
            {"from": "gpt", "value": "A brown dog runs in the snow."},
            {"from": "human", "value": "And what else?"},
            {"from": "gpt", "value": "Two cats."},
        ]
        samples.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns})
    (root / "data.json").write_text(json.dumps(samples))
    return root


def test_a_bundle_is_made_smaller_and_measured_against_the_old_one(exact: Path, tmp_path: Path) -> None:
    told: list[str] = []
    report = quantize_bundle(exact, tmp_path / "small", "q8_0", mmproj_type="Q8_0", vision="int8", progress=told.append)
    bundle = open_bundle(tmp_path / "small")
    bundle.verify()
    assert [(f.role, f.type) for f in bundle.manifest.files] == [
        ("llm", "Q8_0"), ("mmproj", "Q8_0"), ("vision_onnx", "int8"),
    ]  # fmt: skip
    assert report["bytes"] < 0.7 * report["bytes_before"]
    assert report["measured"]["llm"]["tokens"] >= 200
    assert report["measured"]["llm"]["kl_mean"] < 0.02
    assert report["measured"]["vision_onnx"]["probe_cosine"] > 0.99
    figures = bundle.manifest.parity
    assert figures is not None
    assert figures["llm"]["Q8_0"]["against"] == "F16"
    assert figures["llm"]["F16"]["kl_mean"] < 1e-3
    assert any("comparing" in line for line in told)
    with llava_edge.load(tmp_path / "small", n_threads=1) as model:
        assert (
            model.chat().ask("What is it?", [Image.new("RGB", (30, 50), "red")], max_tokens=3).usage.image_tokens == 16
        )
        assert model.vision_backend == "onnx"


def test_files_that_are_not_asked_for_stay_and_none_leaves_one_out(exact: Path, tmp_path: Path) -> None:
    quantize_bundle(exact, tmp_path / "small", "Q8_0", vision="none", verify=False)
    manifest = open_bundle(tmp_path / "small").manifest
    assert [f.type for f in manifest.files] == ["Q8_0", "F16"]
    assert manifest.backends == ("mtmd",)
    assert manifest.parity is None
    old = next(f for f in open_bundle(exact).manifest.files if f.role == "mmproj")
    assert manifest.files[1] == old


def test_leaving_out_the_only_backend_that_is_right_is_said(exact: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llava_edge", "quantize", str(exact), "Q8_0", "-o", str(tmp_path / "small")]
    options = ["--vision", "none", "--no-verify", "--quiet"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "can't look at pictures" in result.stderr
    assert "appends the class token after the patches" in result.stderr
    # The same is known of a bundle that was never measured.
    again = quantize_bundle(exact, tmp_path / "unmeasured", "F16", verify=False)
    assert again["warnings"] == []
    report = quantize_bundle(tmp_path / "unmeasured", tmp_path / "smaller", "Q8_0", vision="none", verify=False)
    assert "appends the class token after the patches" in report["warnings"][0]


def test_leaving_out_a_backend_is_no_loss_where_llama_cpp_is_right(tmp_path: Path) -> None:
    make(FAMILIES["SigLIP + Qwen2"], tmp_path / "checkpoint")
    convert_checkpoint(tmp_path / "checkpoint", tmp_path / "exact", llm_type="F16", mmproj_type="F16", vision="fp32")
    report = quantize_bundle(tmp_path / "exact", tmp_path / "small", "Q8_0", vision="none", verify=False)
    assert report["warnings"] == []
    assert open_bundle(tmp_path / "small").manifest.backends == ("mtmd",)


def test_what_is_quantised_already_is_refused(exact: Path, tmp_path: Path) -> None:
    quantize_bundle(exact, tmp_path / "small", "Q8_0", verify=False)
    with pytest.raises(InputError, match=r"llm-Q8_0\.gguf is Q8_0 already"):
        quantize_bundle(tmp_path / "small", tmp_path / "smaller", "Q4_0")
    with pytest.raises(InputError, match="'Q4_KM' is no type") as caught:
        quantize_bundle(exact, tmp_path / "smaller", "Q4_KM")
    assert caught.value.hint == "Did you mean Q4_K_M?"


def test_too_few_bits_fail_and_leave_nothing(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parity.LLM_LIMITS, "Q8_0", parity.LlmLimits(0.0, 1.0))
    with pytest.raises(ParityError, match=r"llm-Q8_0.gguf: mean KL"):
        quantize_bundle(exact, tmp_path / "small", "Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_sizes_and_fallbacks(exact: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["quantize", str(exact), "Q4_K_M", "-o", str(tmp_path / "small"), "--no-verify"])
    assert result.exit_code == 0, result.output
    assert "tensors fell back to other types" in result.stderr
    assert result.stdout.strip() == str(tmp_path / "small")
    shown = CliRunner().invoke(cli, ["quantize", "--help"]).stdout
    assert "Q4_K_M  4.8 bits: the usual choice" in shown


# Importance matrices


def test_the_tensor_layout_is_that_of_the_library(exact: Path) -> None:
    seen: dict[str, tuple[GgmlTensor, np.ndarray[Any, Any]]] = {}
    library = native.llama()
    names: list[tuple[str, str]] = []
    ggml = ctypes.CDLL(str(next(Path(library._lib._name).parent.glob("libggml-base.*"))))
    ggml.ggml_get_name.restype = ctypes.c_char_p
    ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
    ggml.ggml_nbytes.restype = ctypes.c_size_t
    ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]

    def see(tensor: GgmlTensor) -> None:
        names.append((tensor.name.decode(), ggml.ggml_get_name(ctypes.addressof(tensor)).decode()))
        if tensor.name.startswith(b"l_out-"):
            values = rows_of(tensor)
            assert values.nbytes == ggml.ggml_nbytes(ctypes.addressof(tensor))
            seen[tensor.name.decode()] = (tensor, values)

    with Observer(lambda tensor: True, see) as observer:
        engine = Engine(exact / "llm-F16.gguf", n_ctx=64, n_gpu_layers=0, observer=observer.callback, every_output=True)
        engine.decode_tokens([5, 6, 7])
        engine.close()
    assert len(names) > 50
    assert all(ours == theirs for ours, theirs in names)
    assert sorted(seen) == ["l_out-0", "l_out-1", "l_out-2"]
    assert all(values.shape == (3, 64) and np.isfinite(values).all() for _, values in seen.values())


def test_an_importance_matrix_sums_what_goes_into_every_matrix(exact: Path, data: Path, tmp_path: Path) -> None:
    report = make_imatrix(exact, data / "data.json", data, tmp_path / "matrix.gguf", n_ctx=1024)
    assert report["samples"] == 4
    assert report["matrices"] == 3 * 7
    assert report["tokens"]["image"] == 4 * 16
    assert report["tokens"]["answer"] > 4 * 10
    assert [p.name for p in tmp_path.iterdir()] == ["matrix.gguf"]
    raw: Any = gguf.GGUFReader(tmp_path / "matrix.gguf")
    tensors = {tensor.name: np.array(tensor.data).ravel() for tensor in raw.tensors}
    tokens = sum(report["tokens"].values())
    assert tensors["blk.0.attn_q.weight.counts"].tolist() == [tokens]
    assert tensors["blk.2.ffn_down.weight.counts"].tolist() == [tokens], "the last layer sees every token too"
    assert raw.fields["general.type"].contents() == "imatrix"
    matrix = read_imatrix(tmp_path / "matrix.gguf")
    # q, k and v read the same inputs
    np.testing.assert_array_equal(matrix["blk.1.attn_q.weight"], matrix["blk.1.attn_v.weight"])
    assert all((values > 0).all() for values in matrix.values())


def test_pictures_and_weights_change_the_matrix(exact: Path, data: Path, tmp_path: Path) -> None:
    def matrix(name: str, images: Path | None, **weights: float) -> np.ndarray[Any, Any]:
        make_imatrix(exact, data / "data.json", images, tmp_path / name, n_ctx=1024, **weights)  # type: ignore[arg-type]
        return read_imatrix(tmp_path / name)["blk.0.attn_q.weight"]

    both, text = matrix("both", data), matrix("text", None)
    assert np.abs(both / text - 1).max() > 0.1
    only = matrix("only", data, text_weight=0, answer_weight=0)
    doubled = matrix("doubled", data, text_weight=2, answer_weight=2, image_weight=2)
    np.testing.assert_allclose(doubled, both, rtol=1e-4)
    assert np.abs(only / text - 1).max() > np.abs(both / text - 1).max()


def test_a_matrix_reaches_the_quantiser(exact: Path, data: Path, tmp_path: Path) -> None:
    make_imatrix(exact, data / "data.json", data, tmp_path / "matrix.gguf", n_ctx=1024)
    quantize_bundle(exact, tmp_path / "plain", "Q4_0", verify=False)
    quantize_bundle(exact, tmp_path / "led", "Q4_0", imatrix=tmp_path / "matrix.gguf", verify=False)
    types = [tensor_types(tmp_path / name / "llm-Q4_0.gguf") for name in ("plain", "led")]
    assert types[0] == types[1]
    assert (tmp_path / "plain" / "llm-Q4_0.gguf").read_bytes() != (tmp_path / "led" / "llm-Q4_0.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_NL", "Q5_0"])
def test_levels_that_make_up_for_each_other(exact: Path, data: Path, tmp_path: Path, kind: str) -> None:
    for name, correlations in (("plain", False), ("full", True)):
        make_imatrix(exact, data / "data.json", data, tmp_path / name, n_ctx=1024, correlations=correlations)
    known = [read_imatrix(tmp_path / name) for name in ("plain", "full")]
    assert all(np.array_equal(known[0][name], known[1][name]) for name in known[0])
    together = read_correlations(tmp_path / "full")
    assert set(together) == set(known[0])
    assert together["blk.0.attn_k.weight"] is together["blk.0.attn_q.weight"]
    assert not read_correlations(tmp_path / "plain")

    own = {r"blk\.1\.ffn_down": "Q8_0"}
    if kind == "Q5_0":
        own |= {"blk": "Q5_0"}
    reports = [
        quantize_bundle(
            exact,
            tmp_path / f"{name}-b",
            "Q4_0" if kind == "Q5_0" else kind,
            imatrix=tmp_path / name,
            tensor_types=own,
            verify=False,
        )
        for name in ("plain", "full")
    ]
    said = [next(f for f in report["files"] if f["path"].startswith("llm")) for report in reports]
    assert said[0]["tensors"] == said[1]["tensors"]
    assert said[0]["output_error"] is None
    before, after = said[1]["output_error"]
    assert after < 0.9 * before

    floats, plain, full = (
        {t.name: (gguf.quants.dequantize(t.data, t.tensor_type), t.data) for t in gguf.GGUFReader(path).tensors}
        for path in (exact / "llm-F16.gguf", *(tmp_path / f"{n}-b" / said[0]["path"] for n in ("plain", "full")))
    )

    def error(made: dict[str, Any], name: str) -> float:
        lost = made[name][0] - floats[name][0]
        return float(np.vdot(lost @ together[name], lost))

    kept = [name for name in floats if name not in together or name == "blk.1.ffn_down.weight"]
    assert all(np.array_equal(plain[name][1], full[name][1]) for name in kept)
    changed = sorted(set(together) - set(kept))
    assert len(changed) == 3 * 7 - 1
    assert all(error(full, name) < error(plain, name) for name in changed)


def test_levels_of_every_type_are_read_and_written_as_llama_cpp_has_them() -> None:
    random = np.random.default_rng(0)
    for name, kind in error_feedback._TYPES.items():
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        packed = np.frombuffer(random.bytes(6 * 512 // block * size), np.uint8).copy().reshape(6, -1)
        for place in (0, 2) if name == "Q4_K" else (0,):
            packed.reshape(-1, size)[:, place : place + 2] = np.array([0.002 + place], np.float16).view(np.uint8)
        grid = kind.read(packed)
        np.testing.assert_allclose(grid.values(), gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name]))
        grid.levels = random.integers(0, len(grid.table), grid.levels.shape).astype(np.uint8)
        kind.write(packed, grid.levels)
        np.testing.assert_allclose(grid.values(), gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name]))


def test_correlations_that_no_memory_holds_are_refused(
    exact: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imatrix, "_MOST_GIGABYTES", 1e-4)
    with pytest.raises(InputError, match="the correlations of this model's inputs take 0 GB"):
        make_imatrix(exact, data / "data.json", data, tmp_path / "m", n_ctx=1024, correlations=True)


def test_single_tensors_get_the_type_that_was_asked_for(exact: Path, tmp_path: Path) -> None:
    wanted = {"ffn_down": "q8_0", r"blk\.[12]\.ffn_(up|gate)": "Q5_0", "token_embd": "Q4_0"}
    report = quantize_bundle(exact, tmp_path / "b", "Q4_0", tensor_types=wanted, verify=False)
    types = {name: kind for name, (kind, _) in tensor_types(tmp_path / "b" / "llm-Q4_0.gguf").items()}
    assert [types[f"blk.{layer}.ffn_down.weight"] for layer in range(3)] == ["Q8_0"] * 3, "the first that fits"
    assert [types[f"blk.{layer}.ffn_up.weight"] for layer in range(3)] == ["Q4_0", "Q5_0", "Q5_0"]
    assert types["token_embd.weight"] == "Q4_0"
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert report["files"][0]["fallbacks"] == 0


def test_a_tensor_type_that_changes_nothing_is_refused(exact: Path, tmp_path: Path) -> None:
    def asked(kind: str, **types: str) -> str:
        with pytest.raises(InputError) as caught:
            quantize_bundle(exact, tmp_path / "b", kind, tensor_types=types, verify=False)
        return f"{caught.value}; {caught.value.hint}"

    assert "no tensor with ffn_upp in its name; It has, among others, attn_k" in asked("Q4_0", ffn_upp="Q8_0")
    assert "'Q9_0' is no type for this file" in asked("Q4_0", ffn_up="Q9_0")
    assert "'ffn(' is no regular expression for tensors' names: missing )" in asked("Q4_0", **{"ffn(": "Q8_0"})
    assert "F16 quantises nothing" in asked("F16", ffn_up="Q8_0")
    assert not list(tmp_path.iterdir())


def test_the_command_line_takes_tensor_types(exact: Path, tmp_path: Path) -> None:
    options = ["--tensor-type", "ffn_up=Q8_0", "--tensor-type", "attn_v=F16", "--no-verify"]
    done = CliRunner().invoke(cli, ["quantize", str(exact), "Q4_0", "-o", str(tmp_path / "b"), *options])
    assert done.exit_code == 0, done.output
    types = tensor_types(tmp_path / "b" / "llm-Q4_0.gguf")
    assert types["blk.0.ffn_up.weight"][0] == "Q8_0"
    assert types["blk.0.attn_v.weight"][0] == "F16"
    done = CliRunner().invoke(cli, ["quantize", str(exact), "Q4_0", "-o", str(tmp_path / "c"), "--tensor-type", "up"])
    assert done.exit_code == 2
    assert "expected NAME=TYPE, such as ffn_down=Q6_K" in done.output


def test_a_matrix_of_another_model_or_no_matrix_is_refused(exact: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such importance matrix"):
        quantize_bundle(exact, tmp_path / "b", "Q4_0", imatrix=tmp_path / "none.gguf")
    with pytest.raises(InputError, match="holds no importance matrix"):
        quantize_bundle(exact, tmp_path / "b", "Q4_0", imatrix=exact / "llm-F16.gguf")
    with pytest.raises(InputError, match="no importance matrix in GGUF"):
        quantize_bundle(exact, tmp_path / "b", "Q4_0", imatrix=exact / MANIFEST_NAME)


def test_damaged_data_is_named_by_its_sample(exact: Path, data: Path, tmp_path: Path) -> None:
    samples = json.loads((data / "data.json").read_text())
    samples[2]["conversations"].pop()
    (tmp_path / "odd.json").write_text(json.dumps(samples))
    with pytest.raises(InputError, match="sample s2: conversations"):
        make_imatrix(exact, tmp_path / "odd.json", data, tmp_path / "m.gguf")
    with pytest.raises(InputError, match="sample s0: no such picture"):
        make_imatrix(exact, data / "data.json", tmp_path, tmp_path / "m.gguf")
    with pytest.raises(InputError, match="not all 0"):
        make_imatrix(exact, data / "data.json", data, tmp_path / "m", text_weight=0, image_weight=0, answer_weight=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd.json"]
