# SPDX-License-Identifier: Apache-2.0
"""Adapters in one file through the verbs: summed, cut and split under their own keys, merged into what people have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from surgery import combine, convert, diff, inspect, merge, resize
from surgery_formats.errors import FitError
from tests.support.adapter_files import GOLDEN, Arrays, assert_close, draw, kohya_deltas, merged, write_base

BLOCK = "lora_unet_double_blocks_0_img_attn_qkv"


def _kohya(
    path: Path, seed: int, rank: int, alpha: float, modules: dict[str, tuple[int, ...]], **metadata: str
) -> Path:
    tensors: Arrays = {}
    for number, (stem, (out, *inputs)) in enumerate(modules.items()):
        ones = (1,) * (len(inputs) - 1)
        tensors[f"{stem}.lora_down.weight"] = draw(seed + number, rank, *inputs)
        tensors[f"{stem}.lora_up.weight"] = draw(seed + number + 50, out, rank, *ones)
        tensors[f"{stem}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path, metadata or None)
    return path


def test_files_of_other_rank_and_alpha_become_one_without_a_base(tmp_path: Path) -> None:
    modules = {BLOCK: (18, 6), "lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 6)}
    facts = {"ss_network_dim": "2", "ss_network_alpha": "1.0", "ss_network_module": "networks.lora", "ss_tag": "x"}
    style = _kohya(tmp_path / "style.safetensors", 1, 2, 1.0, modules, **facts)
    face = _kohya(tmp_path / "face.safetensors", 2, 3, 3.0, {BLOCK: (18, 6)}, **facts | {"ss_tag": "y"})
    result = combine({style: 0.8, face: 0.5}, output=tmp_path / "both.safetensors")
    assert sorted(module.rank for module in result.modules) == [2, 5]
    both = tmp_path / "both.safetensors"
    assert load_file(both).keys() == load_file(style).keys()
    wanted = {name: 0.8 * delta for name, delta in kohya_deltas(style).items()}
    for name, delta in kohya_deltas(face).items():
        wanted[name] = wanted[name] + 0.5 * delta
    assert_close(kohya_deltas(both), wanted)
    with safe_open(both, "np") as opened:
        kept = opened.metadata()
    assert kept["ss_network_module"] == "networks.lora"
    assert "ss_tag" not in kept  # what one training wrote is not true of two


def test_convolutions_and_names_that_other_tools_trip_over_are_resized(tmp_path: Path) -> None:
    modules = {
        "lora_te2_text_projection": (10, 8),
        "lora_unet_down_blocks_0_resnets_0_conv1": (8, 6, 3, 3),
        "lora_unet_add_embedding_linear_1": (8, 12),
    }
    file = _kohya(tmp_path / "ot.safetensors", 3, 6, 4.0, modules, **{"modelspec.title": "t"})
    resize(file, rank=2, output=tmp_path / "small.safetensors")
    small, source = load_file(tmp_path / "small.safetensors"), load_file(file)
    assert small.keys() == source.keys()
    assert small["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (2, 6, 3, 3)
    for name, delta in kohya_deltas(file).items():
        u, s, v = np.linalg.svd(delta.reshape(len(delta), -1), full_matrices=False)
        best = (u[:, :2] * s[:2]) @ v[:2]
        assert np.allclose(kohya_deltas(tmp_path / "small.safetensors")[name].reshape(best.shape), best, atol=1e-5)
    with safe_open(tmp_path / "small.safetensors", "np") as opened:
        assert opened.metadata() == {"modelspec.title": "t"}


def test_kronecker_products_are_summed_in_a_merge_and_cut_in_a_combination(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"blocks.0.q.weight": (12, 12)}, {})
    total = np.zeros((12, 12))
    weights = {}
    for seed, weight in ((1, 1.0), (3, -2.0), (5, 2.0)):
        left, right = draw(seed, 3, 2), draw(seed + 1, 4, 6)
        save_file(
            {"lora_unet_blocks_0_q.lokr_w1": left, "lora_unet_blocks_0_q.lokr_w2": right},
            tmp_path / f"{seed}.safetensors",
        )
        weights[tmp_path / f"{seed}.safetensors"] = weight
        total += weight * np.kron(left, right)
    merge(base, weights, output=tmp_path / "m")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "m" / "model.safetensors")
    assert np.allclose(after["blocks.0.q.weight"] - before["blocks.0.q.weight"], total, atol=1e-5)
    with pytest.raises(FitError, match="no low rank"):
        combine(weights, output=tmp_path / "c.safetensors")
    combine(weights, rank=5, output=tmp_path / "c.safetensors")
    u, s, v = np.linalg.svd(total)
    ((delta),) = kohya_deltas(tmp_path / "c.safetensors").values()
    assert np.allclose(delta, (u[:, :5] * s[:5]) @ v[:5], atol=1e-4)


def test_kronecker_products_whose_shapes_show_a_low_rank_are_summed_exactly(tmp_path: Path) -> None:
    """Of a tall and of a wide factor the rank is that of their short sides; half of the weight's directions may be taken."""
    weights, total = {}, np.zeros((24, 24))
    for seed, weight in ((1, 1.0), (3, -2.0), (5, 2.0)):
        left, right = draw(seed, 2, 12), draw(seed + 1, 12, 2)
        save_file(
            {"lora_unet_blocks_0_q.lokr_w1": left, "lora_unet_blocks_0_q.lokr_w2": right},
            tmp_path / f"{seed}.safetensors",
        )
        weights[tmp_path / f"{seed}.safetensors"] = weight
        total += weight * np.kron(left, right)
    result = combine(weights, output=tmp_path / "c.safetensors")
    assert [(module.outcome, module.rank) for module in result.modules] == [("exact", 12)]
    ((delta),) = kohya_deltas(tmp_path / "c.safetensors").values()
    assert np.allclose(delta, total, atol=1e-4)


def test_two_spellings_of_one_network_meet_at_the_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"blocks.0.self_attn.q.weight": (8, 6)}, {})
    flat = _kohya(tmp_path / "flat.safetensors", 1, 2, 2.0, {"lora_unet_blocks_0_self_attn_q": (8, 6)})
    stem = "diffusion_model.blocks.0.self_attn.q"
    dotted = tmp_path / "dotted.safetensors"
    save_file({f"{stem}.lora_A.weight": draw(7, 3, 6), f"{stem}.lora_B.weight": draw(8, 8, 3)}, dotted)
    for number, pair in enumerate(([flat, dotted], [dotted, flat])):
        result = combine(pair, base=base, output=tmp_path / f"{number}.safetensors")
        assert [module.rank for module in result.modules] == [5]
        got = merged(base, tmp_path / f"{number}.safetensors", tmp_path / f"out{number}")
        both = sum(kohya_deltas(flat).values()) + draw(8, 8, 3) @ draw(7, 3, 6)
        before = load_file(base / "model.safetensors")
        assert np.allclose(got["blocks.0.self_attn.q.weight"] - before["blocks.0.self_attn.q.weight"], both, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "stem", "message", "hint"),
    [
        # A LoRA of Wan 1.3B on a wider Wan, keys of a broken exporter, and sd-scripts' T5 on a model without one.
        (
            {"blocks.0.self_attn.q.weight": (12, 12)},
            "lora_unet_blocks_0_self_attn_q",
            r"made for a weight of \[8, 8\], but 'blocks.0.self_attn.q.weight' is \[12, 12\]",
            "is this the base",
        ),
        (
            {"context_embedder.weight": (8, 8)},
            "lora_unet_context_embedder_",
            "has no parameter 'unet:context_embedder_.weight'",
            "did you mean 'context_embedder.weight'",
        ),
        (
            {"down_blocks.0.attentions.0.proj_in.weight": (8, 8)},
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            "changes text_encoder_3, the base has unet: 1 of 1",
            "is this the base",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_both_sides(
    tmp_path: Path, base: dict[str, tuple[int, ...]], stem: str, message: str, hint: str
) -> None:
    adapter = _kohya(tmp_path / "a.safetensors", 1, 2, 2.0, {stem: (8, 8)})
    if stem.startswith("lora_te"):
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
        write_base(tmp_path / "base" / "unet", base, {"_class_name": "UNet2DConditionModel"})
    else:
        write_base(tmp_path / "base", base, {})
    with pytest.raises(FitError, match=message) as refused:
        merge(tmp_path / "base", adapter, output=tmp_path / "out")
    assert hint in refused.value.hint


def test_a_dotted_file_is_converted_where_the_base_knows_its_names(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"blocks.0.self_attn.q.weight": (8, 6)}, {})
    flat = _kohya(tmp_path / "flat.safetensors", 1, 2, 3.0, {"lora_unet_blocks_0_self_attn_q": (8, 6)})
    wan = "blocks.0.self_attn.q."  # diffusers calls it otherwise
    stems = {"comfyui": f"diffusion_model.{wan}", "diffusers": "transformer.blocks.0.attn1.to_q.", "bare": wan}
    for target, stem in stems.items():
        convert(flat, target, output=tmp_path / f"{target}.safetensors", base=base)
        written = load_file(tmp_path / f"{target}.safetensors")
        assert all(key.startswith(stem) for key in written)
        assert inspect(tmp_path / f"{target}.safetensors").scales == {1.5: 1}
        convert(tmp_path / f"{target}.safetensors", "peft", output=tmp_path / f"{target}-peft", base=base)
    with pytest.raises(FitError, match="only the base can tell"):
        convert(flat, "comfyui", output=tmp_path / "no.safetensors")


def test_dotted_names_of_a_denoiser_are_flattened_without_a_base(tmp_path: Path) -> None:
    stem = "diffusion_model.blocks.0.self_attn.q"
    file = tmp_path / "d.safetensors"
    save_file({f"{stem}.lora_A.weight": draw(7, 3, 6), f"{stem}.lora_B.weight": draw(8, 8, 3)}, file)
    convert(file, "kohya", output=tmp_path / "k.safetensors")
    assert kohya_deltas(tmp_path / "k.safetensors").keys() == {"lora_unet_blocks_0_self_attn_q"}
    save_file({f"model.layers.0.q_proj.{side}.weight": draw(1, 4, 4) for side in ("lora_A", "lora_B")}, file)
    with pytest.raises(FitError, match="come from the base"):
        convert(file, "kohya", output=tmp_path / "no.safetensors")


def test_spellings_of_one_lora_are_equal_on_the_base(tmp_path: Path) -> None:
    """kohya's, diffusers', ComfyUI's and the bare one; without a base only the denoiser's own names are told to be the same."""
    base = write_base(
        tmp_path / "base", {"blocks.0.self_attn.q.weight": (8, 6), "blocks.0.self_attn.k.weight": (8, 6)}, {}
    )
    stems = {f"lora_unet_blocks_0_self_attn_{part}": (8, 6) for part in "qk"}
    flat = _kohya(tmp_path / "kohya.safetensors", 1, 2, 3.0, stems)
    files = [flat]
    for target in ("diffusers", "comfyui", "bare"):
        files.append(tmp_path / f"{target}.safetensors")
        convert(flat, target, output=files[-1], base=base)
    for one in files:
        for other in files:
            found = diff(one, other, base=base)
            assert found.equal, (one.name, other.name)
            assert [module.difference for module in found.modules] == [0.0, 0.0]
    assert diff(flat, files[2]).equal  # ComfyUI has the base's own names
    assert not diff(flat, files[1]).same_structure
    combine({flat: 0.5}, output=tmp_path / "half.safetensors")
    halved = diff(files[1], tmp_path / "half.safetensors", base=base)
    assert {module.status for module in halved.modules} == {"different"}
    assert halved.difference == pytest.approx(0.5)


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_a_fused_weight_and_its_parts_are_compared_on_the_base(layout: str, tmp_path: Path) -> None:
    """XLabs trains Flux' fused projections; diffusers has q, k and v, and the base either."""
    base, fused = GOLDEN / f"flux/base-{layout}.safetensors", GOLDEN / "flux/xlabs/adapter.safetensors"
    parts = tmp_path / "parts.safetensors"
    convert(fused, "diffusers", output=parts, base=base)
    assert not diff(fused, parts).same_structure
    found = diff(fused, parts, base=base)
    assert found.equal
    assert max(module.difference for module in found.modules) <= 1e-7
    combine({parts: 2.0}, output=tmp_path / "twice.safetensors")
    assert diff(fused, tmp_path / "twice.safetensors", base=base).difference == pytest.approx(1.0)
    with pytest.raises(FitError, match="these are models"):
        diff(base, base, base=base)
