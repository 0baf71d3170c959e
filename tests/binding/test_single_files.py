# SPDX-License-Identifier: Apache-2.0
"""Adapters of several networks on files that hold them all, and on bases that lack some of them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from surgery import merge
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.layouts import registry
from surgery_formats.models.layouts.parts import parts_of
from surgery_formats.models.layouts.rule import Network, same, swapped
from tests.support.adapter_files import Arrays, draw

UNET = "model.diffusion_model."
G = "conditioner.embedders.1.model.transformer.resblocks.0."
L = "conditioner.embedders.0.transformer.text_model.encoder.layers.0."


def _sdxl() -> Arrays:
    """Blocks, levels and text encoders of Stable Diffusion XL, each with a module or two."""
    blocks = [f"input_blocks.{n}.0.in_layers.2" for n in (1, 2, 4, 5)] + ["input_blocks.0.0", "input_blocks.3.0.op"]
    blocks += ["input_blocks.4.1.proj_in", "input_blocks.5.1.proj_in", "middle_block.1.proj_in", "label_emb.0.0"]
    tensors = {f"{UNET}{name}.weight": draw(at, 6, 4) for at, name in enumerate(blocks)}
    tensors[f"{L}mlp.fc1.weight"] = draw(20, 6, 4)
    tensors |= {f"{G}attn.in_proj_weight": draw(21, 12, 4), f"{G}mlp.c_fc.weight": draw(22, 6, 4)}
    tensors |= {"conditioner.embedders.1.model.text_projection": draw(23, 4, 6)}
    return tensors | {"first_stage_model.quant_conv.weight": draw(24, 2, 2), "alphas_cumprod": draw(25, 3)}


def _loras(*modules: tuple[str, int, int]) -> Arrays:
    found: Arrays = {}
    for at, (module, rows, columns) in enumerate(modules):
        found |= {f"{module}.lora_down.weight": draw(40 + at, 2, columns), f"{module}.alpha": np.ones((), np.float32)}
        found[f"{module}.lora_up.weight"] = draw(60 + at, rows, 2)
    return found


def _delta(lora: Arrays, module: str) -> np.ndarray:
    change: np.ndarray = lora[f"{module}.lora_up.weight"] @ lora[f"{module}.lora_down.weight"] / 2
    return change


def _merged(base: Arrays, lora: Arrays, folder: Path, **options: object) -> Arrays:
    save_file(base, folder / "base.safetensors")
    save_file(lora, folder / "lora.safetensors")
    merge(folder / "base.safetensors", folder / "lora.safetensors", output=folder / "out", **options)  # type: ignore[arg-type]
    return load_file(folder / "out" / "base.safetensors")


def test_a_lora_of_all_networks_in_a_file_of_all(tmp_path: Path) -> None:
    """U-Net by the release's names and diffusers', CLIP-L by its own, OpenCLIP in the rows of a fused projection."""
    te2 = "lora_te2_text_model_encoder_layers_0_"
    lora = _loras(
        ("lora_unet_input_blocks_5_1_proj_in", 6, 4),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", 6, 4),
        ("lora_unet_add_embedding_linear_1", 6, 4),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 6, 4),
        (f"{te2}self_attn_k_proj", 4, 4),
        (f"{te2}mlp_fc1", 6, 4),
        ("lora_te2_text_projection", 6, 4),
    )
    base = _sdxl()
    got = _merged(base, lora, tmp_path)
    wanted = {name: tensor.copy() for name, tensor in base.items()}
    wanted[f"{UNET}input_blocks.5.1.proj_in.weight"] += _delta(lora, "lora_unet_input_blocks_5_1_proj_in")
    wanted[f"{UNET}input_blocks.4.1.proj_in.weight"] += _delta(lora, "lora_unet_down_blocks_1_attentions_0_proj_in")
    wanted[f"{UNET}label_emb.0.0.weight"] += _delta(lora, "lora_unet_add_embedding_linear_1")
    wanted[f"{L}mlp.fc1.weight"] += _delta(lora, "lora_te1_text_model_encoder_layers_0_mlp_fc1")
    wanted[f"{G}attn.in_proj_weight"][4:8] += _delta(lora, f"{te2}self_attn_k_proj")
    wanted[f"{G}mlp.c_fc.weight"] += _delta(lora, f"{te2}mlp_fc1")
    wanted["conditioner.embedders.1.model.text_projection"] += _delta(lora, "lora_te2_text_projection").T
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(got[name], tensor, atol=1e-6)
        assert np.array_equal(got[name], base[name]) == np.array_equal(tensor, base[name])


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (
            [
                "text_encoders.clip_l.transformer.x",
                "text_encoders.clip_g.transformer.x",
                "text_encoders.t5xxl.transformer.x",
            ],
            {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
        ),
        (
            ["text_encoders.t5xxl.transformer.x", "text_encoders.clip_l.transformer.x"],
            {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
        ),
        (
            ["text_encoders.clip_l.transformer.x", "text_encoders.llava_llama3.transformer.x"],
            {"text_encoder": "llava_llama3", "text_encoder_2": "clip_l"},
        ),
        (
            ["text_encoders.clip_l.transformer.x", "text_encoders.llama.transformer.x"],
            {"text_encoder": "llama", "text_encoder_2": "clip_l"},
        ),
        (
            [f"text_encoders.{name}.transformer.x" for name in ("llama", "t5xxl", "clip_g", "clip_l")],
            {
                "text_encoder": "clip_l",
                "text_encoder_2": "clip_g",
                "text_encoder_3": "t5xxl",
                "text_encoder_4": "llama",
            },
        ),
    ],
)
def test_text_encoders_are_numbered_as_pipelines_number_them(names: list[str], parts: dict[str, str]) -> None:
    found = {part.component: part.prefix for part in parts_of([f"{UNET}img_in.weight", *names])}
    wanted = {component: f"text_encoders.{name}.transformer." for component, name in parts.items()}
    assert found == {"denoiser": UNET, **wanted}


def test_what_comfyui_saves_without_a_rule_for_the_family() -> None:
    names = ["cond_stage_model.t5xxl.transformer.x", "first_stage_model.x"]
    found = {part.component: part.prefix for part in parts_of([f"{UNET}img_in.weight", *names])}
    assert found == {
        "denoiser": UNET, "text_encoder": "cond_stage_model.t5xxl.transformer.", "vae": "first_stage_model.",
    }  # fmt: skip


def test_other_prefixes_are_believed_if_the_names_are_a_familys() -> None:
    blocks = [f"double_blocks.{n}.img_attn.{x}.weight" for n in (0, 1) for x in ("qkv", "proj")]
    for prefix in ("net.", "model.model.", "model."):
        (found,) = parts_of([f"{prefix}{name}" for name in blocks])
        assert (found.component, found.prefix) == ("denoiser", prefix)
        assert parts_of([f"{prefix}{name}".replace("img", "x") for name in blocks]) == ()


def test_the_refiner_has_the_second_text_encoder_alone() -> None:
    (_, text) = parts_of([f"{UNET}input_blocks.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"])
    assert text.component == "text_encoder_2"


def test_a_language_model_has_no_parts() -> None:
    assert parts_of([f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3)]) == ()


def test_a_file_without_text_encoders_lists_what_of_them_is_missing(tmp_path: Path) -> None:
    base = {name: tensor for name, tensor in _sdxl().items() if name.startswith(UNET)}
    modules = [(f"lora_te1_text_model_encoder_layers_{n}_mlp_fc{m}", 6, 4) for n in (0, 1, 2, 4) for m in (1, 2)]
    lora = _loras(("lora_unet_input_blocks_5_1_proj_in", 6, 4), *modules)
    with pytest.raises(FitError) as refused:
        _merged(base, lora, tmp_path)
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
        _merged(base, lora, tmp_path)
    told = str(refused.value)
    assert "2 of 3 do not fit" in told
    assert f"denoiser:{attention}k_img.weight, denoiser:{attention}v_img.weight" in told
    assert 'without them: `without="PATTERN"`' in told
    merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", output=tmp_path / "o", without="*_img")
    got = load_file(tmp_path / "o" / "base.safetensors")
    assert [name for name in got if not np.array_equal(got[name], base[name])] == [f"{attention}q.weight"]


def test_leaving_modules_out_is_another_merge(tmp_path: Path) -> None:
    save_file(_sdxl(), tmp_path / "base.safetensors")
    save_file(
        _loras(("lora_unet_input_blocks_5_1_proj_in", 6, 4), ("lora_unet_label_emb_0_0", 6, 4)),
        tmp_path / "l.safetensors",
    )
    plans = [
        merge(tmp_path / "base.safetensors", tmp_path / "l.safetensors", dry_run=True, without=out).ledger.plan.id
        for out in ((), "label_emb_0_0", "proj_in")
    ]
    assert len(set(plans)) == 3


def test_a_level_with_a_missing_block_is_not_guessed(tmp_path: Path) -> None:
    """Without one of its blocks, a file of the release no longer tells which level the others are of."""
    base = {name: tensor for name, tensor in _sdxl().items() if ".input_blocks.2." not in name}
    with pytest.raises(FitError, match="the base has no parameter"):
        _merged(base, _loras(("lora_unet_down_blocks_1_attentions_0_proj_in", 6, 4)), tmp_path)


def test_names_that_several_families_mean_alike_are_no_question(tmp_path: Path) -> None:
    """These two are Flux's and HunyuanVideo's: the rows are the same."""
    flux = {"single_blocks.0.linear1.weight": draw(1, 14, 4), "single_blocks.0.linear2.weight": draw(2, 4, 4)}
    lora = _loras(("lora_unet_single_transformer_blocks_0_proj_mlp", 8, 4))
    got = _merged(flux, lora, tmp_path)
    wanted = flux["single_blocks.0.linear1.weight"].copy()
    wanted[6:] += _delta(lora, "lora_unet_single_transformer_blocks_0_proj_mlp")
    np.testing.assert_allclose(got["single_blocks.0.linear1.weight"], wanted, atol=1e-6)


def test_names_that_several_families_mean_differently_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [swapped("out.mod", "norm_out"), same("out.mod", "norm_out")]
    networks = tuple(Network(f"Net {n}", (), (lambda _, rule=rule: (rule,),)) for n, rule in enumerate(rules))
    monkeypatch.setattr(registry, "NETWORKS", networks)
    with pytest.raises(FitError, match=r"'norm_out\.weight' means different weights in Net 0, Net 1"):
        _merged({"out.mod.weight": draw(1, 6, 4)}, _loras(("lora_unet_norm_out", 6, 4)), tmp_path)


def test_heights_that_a_fused_weight_cannot_have_are_refused(tmp_path: Path) -> None:
    base = {
        "double_blocks.0.img_attn.qkv.weight": draw(1, 10, 4),
        "double_blocks.0.img_attn.proj.weight": draw(2, 4, 4),
    }
    with pytest.raises(FitError, match="the base has no parameter"):
        _merged(base, _loras(("lora_unet_transformer_blocks_0_attn_to_q", 4, 4)), tmp_path)


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
    lora = _loras(("lora_unet_transformer_blocks_0_attn_to_k", 2, 4))
    name = f"{UNET}double_blocks.0.img_attn.qkv.weight"
    _save_fp8(tmp_path / "base.safetensors", base, name, codes)
    save_file(lora, tmp_path / "lora.safetensors")
    merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", output=tmp_path / "out", dtype="fp32")
    got = load_file(tmp_path / "out" / "base.safetensors")
    wanted = codes.astype(np.float32) * scale
    wanted[2:4] += _delta(lora, "lora_unet_transformer_blocks_0_attn_to_k")
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
        lora = _loras((module, 4, 4))
        save_file(lora, tmp_path / f"{number}.safetensors")
        merge(pipeline, tmp_path / f"{number}.safetensors", output=tmp_path / f"out{number}")
        (got,) = load_file(tmp_path / f"out{number}" / "text_encoder_2" / "model.safetensors").values()
        np.testing.assert_allclose(got, draw(3, 4, 4) + _delta(lora, module), atol=1e-6)


def test_an_adapter_that_names_the_whole_file_still_fits(tmp_path: Path) -> None:
    """What is extracted from two files has their names, prefix and all."""
    base = _sdxl()
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


def _bfl() -> Arrays:
    """Blocks of Flux in Black Forest Labs' names, with a text encoder beside."""
    shapes = {"double_blocks.0.img_attn.qkv": 12, "double_blocks.0.img_attn.proj": 4, "single_blocks.0.linear1": 28}
    base = {f"{UNET}{name}.weight": draw(at, rows, 4) for at, (name, rows) in enumerate(shapes.items())}
    return base | {"text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": draw(9, 6, 4)}


def test_what_is_written_for_a_file_of_several_networks_has_no_prefix_of_it(tmp_path: Path) -> None:
    save_file(_bfl(), tmp_path / "base.safetensors")
    modules = [
        ("lora_unet_double_blocks_0_img_attn_proj", 4, 4),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 6, 4),
    ]
    save_file(_loras(*modules), tmp_path / "lora.safetensors")
    wanted = {
        "comfyui": {"diffusion_model.double_blocks.0.img_attn.proj"},
        "diffusers": {
            "transformer.transformer_blocks.0.attn.to_out.0",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        },
        "kohya": {"lora_unet_double_blocks_0_img_attn_proj", "lora_te1_text_model_encoder_layers_0_mlp_fc1"},
    }
    before = _merge_of(tmp_path, "lora.safetensors", "before", without=())
    for name, stems in wanted.items():
        out = tmp_path / f"{name}.safetensors"
        base = tmp_path / "base.safetensors"
        surgery.convert(tmp_path / "lora.safetensors", name, output=out, base=base, allow_loss=name == "comfyui")
        found = {key.rpartition(".lora_")[0] for key in load_file(out) if ".lora_" in key}
        assert found == stems
        if name != "comfyui":  # which has no place for text encoders
            after = _merge_of(tmp_path, out.name, f"with-{name}", without=())
            assert all(np.array_equal(tensor, before[key]) for key, tensor in after.items())


def test_diffusers_names_of_what_the_file_holds_as_one(tmp_path: Path) -> None:
    """Parts of a fused weight have names there; the whole has those of all its parts."""
    save_file(_bfl(), tmp_path / "base.safetensors")
    save_file(_loras(("lora_unet_transformer_blocks_0_attn_to_k", 4, 4)), tmp_path / "part.safetensors")
    save_file(_loras(("lora_unet_double_blocks_0_img_attn_qkv", 12, 4)), tmp_path / "whole.safetensors")
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
    weights = _bfl()
    attention = "transformer_blocks.0.attn."
    qkv = weights.pop(f"{UNET}double_blocks.0.img_attn.qkv.weight")
    parts = {f"{attention}to_{x}.weight": rows for x, rows in zip("qkv", np.split(qkv, 3), strict=True)}
    split = parts | {f"{attention}to_out.0.weight": weights[f"{UNET}double_blocks.0.img_attn.proj.weight"]}
    fused = weights | {f"{UNET}double_blocks.0.img_attn.qkv.weight": qkv}
    save_file(fused if base == "fused" else split, tmp_path / "base.safetensors")
    key = [f"lora_unet_transformer_blocks_0_attn_to_{x}" for x in "kv"]
    save_file(_loras(*((module, 4, 4) for module in key)), tmp_path / "part.safetensors")
    save_file(_loras(("lora_unet_double_blocks_0_img_attn_qkv", 12, 4)), tmp_path / "whole.safetensors")
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
    save_file(_bfl(), tmp_path / "base.safetensors")
    save_file(_loras(("lora_unet_transformer_blocks_0_attn_to_k", 4, 4)), tmp_path / "part.safetensors")
    whole = {"diffusion_model.double_blocks.0.img_attn.qkv.diff": draw(3, 12, 4)}
    save_file(whole, tmp_path / "whole.safetensors")
    files = [tmp_path / "part.safetensors", tmp_path / "whole.safetensors"]
    with pytest.raises(FitError, match="are one weight of the base in two layouts") as caught:
        surgery.combine(files, output=tmp_path / "both", base=tmp_path / "base.safetensors")
    assert caught.value.hint == "`surgery merge` takes them together, into the base"
    merge(tmp_path / "base.safetensors", files, output=tmp_path / "out")
    lora, name = load_file(files[0]), f"{UNET}double_blocks.0.img_attn.qkv.weight"
    wanted = _bfl()[name] + whole["diffusion_model.double_blocks.0.img_attn.qkv.diff"]
    wanted[4:8] += _delta(lora, "lora_unet_transformer_blocks_0_attn_to_k")
    np.testing.assert_allclose(load_file(tmp_path / "out" / "base.safetensors")[name], wanted, atol=1e-5)


def test_a_lora_of_two_files_of_several_networks(tmp_path: Path) -> None:
    """A U-Net of the release under the names of sd-scripts: diffusers', but for Stable Diffusion XL."""
    for xl in (False, True):
        folder = tmp_path / f"{xl}"
        folder.mkdir()
        base = {n: t for n, t in _sdxl().items() if xl or ("label_emb" not in n and "conditioner" not in n)}
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
        got = _merge_of(folder, "lora.safetensors", "merged", without=())
        assert all(np.allclose(got[n], t, atol=1e-5) for n, t in tuned.items())


def _merge_of(folder: Path, adapter: str, out: str, without: tuple[str, ...]) -> Arrays:
    merge(folder / "base.safetensors", folder / adapter, output=folder / out, without=without)
    return load_file(folder / out / "base.safetensors")
