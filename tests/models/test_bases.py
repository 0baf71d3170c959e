# SPDX-License-Identifier: Apache-2.0
"""Bases as people have them x spellings of a LoRA: a merge writes the same layout, and the same change in each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from surgery import merge
from surgery.reports.checkpoint_report import CheckpointReport
from tests.support.base_loras import SPELLINGS, lora_of
from tests.support.base_merges import COMBINATIONS, TOLERANCE, Combination, check, compared, sample
from tests.support.bases import KINDS, LAYOUTS, MODELS, drawn, files_of, written

EVERY = 7
"""Of this many combinations one is tried by default; the mark ``slow`` has all."""


@pytest.mark.parametrize("combination", sample(EVERY), ids=str)
def test_a_merge_is_right_in_the_layout_of_its_base(combination: Combination, tmp_path: Path) -> None:
    check(combination, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_a_merge_is_right_in_the_layout_of_its_base_for_all(combination: Combination, tmp_path: Path) -> None:
    check(combination, tmp_path)


@pytest.mark.parametrize("layout", ["release", "ComfyUI"])
@pytest.mark.parametrize("network", KINDS)
def test_inspect_names_the_networks_of_a_file(network: str, layout: str, tmp_path: Path) -> None:
    kind, family = KINDS[network], MODELS[network]["family"]
    report = surgery.inspect(written(drawn(network, np.float32), layout, tmp_path))
    assert isinstance(report, CheckpointReport)
    (component,) = report.components
    found = dict(component.networks)
    inside = len(kind.encoders) if layout == "ComfyUI" else len(kind.inside)
    numbers = [f"text_encoder_{number + 1}" if number else "text_encoder" for number in range(inside)]
    parts = {"denoiser", *numbers, *(["vae"] if layout == "ComfyUI" or kind.vae else [])}
    assert found.keys() == (parts if len(parts) > 1 else {""})
    denoiser = found.get("denoiser", found.get(""))
    assert denoiser == ("LTX-Video or LTX-2" if network == "ltx" else family)
    told = [found[number] for number in numbers]
    assert told == ["CLIP" if name.startswith("clip") else name for name in kind.encoders[:inside]]


def test_both_variants_beside_each_other(tmp_path: Path) -> None:
    """diffusers loads the plain one: that is merged into, and the other, which would be the old model, stays behind."""
    weights, halves = (drawn("sd15", dtype) for dtype in (np.float32, np.float16))
    written(weights, "pipeline", tmp_path / "base")
    others = set(files_of(halves, "variant"))
    written(halves, "variant", tmp_path / "base")
    lora = lora_of(weights, "kohya", encoders=True)
    save_file(lora.tensors, tmp_path / "lora.safetensors")
    result = merge(tmp_path / "base", tmp_path / "lora.safetensors", output=tmp_path / "out")
    (warning,) = result.warnings
    assert all(name in warning for name in others)
    for name in (*others, "unet/diffusion_pytorch_model.safetensors.index.fp16.json"):
        (tmp_path / "base" / name).unlink()
    found = compared(*(files_of(w, "pipeline") for w in (weights, lora.added)), tmp_path / "base", tmp_path / "out")
    assert not found.wrong
    assert found.error < TOLERANCE


def test_the_sample_has_every_network_layout_and_spelling() -> None:
    tried = sample(EVERY)
    assert {one.network for one in tried} == KINDS.keys()
    assert {one.layout for one in tried} == set(LAYOUTS)
    assert {one.spelling for one in tried} == set(SPELLINGS)
    assert len(COMBINATIONS) == len(KINDS) * len(LAYOUTS) * len(SPELLINGS)


def test_clip_behind_a_llama_is_written_as_the_second_encoder(tmp_path: Path) -> None:
    """ComfyUI calls it as it calls the first of other networks; its own format keeps the name."""
    weights = drawn("hunyuan-video", np.float32)
    base = written(weights, "pipeline", tmp_path / "base")
    save_file(lora_of(weights, "ComfyUI", encoders=True).tensors, tmp_path / "lora.safetensors")
    source = load_file(tmp_path / "lora.safetensors")
    for name, wanted in {"diffusers": "text_encoder_2.", "comfyui": "text_encoders.clip_l.transformer."}.items():
        out = tmp_path / f"{name}.safetensors"
        surgery.convert(tmp_path / "lora.safetensors", name, output=out, base=base)
        encoders = {key for key in load_file(out) if key.startswith("text_encoder")}
        assert len(encoders) == len([key for key in source if key.startswith("text_encoders.clip_l.")]) > 0
        assert all(key.startswith(wanted) for key in encoders)
