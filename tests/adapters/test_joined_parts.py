# SPDX-License-Identifier: Apache-2.0
"""LoRAs of the parts of a fused weight as one of it, and back: the same change of every weight, by the names that programs load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import surgery
from surgery_formats.errors import FitError
from tests.support.adapter_files import Arrays, draw
from tests.support.base_loras import lora_of
from tests.support.bases import KINDS, drawn, files_of, in_comfyui, tensors_of, written

FUSED = [network for network in KINDS if len(tensors_of(network).single) != len(tensors_of(network).spans)]


def _stems(path: Path) -> set[str]:
    return {key.rpartition(".lora_")[0] for key in load_file(path) if ".lora_" in key}


def _merged(base: Path, adapter: Path, out: Path) -> Arrays:
    surgery.merge(base, adapter, output=out)
    return load_file(out / "base.safetensors")


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
@pytest.mark.parametrize("network", FUSED)
def test_parts_become_the_whole_and_parts_again(network: str, to: str, tmp_path: Path) -> None:
    weights = drawn(network, np.float32)
    base = written(weights, "ComfyUI", tmp_path / "base")
    lora = lora_of(weights, "diffusers", encoders=False)
    source, whole, back = (tmp_path / f"{name}.safetensors" for name in ("source", "whole", "back"))
    save_file(lora.tensors, source)
    surgery.convert(source, to, output=whole, base=base)
    tensors = tensors_of(network)
    modules = {
        in_comfyui(network, whole_name).removesuffix(".weight")
        for part, spans in tensors.spans.items()
        for whole_name, _, _ in spans
        if part.endswith(".weight") and len(tensors.single[whole_name]) in (2, 4, 5)
    }
    flat = {f"lora_unet_{module.replace('.', '_')}" for module in modules}
    assert _stems(whole) == (flat if to == "kohya" else {f"diffusion_model.{module}" for module in modules})
    surgery.convert(whole, "diffusers", output=back, base=base)
    assert _stems(back) == _stems(source)
    before = load_file(source)
    for name, tensor in load_file(back).items():
        np.testing.assert_array_equal(tensor, before[name])
    (added,) = files_of(lora.added, "ComfyUI").values()
    start = load_file(base)
    for number, adapter in enumerate((whole, back)):
        for name, tensor in _merged(base, adapter, tmp_path / f"{number}").items():
            np.testing.assert_allclose(tensor, start[name] + added[name], atol=1e-5)


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
@pytest.mark.parametrize("network", KINDS)
def test_the_names_are_those_of_the_release_whatever_the_base_has(network: str, to: str, tmp_path: Path) -> None:
    weights, tensors = drawn(network, np.float32), tensors_of(network)
    base, file = (written(weights, layout, tmp_path / layout) for layout in ("folder", "ComfyUI"))
    lora = lora_of(weights, "diffusers", encoders=False)
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(lora.tensors, source)
    surgery.convert(source, to, output=out, base=base)
    modules = {
        whole.removesuffix(".weight")
        for part, spans in tensors.spans.items()
        for whole, _, _ in spans
        if part.endswith(".weight") and len(tensors.single[whole]) in (2, 4, 5)
    }
    if to == "kohya" and network == "sd15":  # whose trainers have diffusers' names
        modules = {key.removeprefix("unet.").rpartition(".lora_")[0] for key in lora.tensors}
    flat = {f"lora_unet_{module.replace('.', '_')}" for module in modules}
    assert _stems(out) == (flat if to == "kohya" else {f"diffusion_model.{module}" for module in modules})
    (added,) = files_of(lora.added, "ComfyUI").values()
    start = load_file(file)
    for name, tensor in _merged(file, out, tmp_path / "merged").items():
        np.testing.assert_allclose(tensor, start[name] + added[name], atol=1e-5)


ENCODERS = {
    "flux": {"text_encoder": "te1", "text_encoder_2": "te3"},
    "chroma": {"text_encoder": "te3"},
    "sd3": {"text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3"},
    "lumina2": {"text_encoder": "te"},
}
"""What sd-scripts (48d368fa) calls the text encoders of a pipeline."""


@pytest.mark.parametrize("layout", ["pipeline", "ComfyUI"])
@pytest.mark.parametrize("network", ENCODERS)
def test_text_encoders_have_the_numbers_of_sd_scripts(network: str, layout: str, tmp_path: Path) -> None:
    weights = drawn(network, np.float32)
    base = written(weights, layout, tmp_path / "base")
    tensors = lora_of(weights, "diffusers", encoders=True).tensors
    if network == "lumina2":
        stem = "text_encoder.model.layers.0.self_attn.q_proj"
        tensors |= {f"{stem}.lora_A.weight": draw(1, 2, 4), f"{stem}.lora_B.weight": draw(2, 6, 2)}
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    surgery.convert(source, "kohya", output=out, base=base)
    of_encoders = [stem.split(".", 1) for stem in _stems(source) if stem.startswith("text_encoder")]
    wanted = {f"lora_{ENCODERS[network][name]}_{module.replace('.', '_')}" for name, module in of_encoders}
    assert {stem for stem in _stems(out) if stem.startswith("lora_te")} == wanted != set()
    surgery.merge(base, source, output=tmp_path / "before")
    surgery.merge(base, out, output=tmp_path / "after")
    for file in (tmp_path / "before").rglob("*.safetensors"):
        after = load_file(tmp_path / "after" / file.relative_to(tmp_path / "before"))
        assert all(np.allclose(tensor, after[name], atol=1e-5) for name, tensor in load_file(file).items())


@pytest.mark.parametrize("layout", ["folder", "ComfyUI"])
@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_what_cannot_be_joined_is_not_written_as_if_of_the_whole(to: str, layout: str, tmp_path: Path) -> None:
    weights = drawn("flux", np.float32)
    base = written(weights, layout, tmp_path / "base")
    lora = _loras({"transformer_blocks.0.attn.to_q": (draw(1, 2, 4), draw(2, 48, 2))})
    lora["transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector.weight"] = draw(3, 48)
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(lora, source)
    with pytest.raises(FitError, match=r"attn.qkv', in which this format holds it, have no lengths"):
        surgery.convert(source, to, output=out, base=base)
    assert not out.exists()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_lengths_of_all_rows_are_those_of_the_whole(to: str, shared: bool, tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    qkv = draw(5, 12, 4)
    save_file({"double_blocks.0.img_attn.qkv.weight": qkv, "double_blocks.0.img_attn.proj.weight": draw(6, 4, 4)}, base)
    lora, expected = {}, []
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        a, b = draw(10 + (0 if shared else number), 2, 4), draw(20 + number, 4, 2)
        lengths = abs(draw(30 + number, 4)) + 0.1
        lora |= _loras({f"transformer_blocks.0.attn.{part}": (a, b)})
        lora[f"transformer.transformer_blocks.0.attn.{part}.lora_magnitude_vector"] = lengths
        v = qkv[4 * number : 4 * number + 4].astype(np.float64) + b.astype(np.float64) @ a
        expected.append(lengths[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True))
    source, out, back = (tmp_path / f"{name}.safetensors" for name in ("source", "out", "back"))
    save_file(lora, source)
    surgery.convert(source, to, output=out, base=base)
    ((stem,), got) = _stems(out), load_file(out)
    assert {tensor.shape[1] for key, tensor in got.items() if "up" in key or "lora_B" in key} == {2 if shared else 6}
    assert got[f"{stem}.dora_scale"].shape == (12, 1)
    merged = _merged(base, out, tmp_path / "merged")["double_blocks.0.img_attn.qkv.weight"]
    np.testing.assert_allclose(merged, np.concatenate(expected), atol=1e-5)
    surgery.convert(out, "diffusers", output=back, base=base)
    assert {key: tensor.tolist() for key, tensor in load_file(back).items()} == {k: t.tolist() for k, t in lora.items()}


def test_parts_with_and_without_lengths_are_no_whole(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    tensors = {f"double_blocks.0.img_attn.{n}.weight": draw(5, h, 4) for n, h in (("qkv", 12), ("proj", 4))}
    save_file(tensors, base)
    parts = {f"transformer_blocks.0.attn.{part}": (draw(1, 2, 4), draw(2, 4, 2)) for part in ("to_q", "to_k", "to_v")}
    lora = _loras(parts)
    lora = {
        k.replace("lora_A.weight", "lora_down.weight").replace("lora_B.weight", "lora_up.weight"): t
        for k, t in lora.items()
    }
    lora["transformer.transformer_blocks.0.attn.to_q.dora_scale"] = abs(draw(3, 4, 1))
    save_file(lora, tmp_path / "a.safetensors")
    with pytest.raises(FitError, match=r"cannot hold 3 of 3 parts: .* only some have lengths"):
        surgery.convert(tmp_path / "a.safetensors", "kohya", output=tmp_path / "b.safetensors", base=base)


def test_kohya_keeps_the_keys_that_its_file_had(tmp_path: Path) -> None:
    weights = drawn("flux", np.float32)
    base = written(weights, "folder", tmp_path / "base")
    for spelling in ("kohya", "kohya, diffusers' names"):
        source, out = tmp_path / f"{spelling}.safetensors", tmp_path / f"{spelling} again.safetensors"
        save_file(lora_of(weights, spelling, encoders=False).tensors, source)
        surgery.convert(source, "kohya", output=out, base=base)
        before = load_file(source)
        after = load_file(out)
        assert before.keys() == after.keys()
        assert all(np.array_equal(tensor, before[name]) for name, tensor in after.items())


def test_kohya_says_the_rank_and_alpha_that_its_tools_show(tmp_path: Path) -> None:
    weights = drawn("flux", np.float32)
    base = written(weights, "folder", tmp_path / "base")
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(lora_of(weights, "diffusers", encoders=False).tensors, source)
    surgery.convert(source, "kohya", output=out, base=base)
    with safe_open(out, "np") as file:
        metadata = file.metadata()
    assert [metadata[f"ss_network_{name}"] for name in ("dim", "alpha", "module")] == ["2", "2", "networks.lora"]


def _loras(parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> Arrays:
    found: Arrays = {}
    for module, (a, b) in parts.items():
        found |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
    return found


def test_parts_with_one_a_stay_of_its_rank_and_missing_parts_are_zeros(tmp_path: Path) -> None:
    name, a = "transformer_blocks.0.attn.", draw(1, 2, 4).astype(np.float16)
    base = {
        "double_blocks.0.img_attn.qkv.weight": draw(5, 12, 4),
        "double_blocks.0.img_attn.proj.weight": draw(6, 4, 4),
    }
    save_file(base, tmp_path / "base.safetensors")
    q, v = draw(2, 4, 2).astype(np.float16), draw(3, 4, 2).astype(np.float16)
    save_file(_loras({f"{name}to_q": (a, q), f"{name}to_v": (a.copy(), v)}), tmp_path / "lora.safetensors")
    out = tmp_path / "out.safetensors"
    surgery.convert(tmp_path / "lora.safetensors", "comfyui", output=out, base=tmp_path / "base.safetensors")
    got = load_file(out)
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    np.testing.assert_array_equal(got[f"{stem}.lora_A.weight"], a)
    np.testing.assert_array_equal(got[f"{stem}.lora_B.weight"], np.concatenate([q, np.zeros((4, 2), np.float16), v]))
    assert got[f"{stem}.lora_B.weight"].dtype == np.float16


def test_scales_that_differ_are_multiplied_in(tmp_path: Path) -> None:
    base = {
        "double_blocks.0.img_attn.qkv.weight": draw(5, 12, 4),
        "double_blocks.0.img_attn.proj.weight": draw(6, 4, 4),
    }
    save_file(base, tmp_path / "base.safetensors")
    lora: Arrays = {}
    for number, (part, alpha) in enumerate((("to_q", 1.0), ("to_k", 4.0))):
        stem = f"lora_transformer_transformer_blocks_0_attn_{part}"
        lora |= {f"{stem}.lora_down.weight": draw(10 + number, 2, 4), f"{stem}.lora_up.weight": draw(20 + number, 4, 2)}
        lora[f"{stem}.alpha"] = np.full((), alpha, np.float32)
    save_file(lora, tmp_path / "lora.safetensors")
    out = tmp_path / "out.safetensors"
    surgery.convert(tmp_path / "lora.safetensors", "comfyui", output=out, base=tmp_path / "base.safetensors")
    assert _stems(out) == {"diffusion_model.double_blocks.0.img_attn.qkv"}
    one, other = (
        _merged(tmp_path / "base.safetensors", p, tmp_path / p.stem) for p in (tmp_path / "lora.safetensors", out)
    )
    assert all(np.allclose(tensor, other[name], atol=1e-6) for name, tensor in one.items())
