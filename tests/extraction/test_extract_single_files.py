# SPDX-License-Identifier: Apache-2.0
"""Extractions from models that are one file in their maker's layout: what a format cannot hold of them is told as what it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from surgery_formats.errors import FitError
from tests.support.adapter_files import draw
from tests.support.single_files import UNET, G, sdxl

NORM, PROJECTION = f"{UNET}input_blocks.1.0.in_layers.0.weight", f"{UNET}input_blocks.4.1.proj_in.weight"
ATTENTION, BESIDE = f"{G}attn.in_proj_weight", "control_model.zero_conv.bias"
LINEAR, VAE = "control_model.zero_conv.weight", "first_stage_model.quant_conv.weight"


def pair(folder: Path, changed: Iterable[str]) -> tuple[Path, Path]:
    """Stable Diffusion XL in one file, and the same with some other tensors."""
    before = sdxl() | {
        NORM: np.ones(6, np.float32),
        BESIDE: draw(30, 6),
        LINEAR: draw(31, 6, 4),
    }
    after = {
        name: held + draw(at, *held.shape) / 8 for at, (name, held) in enumerate(before.items()) if name in changed
    }
    save_file(before, folder / "base.safetensors")
    save_file(before | after, folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


def test_what_changed_in_modules_is_named_as_kohya_names_it(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    surgery.extract_lora(*pair(tmp_path, [PROJECTION]), to="kohya", rank=4, output=out)
    assert {name.partition(".")[0] for name in load_file(out)} == {"lora_unet_input_blocks_4_1_proj_in"}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (NORM, "this format has no replacement"),
        (
            ATTENTION,
            "it is several weights in one, which this format names apart, as the folder of a pipeline has them",
        ),
        (BESIDE, "it is of no network that this format names"),
        (LINEAR, "it is of no network that this format names"),
        (VAE, "this format has no name for 'vae'"),
    ],
)
def test_what_kohya_cannot_hold_of_a_diffusion_model_is_told_as_that(changed: str, why: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, [PROJECTION, changed])
    with pytest.raises(FitError) as refused:
        surgery.extract_lora(base, tuned, to="kohya", rank=2, output=tmp_path / "out.safetensors")
    assert why in refused.value.message
    assert f"'{changed}'" in refused.value.message


def test_a_whole_parameter_is_explained_with_the_format_that_holds_it(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, [PROJECTION, NORM])
    with pytest.raises(FitError) as refused:
        surgery.extract_lora(base, tuned, to="kohya", rank=4, output=tmp_path / "out.safetensors")
    whole = "a replacement is a whole parameter, such as a bias or a norm, and `to=peft` holds those"
    assert refused.value.hint == f"{whole}, `allow_loss=True` leaves them out"
    surgery.extract_lora(base, tuned, to="peft", rank=4, output=tmp_path / "out")
    assert any(
        name.endswith("in_layers.0.weight") for name in load_file(tmp_path / "out" / "adapter_model.safetensors")
    )


@pytest.mark.parametrize("target", ["kohya", "comfyui", "bare", "diffusers"])
@pytest.mark.parametrize("beside", [VAE, LINEAR])
def test_what_is_beside_the_denoiser_is_left_out_and_not_written_as_part_of_it(
    beside: str, target: str, tmp_path: Path
) -> None:
    base, tuned = pair(tmp_path, [PROJECTION, beside])
    out = tmp_path / "out.safetensors"
    with pytest.raises(FitError, match=f"{target} cannot hold 1 of 2 parts: '{beside}'"):
        surgery.extract_lora(base, tuned, to=target, rank=4, output=out)
    surgery.extract_lora(base, tuned, to=target, rank=4, output=out, allow_loss=True)
    assert len({name.partition(".lora_")[0].removesuffix(".alpha") for name in load_file(out)}) == 1
