"""A conversion gives a whole bundle that was measured, or nothing but a report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_edge.bundle import MANIFEST_NAME, open_bundle
from llava_edge.convert import convert_checkpoint, parity
from llava_edge.convert.gguf_file import tensor_types
from llava_edge.convert.publish import working_directory
from llava_edge.convert.quantize import LLM_TYPES, check_type
from llava_edge.errors import InputError, ParityError

UNREACHABLE = parity.LlmLimits(kl_mean=-1.0, top1_agreement=1.0)


@pytest.fixture(scope="module")
def bundle_dir(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "bundle"
    convert_checkpoint(checkpoint_dir, output, llm_type="q8_0")
    return output


def test_the_bundle_is_whole_and_says_how_near_it_is(bundle_dir: Path) -> None:
    bundle = open_bundle(bundle_dir)
    bundle.verify()
    manifest = bundle.manifest
    assert [(f.path, f.role, f.type) for f in manifest.files] == [
        ("llm-Q8_0.gguf", "llm", "Q8_0"),
        ("mmproj-Q8_0.gguf", "mmproj", "Q8_0"),
    ]
    assert sorted(p.name for p in bundle_dir.iterdir()) == [MANIFEST_NAME, "llm-Q8_0.gguf", "mmproj-Q8_0.gguf"]
    assert sorted(p.name for p in bundle_dir.parent.iterdir()) == ["bundle"]
    assert manifest.feature_layers == (1, 2)
    assert manifest.parity is not None
    assert manifest.parity["mmproj"]["F16"]["cosine_min"] >= 0.999
    assert manifest.parity["mmproj"]["Q8_0"]["cosine_mean"] >= 0.99
    assert manifest.parity["llm"]["F16"]["kl_mean"] < 1e-3
    assert manifest.parity["tokenizer"]["identical"] == manifest.parity["tokenizer"]["texts"]


def test_the_probe_is_in_the_manifest_and_the_file_passes_it(bundle_dir: Path) -> None:
    from llava_edge.bundle import probe_picture
    from llava_edge.engine import Engine
    from llava_edge.vision.mtmd import MtmdEncoder

    bundle = open_bundle(bundle_dir)
    probe = bundle.manifest.probe
    assert probe is not None
    engine = Engine(bundle.file("llm"), n_ctx=64, n_threads=2, n_gpu_layers=0)
    encoder = MtmdEncoder(bundle.file("mmproj"), engine)
    (rows,) = encoder.encode([probe_picture(bundle.manifest.image.size)])
    encoder.close()
    engine.close()
    found, expected = rows[list(probe.token_rows)], probe.array
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.99


def test_patch_and_position_tables_are_never_quantised(bundle_dir: Path) -> None:
    types = tensor_types(bundle_dir / "mmproj-Q8_0.gguf")
    assert types["v.patch_embd.weight"][0] == "F32"
    assert types["v.position_embd.weight"] == ("F32", (64, 16))
    assert types["v.blk.0.ffn_up.weight"][0] == "Q8_0"
    assert not [name for name in types if name.startswith(("v.class_embd", "v.post_ln"))]


def test_a_failed_gate_leaves_only_a_report_that_says_which(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.LLM_LIMITS, "F16", UNREACHABLE)
    with pytest.raises(ParityError, match=r"llm-F16.gguf: mean KL divergence") as caught:
        convert_checkpoint(checkpoint_dir, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle.parity.json"]
    report = json.loads((tmp_path / "bundle.parity.json").read_text())
    assert report["failures"][0].startswith("llm-F16.gguf")
    assert report["mmproj"]["F16"]["cosine_min"] >= 0.999
    assert "bundle.parity.json" in str(caught.value.hint)


def test_a_failure_keeps_the_old_bundle_and_a_success_replaces_it(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, output = make_checkpoint(), tmp_path / "bundle"
    convert_checkpoint(checkpoint, output, llm_type="F16", mmproj_type="F16", verify=False)
    (output / "README.md").write_text("a model card")
    before = open_bundle(output).manifest
    assert before.parity is None

    with pytest.raises(InputError, match="exists") as caught:
        convert_checkpoint(checkpoint, output)
    assert "--force" in str(caught.value.hint)

    with monkeypatch.context() as patch:
        patch.setitem(parity.LLM_LIMITS, "F16", UNREACHABLE)
        with pytest.raises(ParityError):
            convert_checkpoint(checkpoint, output, force=True)
    assert open_bundle(output).manifest == before

    report = convert_checkpoint(checkpoint, output, force=True)
    open_bundle(output).verify()
    assert sorted(p.name for p in output.iterdir()) == [
        "README.md", MANIFEST_NAME, "llm-Q4_K_M.gguf", "mmproj-Q8_0.gguf",
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert report["output"] == str(output)


def test_rows_that_k_quants_do_not_fit_are_counted(checkpoint_dir: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(checkpoint_dir, tmp_path / "bundle", verify=False)
    llm, mmproj = report["files"]
    types = tensor_types(tmp_path / "bundle" / "llm-Q4_K_M.gguf")
    assert types["token_embd.weight"][0] == "Q8_0", "as llama.cpp's own tool"
    assert llm["fallbacks"] == 3 * 7
    assert mmproj["fallbacks"] == 0
    assert report["parity"] is None


def test_something_else_at_the_output_is_never_replaced(checkpoint_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a bundle"):
        convert_checkpoint(checkpoint_dir, tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="does not exist"):
        convert_checkpoint(checkpoint_dir, tmp_path / "no" / "where")


def test_an_unknown_type_lists_the_known_ones(checkpoint_dir: Path, tmp_path: Path) -> None:
    assert check_type("q4_k_m", LLM_TYPES) == "Q4_K_M"
    with pytest.raises(InputError, match="Q4_K_M") as caught:
        convert_checkpoint(checkpoint_dir, tmp_path / "b", llm_type="Q4_KM")
    assert caught.value.hint == "Did you mean Q4_K_M?"


def test_importing_convert_loads_no_torch() -> None:
    code = "import llava_edge.convert, sys; sys.exit(bool({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_module_can_be_run(checkpoint_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llava_edge.convert", str(checkpoint_dir), "-o", str(tmp_path / "b")]
    options = ["--llm-type", "F16", "--mmproj-type", "F16", "--json", "--quiet"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["parity"]["llm"]["F16"]["kl_mean"] < 1e-3
    assert result.stderr == ""


def test_what_a_killed_run_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    killed = tmp_path / ".bundle.x1.partial"
    others = [tmp_path / ".bundle2.x1.partial", tmp_path / ".bundle.x1", tmp_path / "bundle.x1.partial"]
    for directory in (killed, *others):
        directory.mkdir()
        (directory / "llm-F16.gguf").write_bytes(b"half")
    with working_directory(output) as first:
        assert not killed.exists()
        (first / "llm-F16.gguf").write_bytes(b"half")
        with working_directory(output) as second:
            assert second != first
        assert (first / "llm-F16.gguf").read_bytes() == b"half"
        assert not second.exists()
    assert sorted(tmp_path.iterdir()) == sorted(others)
