# SPDX-License-Identifier: Apache-2.0
"""Check, for programs of diffusion models: what they read of an adapter file, and one that they read whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from tests.support.adapter_files import GOLDEN, assert_close, draw, merged, unet, write_base, write_peft
from tests.support.bases import drawn, written
from tests.support.kit import ROOT


def test_ia3_is_the_kind_of_lycoris_that_comfyui_has_no_class_for(tmp_path: Path) -> None:
    model = unet(tmp_path / "unet")
    name = next(key for key in load_file(model / "diffusion_pytorch_model.safetensors") if key.endswith("to_q.weight"))
    stem = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
    rows = load_file(model / "diffusion_pytorch_model.safetensors")[name].shape[0]
    tensors = {f"{stem}.weight": draw(1, rows, 1), f"{stem}.on_input": np.zeros((), np.bool_)}
    save_file(tensors, tmp_path / "ia3.safetensors")
    (check,) = surgery.check(model, tmp_path / "ia3.safetensors", consumer="comfyui").consumers
    assert (check.outcome, check.faults[0].what, check.faults[0].remedy) == ("ignored", "other kind", "lora")


@pytest.mark.parametrize("consumer", ["diffusers", "comfyui"])
def test_diffusion_programs_get_one_file_with_the_scale_inside(tmp_path: Path, consumer: str) -> None:
    network = unet(tmp_path / "unet")
    linear = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    convolution = "base_model.model.down_blocks.0.resnets.0.conv1"
    tensors = {
        f"{linear}.lora_A.weight": draw(1, 2, 4),
        f"{linear}.lora_B.weight": draw(2, 6, 2),
        f"{convolution}.lora_A.weight": draw(3, 2, 4, 3, 3),
        f"{convolution}.lora_B.weight": draw(4, 4, 2, 1, 1),
    }
    adapter = write_peft(tmp_path / "a", tensors, target_modules=["to_q", "conv1"], use_rslora=True)
    fixed = tmp_path / "style.safetensors"
    surgery.check(network, adapter, consumer=consumer, fix=fixed)
    assert surgery.check(network, fixed, consumer=consumer).honoured
    own = {"diffusers": "unet.", "comfyui": "lora_unet_"}[consumer]
    assert all(name.startswith(own) for name in load_file(fixed))
    assert_close(merged(network, fixed, tmp_path / "one"), merged(network, adapter, tmp_path / "other"))


_FLUX = {
    "img_in": (16, 4),
    "time_in.in_layer": (16, 8),
    "final_layer.linear": (4, 16),
    "final_layer.adaLN_modulation.1": (32, 16),
    "double_blocks.0.img_attn.qkv": (48, 16),
    "single_blocks.0.linear2": (16, 80),
}
_OF_FLUX = {name.replace(".", "_"): shape for name, shape in _FLUX.items()}


def _flux(folder: Path) -> Path:
    """In the release's names, with the layers that tell its family and the others' sizes."""
    others = {
        "txt_in": (16, 8),
        "time_in.out_layer": (16, 16),
        "vector_in.in_layer": (16, 8),
        "vector_in.out_layer": (16, 16),
        "double_blocks.0.img_mod.lin": (96, 16),
        "single_blocks.0.linear1": (112, 16),
        "single_blocks.0.modulation.lin": (48, 16),
    }
    shapes = {f"{name}.weight": shape for name, shape in {**_FLUX, **others}.items()}
    return write_base(folder, {**shapes, "single_blocks.0.norm.key_norm.scale": (8,)}, {})


def _kohya(file: Path, modules: Mapping[str, tuple[int, int]], axis: int | None = None) -> Path:
    tensors: dict[str, np.ndarray] = {}
    for number, (name, shape) in enumerate(modules.items()):
        tensors[f"lora_unet_{name}.lora_down.weight"] = draw(number, 2, shape[1])
        tensors[f"lora_unet_{name}.lora_up.weight"] = draw(number + 50, shape[0], 2)
        if axis is not None:
            lengths = abs(draw(number + 90, shape[axis]))
            tensors[f"lora_unet_{name}.dora_scale"] = lengths[:, None] if axis == 0 else lengths[None]
    save_file(tensors, file)
    return file


def test_diffusers_leaves_layers_of_kohyas_flux_files_out_and_gets_its_own_names(tmp_path: Path) -> None:
    base, file = _flux(tmp_path / "base"), _kohya(tmp_path / "a.safetensors", _OF_FLUX)
    (check,) = surgery.check(base, file, consumer="diffusers").consumers
    left_out = {fault.part.removeprefix("unet:").removesuffix(".weight") for fault in check.faults}
    assert left_out == {name for name in _OF_FLUX if "blocks" not in name}
    assert {(fault.outcome, fault.remedy) for fault in check.faults} == {("ignored", "rewrite")}
    surgery.check(base, file, consumer="diffusers", fix=tmp_path / "own.safetensors")
    own = load_file(tmp_path / "own.safetensors")
    assert all(name.startswith("transformer.") for name in own)
    assert "transformer.x_embedder.lora_A.weight" in own
    assert surgery.check(base, tmp_path / "own.safetensors", consumer="diffusers").honoured
    assert_close(
        merged(base, tmp_path / "own.safetensors", tmp_path / "one"), merged(base, file, tmp_path / "other"), 1e-6
    )


@pytest.mark.parametrize("kind", ["control", "xlabs", "fal"])
def test_diffusers_loads_three_kinds_of_flux_files_and_turns_a_layer_of_one(kind: str, tmp_path: Path) -> None:
    """tests/golden/flux has what diffusers made of them: all as they were trained, but norm_out of the control LoRA."""
    base, file = GOLDEN / "flux/base-diffusers.safetensors", GOLDEN / "flux" / kind / "adapter.safetensors"
    (check,) = surgery.check(base, file, consumer="diffusers").consumers
    turned = ["denoiser:final_layer.adaLN_modulation.1.weight"] if kind == "control" else []
    assert [fault.part for fault in check.faults] == turned
    if turned:
        surgery.check(base, file, consumer="diffusers", fix=tmp_path / "own.safetensors")
        assert surgery.check(base, tmp_path / "own.safetensors", consumer="diffusers").honoured


def test_diffusers_refuses_other_files_with_the_modules_names_alone(tmp_path: Path) -> None:
    stem = "single_blocks.0.linear2"
    save_file(
        {f"{stem}.lora_A.weight": draw(1, 2, 80), f"{stem}.lora_B.weight": draw(2, 16, 2)}, tmp_path / "a.safetensors"
    )
    (check,) = surgery.check(
        GOLDEN / "flux/base-bfl.safetensors", tmp_path / "a.safetensors", consumer="diffusers"
    ).consumers
    assert [(fault.part, fault.outcome) for fault in check.faults] == [("a.safetensors", "refused")]


def test_diffusers_filters_dora_scale_out_of_every_file(tmp_path: Path) -> None:
    """Of rows they are written as PEFT spells them; of columns, and beside a LoRA, a LoRA stands for them."""
    base, file = _flux(tmp_path / "base"), tmp_path / "a.safetensors"
    one = {"single_blocks_0_linear2": _OF_FLUX["single_blocks_0_linear2"]}
    for axis, remedy in ((0, "rewrite"), (1, "lora")):
        (check,) = surgery.check(base, _kohya(file, one, axis), consumer="diffusers").consumers
        assert [(fault.what, fault.outcome, fault.remedy) for fault in check.faults] == [("DoRA", "ignored", remedy)]
        fixed, options = tmp_path / f"{axis}.safetensors", {"rank": 16} if axis else {}
        surgery.check(base, file, consumer="diffusers", fix=fixed, **options)
        assert not any("dora_scale" in name for name in load_file(fixed))
        assert any("lora_magnitude_vector" in name for name in load_file(fixed)) == (axis == 0)
        assert_close(merged(base, fixed, tmp_path / f"m{axis}"), merged(base, file, tmp_path / f"w{axis}"), 1e-5)
    dotted = tmp_path / "dotted.safetensors"
    stem = "transformer.single_transformer_blocks.0.proj_out"
    own = {"lora_A.weight": draw(1, 2, 80), "lora_B.weight": draw(2, 16, 2), "dora_scale": abs(draw(3, 16, 1))}
    save_file({f"{stem}.{leaf}": value for leaf, value in own.items()}, dotted)
    surgery.check(base, dotted, consumer="diffusers", fix=tmp_path / "spelt.safetensors")
    assert f"{stem}.lora_magnitude_vector" in load_file(tmp_path / "spelt.safetensors")


def test_pipelines_without_a_converter_find_nothing_in_kohyas_files(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"joint_blocks.0.x_block.attn.proj.weight": (8, 8)}, {})
    file = _kohya(tmp_path / "a.safetensors", {"joint_blocks_0_x_block_attn_proj": (8, 8)})
    (check,) = surgery.check(base, file, consumer="diffusers").consumers
    assert [(fault.outcome, fault.remedy) for fault in check.faults] == [("ignored", "rewrite")]


@pytest.mark.parametrize("form", ["peft", "comfyui"])
def test_comfyui_has_no_place_for_a_language_model_by_itself_however_it_is_written(form: str, tmp_path: Path) -> None:
    base, adapter = ROOT / "examples/base", ROOT / "examples/lora"
    if form == "comfyui":
        told = str(surgery.convert(adapter, "comfyui", output=tmp_path / "c.safetensors").summary())
        assert "models/loras" not in told
        assert "surgery check BASE" in told
        adapter = tmp_path / "c.safetensors"
    result = surgery.check(base, adapter, consumer="comfyui")
    (check,) = result.consumers
    assert {(one.outcome, one.remedy) for one in check.verdicts} == {("ignored", "")}
    told = str(result.summary())
    assert "--fix" not in told
    assert f"surgery merge {base} {adapter} -o OUT" in told
    for ask in (
        lambda: surgery.check(base, adapter, consumer="comfyui", fix=tmp_path / "f.safetensors"),
        lambda: surgery.convert(adapter, base=base, consumer="comfyui", output=tmp_path / "f.safetensors"),
    ):
        with pytest.raises(surgery.FitError, match="the base is a language model by itself"):
            ask()


def test_a_language_model_in_a_diffusion_model_gets_the_name_that_it_has_in_comfyui(tmp_path: Path) -> None:
    base = written(drawn("z-image", np.float32), "ComfyUI", tmp_path)
    module = "model.layers.0.self_attn.q_proj"
    own = f"text_encoders.qwen3_4b.transformer.{module}"
    save_file({**load_file(base), f"{own}.weight": draw(1, 6, 4)}, base)
    factors = {"lora_A.weight": draw(2, 2, 4), "lora_B.weight": draw(3, 6, 2)}
    adapter, kohya, fixed = (tmp_path / f"{name}.safetensors" for name in ("a", "kohya", "fixed"))
    save_file({f"text_encoder.{module}.{leaf}": value for leaf, value in factors.items()}, adapter)
    surgery.convert(adapter, "kohya", base=base, output=kohya)
    (check,) = surgery.check(base, kohya, consumer="comfyui").consumers
    assert (check.outcome, check.faults[0].remedy) == ("ignored", "rewrite")
    for source in (adapter, kohya):
        surgery.convert(source, base=base, consumer="comfyui", output=fixed, overwrite=True)
        assert all(name.startswith(own) for name in load_file(fixed))
        assert surgery.check(base, fixed, consumer="comfyui").honoured
