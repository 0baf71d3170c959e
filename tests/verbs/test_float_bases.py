# SPDX-License-Identifier: Apache-2.0
"""Merges into bases in fp8: plain numbers without a trace of the codec, or the nearest codes on the scales that were there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.kit import HIDDEN, make_base, make_lora

E4M3 = torch.float8_e4m3fn
BLOCK = 16

Tensors = dict[str, torch.Tensor]


def blocks_of(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().reshape(weight.shape[0] // BLOCK, BLOCK, weight.shape[1] // BLOCK, BLOCK)


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and the scales of blocks, as transformers computes them."""
    blocks = blocks_of(weight)
    scales = blocks.abs().amax((1, 3)) / 448
    return on_scales(weight, scales), scales


def on_scales(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (blocks_of(weight) / scales[:, None, :, None]).clamp(-448, 448).to(E4M3).reshape(weight.shape)


def decoded(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (blocks_of(codes) * scales[:, None, :, None]).reshape(codes.shape)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model whose projections are in blocks of fp8, with the scales of inputs and a cache in fp8."""
    folder = make_base(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensors[name])
        tensors[f"{name.removesuffix('.weight')}.activation_scale"] = torch.tensor(0.25)
    tensors["model.layers.0.self_attn.kv_scale"] = torch.ones(4).to(E4M3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    told = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "static"}
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16", "quantization_config": told}))
    return folder


def weights(folder: Path) -> Tensors:
    """Of the base, dequantised in float64."""
    tensors = load_file(folder / "model.safetensors")
    scaled = {name: tensors[f"{name}_scale_inv"] for name in tensors if f"{name}_scale_inv" in tensors}
    whole = {name: tensor for name, tensor in tensors.items() if not name.endswith(("scale_inv", "activation_scale"))}
    return {name: decoded(t, scaled[name]).double() if name in scaled else t.double() for name, t in whole.items()}


def merged(base: Path, lora: Path) -> Tensors:
    """The exact sum."""
    factors, expected = load_file(lora / "adapter_model.safetensors"), weights(base)
    for key in (key for key in factors if key.endswith("lora_A.weight")):
        name = f"{key.removeprefix('base_model.model.').removesuffix('.lora_A.weight')}.weight"
        expected[name] += 2 * factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double()
    return expected


def test_a_merge_into_fp8_is_the_sum_in_16_bits_and_nothing_of_fp8_is_left(base: Path, tmp_path: Path) -> None:
    lora = make_lora(tmp_path / "lora")
    result = surgery.merge(base, lora, output=tmp_path / "out")
    after, expected = load_file(tmp_path / "out" / "model.safetensors"), merged(base, lora)
    assert after.keys() == expected.keys()
    for name, wanted in expected.items():
        assert after[name].dtype is (E4M3 if "kv_scale" in name else torch.bfloat16)
        torch.testing.assert_close(after[name].double(), wanted, rtol=2.0**-8, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "activation_scale" in str(result.ledger.plan.accounts)


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_codes_again_are_as_near_as_the_nearest_on_the_scales_of_the_base(
    strength: float, base: Path, tmp_path: Path
) -> None:
    """A great update gets scales of its own."""
    lora = make_lora(tmp_path / "lora", strength)
    surgery.merge(base, lora, output=tmp_path / "out", quantized="requantize", rounding="nearest")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    expected = merged(base, lora)
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    changed = [name for name in before if not torch.equal(before[name].float(), after[name].float())]
    assert {name.removesuffix("_scale_inv") for name in changed} == {
        name for name in expected if ".q_proj" in name or ".v_proj" in name
    }
    for name in (name for name in changed if name.endswith(".weight")):
        scales = before[f"{name}_scale_inv"]
        near = decoded(on_scales(expected[name], scales), scales)
        made = decoded(after[name], after[f"{name}_scale_inv"])
        assert (made - expected[name]).norm() <= 1.0001 * (near - expected[name]).norm(), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((base / "config.json").read_text())


def test_a_scale_that_is_no_number_is_refused_by_name_and_nothing_is_written(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight_scale_inv"
    tensors[name][1, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(surgery.SurgeryError, match="a scale is nan") as caught:
        surgery.merge(base, make_lora(tmp_path / "lora"), output=tmp_path / "out")
    assert caught.value.tensor == name
    assert not (tmp_path / "out").exists()


def metadata(folder: Path) -> dict[str, str]:
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale", ""])
def test_a_model_of_comfyui_in_one_file(suffix: str, tmp_path: Path) -> None:
    """Scaled weights with their marker, in both spellings, and a model that was only cast to fp8, its biases too."""
    torch.manual_seed(0)
    name = "double_blocks.0.img_attn.proj"
    weight, bias = 0.1 * torch.randn(HIDDEN, HIDDEN), torch.randn(HIDDEN)
    scale = weight.abs().max() / 448 if suffix else torch.tensor(1.0)
    tensors: Tensors = {
        f"{name}.weight": (weight / scale).to(E4M3),
        "double_blocks.0.img_mod.lin.bias": bias.bfloat16(),
    }
    if suffix:
        tensors |= {"scaled_fp8": torch.empty(0, dtype=E4M3), f"{name}.{suffix}": scale}
        tensors[f"{name}.scale_input"] = torch.tensor(1.0)
    else:
        tensors |= {f"{name}.bias": bias.to(E4M3), "double_blocks.0.img_attn.norm.key_norm.scale": bias.to(E4M3)}
    layers = {"img_attn.proj": {"format": "float8_e4m3fn"}, name: {"format": "float8_e4m3fn"}, "gone": {}}
    told = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers}), "modelspec.title": "a"}
    save_file(tensors, tmp_path / "flux.safetensors", told)
    down, up = torch.randn(4, HIDDEN), 0.01 * torch.randn(HIDDEN, 4)
    flat = f"lora_unet_{name.replace('.', '_')}"
    lora: Mapping[str, torch.Tensor] = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
    save_file({**lora, f"{flat}.alpha": torch.tensor(4.0)}, tmp_path / "lora.safetensors")

    surgery.merge(tmp_path / "flux.safetensors", tmp_path / "lora.safetensors", output=tmp_path / "out")
    after = {
        key: tensor for file in (tmp_path / "out").glob("*.safetensors") for key, tensor in load_file(file).items()
    }
    lost = {"scaled_fp8", f"{name}.{suffix}", f"{name}.scale_input"} if suffix else set()
    assert after.keys() == tensors.keys() - lost
    assert metadata(tmp_path / "out") == {"format": "pt", "modelspec.title": "a"}
    assert all(tensor.dtype is torch.bfloat16 for tensor in after.values())
    wanted = tensors[f"{name}.weight"].double() * scale.double() + up.double() @ down.double()
    torch.testing.assert_close(after[f"{name}.weight"].double(), wanted, rtol=2.0**-8, atol=1e-6)

    surgery.merge(
        tmp_path / "flux.safetensors",
        tmp_path / "lora.safetensors",
        output=tmp_path / "again",
        quantized="requantize",
        rounding="nearest",
    )
    kept = {
        key: tensor for file in (tmp_path / "again").glob("*.safetensors") for key, tensor in load_file(file).items()
    }
    assert {key: tensor.dtype for key, tensor in kept.items()} == {key: tensor.dtype for key, tensor in tensors.items()}
    near = (wanted / scale.double()).clamp(-448, 448).float().to(E4M3).double()
    made = kept[f"{name}.weight"].double() * (kept[f"{name}.{suffix}"].double() if suffix else 1)
    assert (made - wanted).norm() <= 1.0001 * (near * scale.double() - wanted).norm()


def test_inspect_counts_weights_and_not_codes(base: Path) -> None:
    plain = sum(tensor.numel() for name, tensor in weights(base).items())
    assert surgery.inspect(base).components[0].parameters == plain
    kinds = {parameter.storage.kind for parameter in open_checkpoint(base).main.parameters.values()}
    assert kinds == {"BF16", "FP8 16x16", "F8_E4M3"}
