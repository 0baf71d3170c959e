# SPDX-License-Identifier: Apache-2.0
"""The grammar of one-file adapters as data: keys taken apart, families and tools told, and every role read by one kind."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_formats.adapters.grammar.kinds import KINDS
from surgery_formats.adapters.grammar.leaves import LEAVES, NOT_READ
from surgery_formats.adapters.grammar.spelling import DOTTED, FLAT, KeyPrefix, split_key
from surgery_formats.adapters.grammar.tools import TOOLS, stated_base, tool_of
from surgery_formats.models.factor_names import FACTOR_SUFFIXES, holds_factors_alone, named_adapter
from surgery_formats.models.families.denoisers import denoiser_of

ANY = KeyPrefix("", "", False)


@pytest.mark.parametrize(
    ("name", "module", "leaf", "stem"),
    [
        ("transformer.a.b.lora_A.weight", "a.b", "lora_A.weight", "transformer.a.b."),
        ("transformer.a.b.lora_A.default.weight", "a.b", "lora_A.default.weight", "transformer.a.b."),
        ("transformer.a.lora_B", "a", "lora_B", "transformer.a."),
        ("unet.a.attn1.processor.to_q_lora.down.weight", "a.attn1.to_q", "lora.down.weight", "unet.a.attn1.processor.to_q_"),
        ("unet.a.attn1.processor.to_out_lora.up.weight", "a.attn1.to_out.0", "lora.up.weight", "unet.a.attn1.processor.to_out_"),
        ("text_encoder.a.self_attn.to_q_lora.up.weight", "a.self_attn.q_proj", "lora.up.weight", "text_encoder.a.self_attn.to_q_"),
        ("text_encoder.a.q_proj.lora_linear_layer.up.weight", "a.q_proj", "lora_linear_layer.up.weight", "text_encoder.a.q_proj."),
        ("unet.a.to_k.lora.up.weight", "a.to_k", "lora.up.weight", "unet.a.to_k."),
        ("lora_unet_a_b.lora_up.weight", "a_b", "lora_up.weight", "lora_unet_a_b."),
        ("lora_unet__a_b.lora_up.weight", "a_b", "lora_up.weight", "lora_unet__a_b."),
        ("lycoris_a_b.lokr_w1", "a_b", "lokr_w1", "lycoris_a_b."),
        ("lora_te2_a.alpha", "a", "alpha", "lora_te2_a."),
        ("diffusion_model.a.diff_b", "a", "diff_b", "diffusion_model.a."),
    ],
)  # fmt: skip
def test_keys_are_taken_apart(name: str, module: str, leaf: str, stem: str) -> None:
    key = split_key(name, (*FLAT, *DOTTED))
    assert key is not None
    assert (key.module, key.leaf, key.stem) == (module, leaf, stem)
    assert f"{key.stem}{key.leaf}" == name


@pytest.mark.parametrize("name", ["transformer.a.b", "lora_unet_", "lora_unet_a", "x.lora_A.weight"])
def test_what_is_no_key_is_none(name: str) -> None:
    assert split_key(name, (*FLAT, *DOTTED)) is None


@settings(deadline=None)
@given(st.from_regex(r"[a-z0-9_]+(\.[a-z0-9_]+)*", fullmatch=True), st.sampled_from(sorted(LEAVES)))
def test_a_key_is_its_stem_and_its_leaf(module: str, leaf: str) -> None:
    """Whatever a module is called; a module that ends like the first half of a longer leaf takes that for its leaf."""
    for name in (f"transformer.{module}.{leaf}", f"lora_unet_{module}.{leaf}", f"{module}.{leaf}"):
        key = split_key(name, (*FLAT, *DOTTED, ANY))
        assert key is None or f"{key.stem}{key.leaf}" == name


def test_every_role_is_read_by_one_kind_and_no_leaf_is_both_read_and_not() -> None:
    roles = Counter(role for kind in KINDS for role in kind.roles - {"alpha", "scale", "dora_scale"})
    assert set(roles.values()) == {1}
    whole = {"whole_scale", "whole_weight"}  # "scale" and "weight" that stand alone
    assert set(LEAVES.values()) == ({*roles} - whole) | {"alpha", "scale", "dora_scale"}
    assert not LEAVES.keys() & NOT_READ.keys()
    assert all(kind.marks <= kind.roles for kind in KINDS)
    assert len({name for kind in KINDS for name in kind.writes}) == sum(len(kind.writes) for kind in KINDS)


@pytest.mark.parametrize(
    ("modules", "family"),
    [
        (["double_blocks.0.img_attn.qkv"], "Flux or HunyuanVideo"),
        (["single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"], "Flux"),
        (["transformer_blocks_0_attn_to_q", "transformer_blocks_0_img_mlp_net_0_proj"], "Qwen-Image"),
        (["blocks.3.self_attn.q", "blocks.3.ffn.0"], "Wan"),
        (["layers.0.attention.to_q"], "Z-Image or Lumina 2"),
        (["layers_0_attention_qkv"], "Z-Image or Lumina 2"),
        (["down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q"], "Stable Diffusion XL"),
        (["input_blocks_4_1_transformer_blocks_1_attn1_to_q"], "Stable Diffusion XL"),
        (["down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"], "Stable Diffusion 1, 2 or XL"),
        (["joint_blocks_0_x_block_attn_qkv"], "Stable Diffusion 3"),
        (["down_blocks_0_0_channelwise_0", "up_blocks_1_2_attention_attn_to_q"], "Stable Cascade"),
        (["distilled_guidance_layer.layers.0.in_layer", "double_blocks.0.img_attn.qkv"], "Chroma"),
        (["model.layers.0.self_attn.q_proj"], None),
        (["encoder.layer.0.attention.self.query"], None),
    ],
)
def test_families_are_told_by_names(modules: list[str], family: str | None) -> None:
    found = denoiser_of(modules)
    assert (found and found.name) == family


@pytest.mark.parametrize(
    ("names", "metadata", "tool"),
    [
        ([], {"ot_config": "{}"}, "OneTrainer (ot_config)"),
        ([], {"software": '{"name": "ai-toolkit"}'}, "ai-toolkit (software)"),
        ([], {"ss_network_module": "networks.lora_wan"}, "musubi-tuner (ss_network_module)"),
        ([], {"ss_network_module": "networks.lora_flux"}, "sd-scripts (ss_network_module)"),
        ([], {"ss_network_module": "lycoris.kohya"}, "LyCORIS (ss_network_module)"),
        ([], {"modelspec.implementation_version": "sd-scripts/abc"}, "sd-scripts (modelspec.implementation_version)"),
        ([], {"prompt": '{"3": {"class_type": "LoraSave"}}'}, "ComfyUI (prompt)"),
        (["lora_transformer_x.alpha"], {"lora_adapter_metadata": "{}"}, "diffusers (lora_adapter_metadata)"),
        (["lora_transformer_x.alpha"], {"format": "pt"}, "OneTrainer (lora_transformer_x.alpha)"),
        (["transformer.x.lora_A.weight"], {}, ""),
    ],
)
def test_tools_are_told_by_their_marks(names: list[str], metadata: dict[str, str], tool: str) -> None:
    assert tool_of(names, metadata) == tool
    assert all(bool(known.field) != bool(known.key) for known in TOOLS)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl_base_v1-0 (ss_base_model_version)"),
        (
            {"ss_base_model_version": "flux1", "modelspec.architecture": "flux-1-dev/lora"},
            "flux-1-dev (modelspec.architecture)",
        ),
        ({"modelspec.architecture": "", "ss_base_model_version": "sd_v1"}, "sd_v1 (ss_base_model_version)"),
        ({"format": "pt"}, ""),
    ],
)
def test_what_a_header_says_of_its_base_is_repeated_with_its_field(metadata: dict[str, str], said: str) -> None:
    assert stated_base(metadata) == said


def test_what_a_header_says_of_its_base_is_cut_short() -> None:
    assert len(stated_base({"modelspec.architecture": "x" * 10_000})) < 120


def test_factors_beside_their_weights_are_no_adapter() -> None:
    factors = [f"layers.{n}.q.{leaf}" for n in range(4) for leaf in ("lora_A.weight", "lora_B.weight")]
    assert holds_factors_alone(factors)
    assert holds_factors_alone([*factors, "score.weight", *(f"layers.{n}.q.alpha" for n in range(4))])
    assert not holds_factors_alone([*factors, "layers.0.q.weight"])
    assert not holds_factors_alone([*factors, "layers.0.q.base_layer.weight"])
    assert not holds_factors_alone([*factors, *(f"x.{n}.weight" for n in range(9))])
    assert not holds_factors_alone(["layers.0.alpha"])


@given(st.lists(st.from_regex(r"model(\.[a-z0-9_]+)+\.(weight|bias)", fullmatch=True), min_size=1))
def test_a_model_of_plain_names_is_never_an_adapter(names: list[str]) -> None:
    plain = [name for name in names if not name.endswith(FACTOR_SUFFIXES) and "_lora" not in name]
    assert named_adapter(plain) == ""
