# SPDX-License-Identifier: Apache-2.0
"""Adapters of several networks on files that hold them all, and on bases that lack some of them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery import merge
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.models.layouts import registry
from surgery_formats.models.layouts.rule import Network, same, swapped
from tests.support.adapter_files import Arrays, draw
from tests.support.single_files import UNET, G, L, delta, loras, merge_arrays, sdxl


def test_a_lora_of_all_networks_in_a_file_of_all(tmp_path: Path) -> None:
    """U-Net by the release's names and diffusers', CLIP-L by its own, OpenCLIP in the rows of a fused projection."""
    te2 = "lora_te2_text_model_encoder_layers_0_"
    lora = loras(
        ("lora_unet_input_blocks_5_1_proj_in", 6, 4),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", 6, 4),
        ("lora_unet_add_embedding_linear_1", 6, 4),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 6, 4),
        (f"{te2}self_attn_k_proj", 4, 4),
        (f"{te2}mlp_fc1", 6, 4),
        ("lora_te2_text_projection", 6, 4),
    )
    base = sdxl()
    got = merge_arrays(base, lora, tmp_path)
    wanted = {name: tensor.copy() for name, tensor in base.items()}
    wanted[f"{UNET}input_blocks.5.1.proj_in.weight"] += delta(lora, "lora_unet_input_blocks_5_1_proj_in")
    wanted[f"{UNET}input_blocks.4.1.proj_in.weight"] += delta(lora, "lora_unet_down_blocks_1_attentions_0_proj_in")
    wanted[f"{UNET}label_emb.0.0.weight"] += delta(lora, "lora_unet_add_embedding_linear_1")
    wanted[f"{L}mlp.fc1.weight"] += delta(lora, "lora_te1_text_model_encoder_layers_0_mlp_fc1")
    wanted[f"{G}attn.in_proj_weight"][4:8] += delta(lora, f"{te2}self_attn_k_proj")
    wanted[f"{G}mlp.c_fc.weight"] += delta(lora, f"{te2}mlp_fc1")
    wanted["conditioner.embedders.1.model.text_projection"] += delta(lora, "lora_te2_text_projection").T
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(got[name], tensor, atol=1e-6)
        assert np.array_equal(got[name], base[name]) == np.array_equal(tensor, base[name])


def test_a_file_without_text_encoders_lists_what_of_them_is_missing(tmp_path: Path) -> None:
    base = {name: tensor for name, tensor in sdxl().items() if name.startswith(UNET)}
    modules = [(f"lora_te1_text_model_encoder_layers_{n}_mlp_fc{m}", 6, 4) for n in (0, 1, 2, 4) for m in (1, 2)]
    lora = loras(("lora_unet_input_blocks_5_1_proj_in", 6, 4), *modules)
    with pytest.raises(FitError) as refused:
        merge_arrays(base, lora, tmp_path)
    told = str(refused.value)
    assert "the adapter changes text_encoder, the base has denoiser: 8 of 9 parameters are not there: " in told
    for layer in (1, 2):
        assert f"text_encoder:text_model_encoder_layers_[0,1,2,4]_mlp_fc{layer}.weight" in told
    assert 'without them: `without="text_encoder:*"`' in told
    result = merge(
        tmp_path / "base.safetensors", tmp_path / "lora.safetensors", output=tmp_path / "o", without="text_encoder:*"
    )
    assert any("left out, as --without says: 8 parameters" in warning for warning in result.warnings)
    got = load_file(tmp_path / "o" / "base.safetensors")
    assert [name for name in got if not np.array_equal(got[name], base[name])] == [
        f"{UNET}input_blocks.5.1.proj_in.weight"
    ]
    with pytest.raises(FitError, match=r"no module matches 'text_encoder_2:\*'"):
        merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", dry_run=True, without="text_encoder_2:*")
    with pytest.raises(NothingChangedError, match="no module is left"):
        merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", dry_run=True, without=("unet:*", "fc?"))


def test_modules_that_another_version_of_a_network_lacks_are_listed(tmp_path: Path) -> None:
    """Wan 2.1 attends to images, Wan 2.2 does not; a distilled LoRA of the one is used on the other without them."""
    attention = "blocks.0.cross_attn."
    base = {f"{attention}{name}.weight": draw(1, 4, 4) for name in "qkvo"}
    lora = {f"diffusion_model.{attention}{x}.lora_up.weight": draw(2, 4, 2) for x in ("q", "k_img", "v_img")}
    lora |= {f"diffusion_model.{attention}{x}.lora_down.weight": draw(3, 2, 4) for x in ("q", "k_img", "v_img")}
    with pytest.raises(FitError) as refused:
        merge_arrays(base, lora, tmp_path)
    told = str(refused.value)
    assert "2 of 3 do not fit" in told
    assert f"denoiser:{attention}k_img.weight, denoiser:{attention}v_img.weight" in told
    assert 'without them: `without="PATTERN"`' in told
    merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", output=tmp_path / "o", without="*_img")
    got = load_file(tmp_path / "o" / "base.safetensors")
    assert [name for name in got if not np.array_equal(got[name], base[name])] == [f"{attention}q.weight"]


def test_leaving_modules_out_is_another_merge(tmp_path: Path) -> None:
    save_file(sdxl(), tmp_path / "base.safetensors")
    save_file(
        loras(("lora_unet_input_blocks_5_1_proj_in", 6, 4), ("lora_unet_label_emb_0_0", 6, 4)),
        tmp_path / "l.safetensors",
    )
    plans = [
        merge(tmp_path / "base.safetensors", tmp_path / "l.safetensors", dry_run=True, without=out).ledger.plan.id
        for out in ((), "label_emb_0_0", "proj_in")
    ]
    assert len(set(plans)) == 3


def test_a_level_with_a_missing_block_is_not_guessed(tmp_path: Path) -> None:
    """Without one of its blocks, a file of the release no longer tells which level the others are of."""
    base = {name: tensor for name, tensor in sdxl().items() if ".input_blocks.2." not in name}
    with pytest.raises(FitError, match="the base has no parameter"):
        merge_arrays(base, loras(("lora_unet_down_blocks_1_attentions_0_proj_in", 6, 4)), tmp_path)


def test_names_that_several_families_mean_alike_are_no_question(tmp_path: Path) -> None:
    """These two are Flux's and HunyuanVideo's: the rows are the same."""
    flux = {"single_blocks.0.linear1.weight": draw(1, 14, 4), "single_blocks.0.linear2.weight": draw(2, 4, 4)}
    lora = loras(("lora_unet_single_transformer_blocks_0_proj_mlp", 8, 4))
    got = merge_arrays(flux, lora, tmp_path)
    wanted = flux["single_blocks.0.linear1.weight"].copy()
    wanted[6:] += delta(lora, "lora_unet_single_transformer_blocks_0_proj_mlp")
    np.testing.assert_allclose(got["single_blocks.0.linear1.weight"], wanted, atol=1e-6)


def test_names_that_several_families_mean_differently_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [swapped("out.mod", "norm_out"), same("out.mod", "norm_out")]
    networks = tuple(Network(f"Net {n}", (), (lambda _, rule=rule: (rule,),)) for n, rule in enumerate(rules))
    monkeypatch.setattr(registry, "NETWORKS", networks)
    with pytest.raises(FitError, match=r"'norm_out\.weight' means different weights in Net 0, Net 1"):
        merge_arrays({"out.mod.weight": draw(1, 6, 4)}, loras(("lora_unet_norm_out", 6, 4)), tmp_path)


def test_heights_that_a_fused_weight_cannot_have_are_refused(tmp_path: Path) -> None:
    base = {
        "double_blocks.0.img_attn.qkv.weight": draw(1, 10, 4),
        "double_blocks.0.img_attn.proj.weight": draw(2, 4, 4),
    }
    with pytest.raises(FitError, match="the base has no parameter"):
        merge_arrays(base, loras(("lora_unet_transformer_blocks_0_attn_to_q", 4, 4)), tmp_path)


def test_fp8_with_scales_in_a_file_of_all_networks(tmp_path: Path) -> None:
    """Codes in the denoiser of an all-in-one file: the rows of one part change, and keep the file's names."""
    values = draw(1, 6, 4)
    scale = np.float32(np.abs(values).max() / 448)
    codes = (values / scale).astype(ml_dtypes.float8_e4m3fn)
    base = {
        f"{UNET}double_blocks.0.img_attn.qkv.scale_weight": scale.reshape(()),
        f"{UNET}double_blocks.0.img_attn.proj.weight": draw(2, 4, 4),
        "vae.decoder.conv_in.weight": draw(3, 2, 2),
    }
    lora = loras(("lora_unet_transformer_blocks_0_attn_to_k", 2, 4))
    name = f"{UNET}double_blocks.0.img_attn.qkv.weight"
    _save_fp8(tmp_path / "base.safetensors", base, name, codes)
    save_file(lora, tmp_path / "lora.safetensors")
    merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", output=tmp_path / "out", dtype="fp32")
    got = load_file(tmp_path / "out" / "base.safetensors")
    wanted = codes.astype(np.float32) * scale
    wanted[2:4] += delta(lora, "lora_unet_transformer_blocks_0_attn_to_k")
    np.testing.assert_allclose(got[name], wanted, atol=1e-6)
    assert got.keys() == base.keys() - {f"{UNET}double_blocks.0.img_attn.qkv.scale_weight"} | {name}


def _save_fp8(path: Path, tensors: Arrays, name: str, codes: np.ndarray) -> None:
    """safetensors' numpy binding does not write fp8: its header and data by hand."""
    header: dict[str, object] = {}
    data = b""
    for key, tensor in {**tensors, name: codes}.items():
        kind = "F8_E4M3" if key == name else "F32"
        raw = np.ascontiguousarray(tensor).tobytes()
        header[key] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_t5_is_the_second_text_encoder_of_flux_under_either_number(tmp_path: Path) -> None:
    """sd-scripts calls it the third, as that of Stable Diffusion 3 is."""
    pipeline = tmp_path / "flux"
    weights = {
        "transformer": {"transformer_blocks.0.attn.to_q.weight": draw(1, 4, 4)},
        "text_encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": draw(2, 6, 4)},
        "text_encoder_2": {"encoder.block.0.layer.0.SelfAttention.q.weight": draw(3, 4, 4)},
    }
    classes = {"transformer": "FluxTransformer2DModel"}
    for component, tensors in weights.items():
        (pipeline / component).mkdir(parents=True)
        save_file(tensors, pipeline / component / "model.safetensors")
        told = {"_class_name": classes[component]} if component in classes else {}
        kinds = {"text_encoder": "clip_text_model", "text_encoder_2": "t5"}
        told |= {"model_type": kinds[component]} if component in kinds else {}
        (pipeline / component / "config.json").write_text(json.dumps(told))
    index = {"_class_name": "FluxPipeline", **{component: ["diffusers", "x"] for component in weights}}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    for number in (2, 3):
        module = f"lora_te{number}_encoder_block_0_layer_0_SelfAttention_q"
        lora = loras((module, 4, 4))
        save_file(lora, tmp_path / f"{number}.safetensors")
        merge(pipeline, tmp_path / f"{number}.safetensors", output=tmp_path / f"out{number}")
        (got,) = load_file(tmp_path / f"out{number}" / "text_encoder_2" / "model.safetensors").values()
        np.testing.assert_allclose(got, draw(3, 4, 4) + delta(lora, module), atol=1e-6)
