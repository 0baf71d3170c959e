# SPDX-License-Identifier: Apache-2.0
"""Which networks a file holds, by the names of its tensors."""

from __future__ import annotations

import pytest

from surgery_formats.models.layouts.parts import parts_of
from tests.support.single_files import UNET


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
