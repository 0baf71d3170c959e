# SPDX-License-Identifier: Apache-2.0
"""A LoRA of a projection that one layout fuses, in the names of a layout that holds its parts: Flux as kohya and as diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from surgery import convert, diff, merge
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import FitError
from tests.support.adapter_files import draw, write_base

D, M, RANK = 8, 32, 2
FUSED = {
    "double_blocks.0.img_attn.qkv": (3 * D, D),
    "double_blocks.0.txt_attn.qkv": (3 * D, D),
    "double_blocks.0.img_mlp.0": (M, D),
    "single_blocks.0.linear1": (3 * D + M, D),
    "single_blocks.0.linear2": (D, D + M),
}
PARTS = {
    **{
        f"transformer_blocks.0.attn.{n}": (D, D)
        for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    },
    "transformer_blocks.0.ff.net.0.proj": (M, D),
    **{f"single_transformer_blocks.0.attn.{name}": (D, D) for name in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.0.proj_mlp": (M, D),
    "single_transformer_blocks.0.proj_out": (D, D + M),
}
BESIDE = {
    "double_blocks.0.img_attn.qkv": ("img_in", "txt_in", "vector_in.in_layer", "double_blocks.0.img_mod.lin"),
    "transformer_blocks.0.attn.to_q": (
        *(
            "x_embedder",
            "context_embedder",
            "time_text_embed.text_embedder.linear_1",
            "transformer_blocks.0.norm1.linear",
        ),
    ),
}
"""By which a base of either layout is told to be Flux."""


def model(path: Path, modules: dict[str, tuple[int, int]]) -> Path:
    whole = modules | dict.fromkeys(BESIDE[next(iter(modules))], (D, D))
    save_file({f"{name}.weight": draw(i, *shape) for i, (name, shape) in enumerate(whole.items())}, path)
    return path


def kohya(path: Path, alphas: dict[str, float]) -> Path:
    tensors: dict[str, np.ndarray] = {}
    for i, (name, (out, inputs)) in enumerate(FUSED.items()):
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = draw(50 + i, RANK, inputs).astype(np.float16)
        tensors[f"{key}.lora_up.weight"] = draw(90 + i, out, RANK).astype(np.float16)
        tensors[f"{key}.alpha"] = np.array(alphas.get(name, 1.0), np.float32)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("modules", [FUSED, PARTS], ids=["fused base", "base in parts"])
@pytest.mark.parametrize("alphas", [{}, {"single_blocks.0.linear1": 4.0, "double_blocks.0.img_mlp.0": 0.5}])
def test_it_is_split_and_does_the_same(
    modules: dict[str, tuple[int, int]], alphas: dict[str, float], tmp_path: Path
) -> None:
    base, lora = model(tmp_path / "base.safetensors", modules), kohya(tmp_path / "k.safetensors", alphas)
    result = convert(lora, "diffusers", output=tmp_path / "d.safetensors", base=base)
    assert {entry.outcome for entry in result.entries} == {"exact"}
    keys = load_file(tmp_path / "d.safetensors").keys()
    assert {key.removesuffix(".lora_A.weight") for key in keys if "lora_A" in key} == {
        f"transformer.{n}" for n in PARTS
    }
    for adapter, folder in ((lora, "one"), (tmp_path / "d.safetensors", "two")):
        merge(base, [adapter], output=tmp_path / folder)
    one, two = (next((tmp_path / folder).glob("*.safetensors")).read_bytes() for folder in ("one", "two"))
    assert one == two


def test_the_header_names_modules_as_the_file_does(tmp_path: Path) -> None:
    base = model(tmp_path / "base.safetensors", FUSED)
    lora = kohya(tmp_path / "k.safetensors", {"double_blocks.0.img_mlp.0": 6.0})
    convert(lora, "diffusers", output=tmp_path / "d.safetensors", base=base)
    with safe_open(tmp_path / "d.safetensors", "np") as opened:
        stated = opened.metadata()["lora_adapter_metadata"]
    assert "double_blocks" not in stated.replace("transformer_blocks", "")
    assert '"^transformer_blocks\\\\.0\\\\.ff\\\\.net\\\\.0\\\\.proj": 6' in stated


def test_factors_are_copied_not_widened(tmp_path: Path) -> None:
    base, lora = model(tmp_path / "base.safetensors", FUSED), kohya(tmp_path / "k.safetensors", {})
    convert(lora, "diffusers", output=tmp_path / "d.safetensors", base=base)
    before, after = load_file(lora), load_file(tmp_path / "d.safetensors")
    up = before["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        own = after[f"transformer.transformer_blocks.0.attn.{part}.lora_B.weight"]
        assert own.tobytes() == up[D * i : D * (i + 1)].tobytes()
    assert not read_adapter(tmp_path / "d.safetensors").unconsumed()


def test_parts_become_the_tensors_that_they_were(tmp_path: Path) -> None:
    base, lora = model(tmp_path / "base.safetensors", FUSED), kohya(tmp_path / "k.safetensors", {})
    convert(lora, "diffusers", output=tmp_path / "d.safetensors", base=base)
    convert(tmp_path / "d.safetensors", "kohya", output=tmp_path / "back.safetensors", base=base)
    before, after = load_file(lora), load_file(tmp_path / "back.safetensors")
    assert {name: (values.dtype, values.tobytes()) for name, values in before.items()} == {
        name: (values.dtype, values.tobytes()) for name, values in after.items()
    }


@pytest.mark.parametrize("change", ["none", "one is missing", "another A", "another scale", "another type"])
def test_parts_in_any_order_become_one(change: str, tmp_path: Path) -> None:
    base = model(tmp_path / "base.safetensors", FUSED)
    module = "transformer_blocks.0.attn"
    parts = [part for part in ("to_v", "to_k", "to_q") if (part, change) != ("to_k", "one is missing")]
    tensors, expected = {}, np.zeros((3 * D, D))
    for part in parts:
        odd = part == "to_k"
        A = draw(70 + (odd and change == "another A"), RANK, D).astype(np.float16)
        B = draw(len(part) + ord(part[-1]), D, RANK).astype(
            np.float32 if odd and change == "another type" else np.float16
        )
        alpha = 4.0 if odd and change == "another scale" else 1.0
        key = f"transformer.{module}.{part}"
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B, f"{key}.alpha": np.float32(alpha)}
        row = D * ("to_q", "to_k", "to_v").index(part)
        expected[row : row + D] = alpha / RANK * B.astype(np.float64) @ A.astype(np.float64)
    save_file({name: np.asarray(values) for name, values in tensors.items()}, tmp_path / "d.safetensors")
    convert(tmp_path / "d.safetensors", "kohya", output=tmp_path / "k.safetensors", base=base)
    made = load_file(tmp_path / "k.safetensors")
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    assert {name.partition(".")[0] for name in made} == {key}
    down, up = (made[f"{key}.lora_{side}.weight"].astype(np.float64) for side in ("down", "up"))
    np.testing.assert_allclose(float(made[f"{key}.alpha"]) / len(down) * up @ down, expected, rtol=1e-6, atol=1e-7)
    shared = change in ("none", "one is missing", "another scale", "another type")
    assert len(down) == (RANK if shared else 3 * RANK)


_FUSED = {
    "double_blocks_0_img_attn_qkv": tuple(f"transformer_blocks.0.attn.to_{part}" for part in "qkv"),
    "single_blocks_0_linear1": (
        *(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
    ),
    "final_layer_adaLN_modulation_1": ("norm_out.linear",),
}


def _parts_of(weights: Mapping[str, np.ndarray], parts: Sequence[str]) -> np.ndarray:
    """The fused weight, float64; a modulation's halves lie the other way round."""
    whole = np.concatenate([weights[f"{part}.weight"] for part in parts]).astype(np.float64)
    return np.roll(whole, len(whole) // 2, axis=0) if len(parts) == 1 else whole


@pytest.mark.parametrize("module", _FUSED)
@pytest.mark.parametrize("kind", ["DoRA", "DoHa"])
def test_lengths_of_rows_of_a_fused_weight_meet_its_parts(tmp_path: Path, module: str, kind: str) -> None:
    parts = _FUSED[module]
    shapes = {
        **{f"{part}.weight": (8, 8) for name in _FUSED.values() for part in name},
        "single_transformer_blocks.0.proj_mlp.weight": (32, 8),
        "norm_out.linear.weight": (16, 8),
        "single_transformer_blocks.0.proj_out.weight": (8, 40),
    }
    base = write_base(tmp_path / "base", shapes, {"_class_name": "FluxTransformer2DModel"})
    before = _parts_of(load_file(base / "model.safetensors"), parts)
    out, inputs = before.shape
    factors = [draw(seed, *shape) for seed, shape in enumerate([(out, 2), (2, inputs), (out, 2), (2, inputs)])]
    left, right, other, beside = factors
    names = (
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        if kind == "DoHa"
        else ("lora_up.weight", "lora_down.weight")
    )
    V = before + (left @ right * (other @ beside) if kind == "DoHa" else left @ right)
    for lengths in (abs(draw(9, out, 1)), abs(draw(9, 1, inputs))):
        tensors = {f"lora_unet_{module}.{name}": value for name, value in zip(names, factors, strict=False)}
        save_file({**tensors, f"lora_unet_{module}.dora_scale": lengths}, tmp_path / "a.safetensors")
        if lengths.shape[0] == 1:  # of columns, which go through all parts
            with pytest.raises(FitError, match="needs all of its weight at once"):
                merge(base, tmp_path / "a.safetensors", output=tmp_path / "refused")
            continue
        merge(base, tmp_path / "a.safetensors", output=tmp_path / "out")
        after = _parts_of(load_file(tmp_path / "out" / "model.safetensors"), parts)
        assert np.allclose(after, V * lengths / np.linalg.norm(V, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_lengths_of_a_fused_weight_and_of_its_parts_are_compared_by_rows(tmp_path: Path, fused: bool) -> None:
    shapes = {f"{name}.weight": shape for name, shape in (FUSED if fused else PARTS).items()}
    shapes |= (
        {"img_in.weight": (D, 4), "final_layer.linear.weight": (4, D)}
        if fused
        else {"norm_out.linear.weight": (2 * D, D)}
    )
    base = write_base(tmp_path / "base", shapes, {} if fused else {"_class_name": "FluxTransformer2DModel"})
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    whole = {f"{stem}.lora_up.weight": draw(1, 3 * D, RANK), f"{stem}.lora_down.weight": draw(2, RANK, D)}
    whole |= {f"{stem}.dora_scale": abs(draw(9, 3 * D, 1))}
    save_file(whole, tmp_path / "a.safetensors")
    parts: dict[str, np.ndarray] = {}
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        rows, module = slice(number * D, (number + 1) * D), f"transformer.transformer_blocks.0.attn.{name}"
        parts |= {f"{module}.lora_A.weight": whole[f"{stem}.lora_down.weight"]}
        parts |= {f"{module}.lora_B.weight": whole[f"{stem}.lora_up.weight"][rows].copy()}
        parts |= {f"{module}.lora_magnitude_vector": whole[f"{stem}.dora_scale"][rows, 0].copy()}
    save_file(parts, tmp_path / "b.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", base=base)
    assert [one.status for one in found.modules] == ["equal"] * 3
    parts[f"{module}.lora_magnitude_vector"] *= 2
    save_file(parts, tmp_path / "b.safetensors")
    changed = [
        one
        for one in diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", base=base).modules
        if one.status != "equal"
    ]
    assert [one.note for one in changed] == ["magnitudes differ by 1"]
    assert changed[0].name.endswith("rows 16:24" if fused else "to_v.weight")
