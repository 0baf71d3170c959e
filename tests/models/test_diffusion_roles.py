# SPDX-License-Identifier: Apache-2.0
"""Roles of parameters in diffusion networks: every layout tells the same, and tells something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgery_formats.models.families.diffusion_roles import diffusion_role
from surgery_formats.models.layouts.registry import NETWORKS
from surgery_formats.models.layouts.rule import Network

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = json.loads((GOLDEN / "layouts" / "rows.json").read_text())["models"]
DIFFUSERS: dict[str, str] = json.loads((GOLDEN / "roles" / "diffusers.json").read_text())["parts"]
# What our words mean otherwise than the classes that hold it: a matrix of both, what makes all modulations, and whatever
# stands in front of the blocks.
DEFINED = {
    "condition_embedder.image_embedder.ff.net.#": "embedding",
    "condition_embedder.image_embedder.ff.net.#.proj": "embedding",
    "condition_embedder.time_proj": "modulation",
    "distilled_guidance_layer.layers.#.linear_1": "modulation",
    "distilled_guidance_layer.layers.#.linear_2": "modulation",
    "glyph_projector.net.#": "embedding",
    "glyph_projector.net.#.proj": "embedding",
    "prior_projector.net.#": "embedding",
    "prior_projector.net.#.proj": "embedding",
    "single_transformer_blocks.#.attn.to_out": "attention+mlp",
    "single_transformer_blocks.#.attn.to_qkv_mlp_proj": "attention+mlp",
    "time_embed.pooler.to_kv": "embedding",
    "time_embed.pooler.to_out": "embedding",
    "time_embed.pooler.to_q": "embedding",
    "time_embed.time_proj": "modulation",
    "time_embed_r.time_proj": "modulation",
}
# diffusers calls the last linear layer of Lumina 2 as it calls a half of Cosmos' modulation.
AMBIGUOUS = "norm_out.linear_2"


@pytest.mark.parametrize("network", [one for one in NETWORKS if one.denoises], ids=lambda one: one.name)
def test_every_name_of_every_layout_tells_a_role(network: Network) -> None:
    for rule in (rule for layout in network.layouts for rule in layout(())):
        held = {diffusion_role(piece.name.replace("#", "0")) for piece in rule.pieces}
        role = diffusion_role(rule.name.replace("#", "0"))
        assert "other" not in {role, *held}
        if role == "attention+mlp":
            assert held <= {"attention", "mlp", role}
        elif rule.pieces[0].name != AMBIGUOUS:
            assert held == {role}


@pytest.mark.parametrize("model", [name for name in MODELS if name != "openclip"])
def test_names_of_diffusers_and_of_releases_tell_the_same_dotted_and_flat(model: str) -> None:
    for name, source in MODELS[model]["rows"].items():
        sources = (
            [source] if isinstance(source, str) else [part if isinstance(part, str) else part[0] for part in source]
        )
        for stored in sources:
            if (role := diffusion_role(stored)) != "attention+mlp" and not name.startswith(AMBIGUOUS):
                assert role == diffusion_role(name) != "other"
    for name in (*MODELS[model]["rows"], *MODELS[model]["heights"]):
        module = name.removesuffix(".weight").removesuffix(".bias").removesuffix(".scale")
        assert diffusion_role(module.replace(".", "_")) == diffusion_role(f"model.diffusion_model.{name}") != "other"


def test_names_of_59_transformers_of_diffusers_tell_what_their_classes_tell() -> None:
    """The golden file has the classes around each parameter as diffusers builds the models: no name was looked at."""
    assert len(DIFFUSERS) > 600
    told = {name: diffusion_role(name.replace("#", "0")) for name in DIFFUSERS}
    assert {name: role for name, role in told.items() if role != DIFFUSERS[name]} == DEFINED


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "attention"),
        ("double_blocks.0-18.txt_mlp.2.bias", "mlp"),
        ("single_blocks.3.linear1.weight", "attention+mlp"),
        ("single_transformer_blocks.3.proj_mlp.weight", "mlp"),
        ("blocks.0.ffn.2.weight", "mlp"),
        ("blocks.0.cross_attn.norm_k_img.weight", "norm"),
        ("transformer_blocks.1.norm1_context.linear.weight", "modulation"),
        ("input_blocks.4.1.proj_in.weight", "projection"),
        ("down_blocks_1_resnets_0_conv1", "convolution"),
        ("time_text_embed.timestep_embedder.linear_1.weight", "embedding"),
        ("final_layer.linear.weight", "output"),
        ("something.else.weight", "other"),
    ],
)
def test_roles_are_what_the_network_computes(name: str, role: str) -> None:
    assert diffusion_role(name) == role
