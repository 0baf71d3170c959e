# SPDX-License-Identifier: Apache-2.0
"""Adapters that are made for files of several networks: converted, summed and extracted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from surgery import merge
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.adapter_files import draw
from tests.support.single_files import UNET, G, L, bfl, delta, loras, merge_files, sdxl


def test_an_adapter_that_names_the_whole_file_still_fits(tmp_path: Path) -> None:
    """What is extracted from two files has their names, prefix and all."""
    base = sdxl()
    tuned = {name: tensor.copy() for name, tensor in base.items()}
    tuned[f"{UNET}label_emb.0.0.weight"] += draw(7, 6, 1) @ draw(8, 1, 4)
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    surgery.extract_lora(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", output=tmp_path / "lora", rank=1
    )
    merge(tmp_path / "base.safetensors", tmp_path / "lora", output=tmp_path / "out")
    got = load_file(tmp_path / "out" / "base.safetensors")
    np.testing.assert_allclose(got[f"{UNET}label_emb.0.0.weight"], tuned[f"{UNET}label_emb.0.0.weight"], atol=1e-5)
    assert open_checkpoint(tmp_path / "base.safetensors").main.parts.keys() == {
        "denoiser", "text_encoder", "text_encoder_2", "vae",
    }  # fmt: skip


def test_what_is_written_for_a_file_of_several_networks_has_no_prefix_of_it(tmp_path: Path) -> None:
    save_file(bfl(), tmp_path / "base.safetensors")
    modules = [
        ("lora_unet_double_blocks_0_img_attn_proj", 4, 4),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 6, 4),
    ]
    save_file(loras(*modules), tmp_path / "lora.safetensors")
    wanted = {
        "comfyui": {
            "diffusion_model.double_blocks.0.img_attn.proj",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        },
        "diffusers": {
            "transformer.transformer_blocks.0.attn.to_out.0",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        },
        "kohya": {"lora_unet_double_blocks_0_img_attn_proj", "lora_te1_text_model_encoder_layers_0_mlp_fc1"},
    }
    before = merge_files(tmp_path, "lora.safetensors", "before")
    for name, stems in wanted.items():
        out = tmp_path / f"{name}.safetensors"
        base = tmp_path / "base.safetensors"
        surgery.convert(tmp_path / "lora.safetensors", name, output=out, base=base)
        found = {key.rpartition(".lora_")[0] for key in load_file(out) if ".lora_" in key}
        assert found == stems
        after = merge_files(tmp_path, out.name, f"with-{name}")
        assert all(np.array_equal(tensor, before[key]) for key, tensor in after.items())


def test_diffusers_names_of_what_the_file_holds_as_one(tmp_path: Path) -> None:
    """Parts of a fused weight have names there; the whole has those of all its parts."""
    save_file(bfl(), tmp_path / "base.safetensors")
    save_file(loras(("lora_unet_transformer_blocks_0_attn_to_k", 4, 4)), tmp_path / "part.safetensors")
    save_file(loras(("lora_unet_double_blocks_0_img_attn_qkv", 12, 4)), tmp_path / "whole.safetensors")
    out, base = tmp_path / "out.safetensors", tmp_path / "base.safetensors"
    surgery.convert(tmp_path / "part.safetensors", "diffusers", output=out, base=base)
    assert {key.rpartition(".lora_")[0] for key in load_file(out)} == {"transformer.transformer_blocks.0.attn.to_k"}
    surgery.convert(tmp_path / "whole.safetensors", "diffusers", output=out, base=base, overwrite=True)
    attention = "transformer.transformer_blocks.0.attn."
    assert {key.rpartition(".lora_")[0] for key in load_file(out)} == {f"{attention}to_{part}" for part in "qkv"}


@pytest.mark.parametrize("first", ["part", "whole"])
@pytest.mark.parametrize("base", ["fused", "split"])
def test_a_sum_of_what_changes_a_weight_whole_and_what_changes_parts_of_it(
    first: str, base: str, tmp_path: Path
) -> None:
    weights = bfl()
    attention = "transformer_blocks.0.attn."
    qkv = weights.pop(f"{UNET}double_blocks.0.img_attn.qkv.weight")
    parts = {f"{attention}to_{x}.weight": rows for x, rows in zip("qkv", np.split(qkv, 3), strict=True)}
    split = parts | {f"{attention}to_out.0.weight": weights[f"{UNET}double_blocks.0.img_attn.proj.weight"]}
    fused = weights | {f"{UNET}double_blocks.0.img_attn.qkv.weight": qkv}
    save_file(fused if base == "fused" else split, tmp_path / "base.safetensors")
    key = [f"lora_unet_transformer_blocks_0_attn_to_{x}" for x in "kv"]
    save_file(loras(*((module, 4, 4) for module in key)), tmp_path / "part.safetensors")
    save_file(loras(("lora_unet_double_blocks_0_img_attn_qkv", 12, 4)), tmp_path / "whole.safetensors")
    files = [tmp_path / "part.safetensors", tmp_path / "whole.safetensors"]
    start, both = tmp_path / "base.safetensors", tmp_path / "both.safetensors"
    surgery.combine(files if first == "part" else files[::-1], output=both, base=start)
    merge(start, files, output=tmp_path / "wanted")
    merge(start, both, output=tmp_path / "got")
    got, wanted = (load_file(tmp_path / name / "base.safetensors") for name in ("got", "wanted"))
    assert got.keys() == wanted.keys()
    assert all(np.allclose(tensor, wanted[name], atol=1e-5) for name, tensor in got.items())
    assert sum(not np.array_equal(tensor, wanted[name]) for name, tensor in load_file(start).items()) == (
        1 if base == "fused" else 3
    )


def test_a_sum_of_a_whole_and_parts_is_of_loras(tmp_path: Path) -> None:
    save_file(bfl(), tmp_path / "base.safetensors")
    save_file(loras(("lora_unet_transformer_blocks_0_attn_to_k", 4, 4)), tmp_path / "part.safetensors")
    whole = {"diffusion_model.double_blocks.0.img_attn.qkv.diff": draw(3, 12, 4)}
    save_file(whole, tmp_path / "whole.safetensors")
    files = [tmp_path / "part.safetensors", tmp_path / "whole.safetensors"]
    with pytest.raises(FitError, match="are one weight of the base in two layouts") as caught:
        surgery.combine(files, output=tmp_path / "both", base=tmp_path / "base.safetensors")
    assert caught.value.hint == "`surgery merge` takes them together, into the base"
    merge(tmp_path / "base.safetensors", files, output=tmp_path / "out")
    lora, name = load_file(files[0]), f"{UNET}double_blocks.0.img_attn.qkv.weight"
    wanted = bfl()[name] + whole["diffusion_model.double_blocks.0.img_attn.qkv.diff"]
    wanted[4:8] += delta(lora, "lora_unet_transformer_blocks_0_attn_to_k")
    np.testing.assert_allclose(load_file(tmp_path / "out" / "base.safetensors")[name], wanted, atol=1e-5)


def test_a_lora_of_two_files_of_several_networks(tmp_path: Path) -> None:
    """A U-Net of the release under the names of sd-scripts: diffusers', but for Stable Diffusion XL."""
    for xl in (False, True):
        folder = tmp_path / f"{xl}"
        folder.mkdir()
        base = {n: t for n, t in sdxl().items() if xl or ("label_emb" not in n and "conditioner" not in n)}
        changed = [f"{UNET}input_blocks.5.1.proj_in.weight"]
        changed += [f"{L}mlp.fc1.weight", f"{G}mlp.c_fc.weight"] if xl else []
        tuned = {n: t + draw(1, t.shape[0], 1) @ draw(2, 1, t.shape[1]) if n in changed else t for n, t in base.items()}
        for name, tensors in (("base", base), ("tuned", tuned)):
            save_file(tensors, folder / f"{name}.safetensors")
        out = folder / "lora.safetensors"
        surgery.extract_lora(folder / "base.safetensors", folder / "tuned.safetensors", output=out, rank=1, to="kohya")
        found = {key.partition(".")[0] for key in load_file(out)}
        te = ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1")
        assert found == (
            {"lora_unet_input_blocks_5_1_proj_in", *te} if xl else {"lora_unet_down_blocks_1_attentions_1_proj_in"}
        )
        got = merge_files(folder, "lora.safetensors", "merged")
        assert all(np.allclose(got[n], t, atol=1e-5) for n, t in tuned.items())
