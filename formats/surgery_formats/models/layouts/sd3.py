# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: Stability's release (diffusers 0.42.1, ``convert_sd3_transformer_checkpoint_to_diffusers``).

The last block does nothing to the text but attend to it: its modulation of the text is (shift, scale) in the release,
and (scale, shift) in diffusers, as that of the output is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from surgery_formats.models.layouts.rule import Network, Rule, fused, same, swapped

__all__ = ["NETWORK"]

_IN, _OUT = "joint_blocks.#.", "transformer_blocks.#."
_LAST = "context_block.adaLN_modulation.1"


def _attention(block: str, name: str, added: bool = False) -> Iterator[Rule]:
    parts = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
    norms = ("norm_added_q", "norm_added_k") if added else ("norm_q", "norm_k")
    yield fused(f"{_IN}{block}.{name}.qkv", *(f"{_OUT}{name}.{part}" for part in parts))
    yield same(f"{_IN}{block}.{name}.ln_q", f"{_OUT}{name}.{norms[0]}")
    yield same(f"{_IN}{block}.{name}.ln_k", f"{_OUT}{name}.{norms[1]}")
    yield same(f"{_IN}{block}.{name}.proj", f"{_OUT}{name}.{'to_add_out' if added else 'to_out.0'}")


_RULES = (
    *_attention("x_block", "attn"),
    *_attention("x_block", "attn2"),
    *_attention("context_block", "attn", added=True),
    same(f"{_IN}x_block.adaLN_modulation.1", f"{_OUT}norm1.linear"),
    same(f"{_IN}x_block.mlp.fc1", f"{_OUT}ff.net.0.proj"),
    same(f"{_IN}x_block.mlp.fc2", f"{_OUT}ff.net.2"),
    same(f"{_IN}context_block.mlp.fc1", f"{_OUT}ff_context.net.0.proj"),
    same(f"{_IN}context_block.mlp.fc2", f"{_OUT}ff_context.net.2"),
    same("pos_embed", "pos_embed.pos_embed"),
    same("x_embedder.proj", "pos_embed.proj"),
    same("context_embedder", "context_embedder"),
    same("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    same("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    same("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    same("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    same("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)


def _rules(names: Collection[str]) -> Collection[Rule]:
    """The rules of all blocks, and for the modulation of the text those of each block that the base has."""
    found = [name.split(".") for name in names if name.startswith(("joint_blocks.", "transformer_blocks."))]
    rules = list(_RULES)
    for number in dict.fromkeys(segments[1] for segments in found if len(segments) > 1):
        of_text = (f"joint_blocks.{number}.context_block.attn.proj", f"transformer_blocks.{number}.attn.to_add_out")
        goes_on = any(f"{module}.weight" in names for module in of_text)
        turn = same if goes_on else swapped
        rules.append(turn(f"joint_blocks.{number}.{_LAST}", f"transformer_blocks.{number}.norm1_context.linear"))
    return rules


NETWORK = Network("Stable Diffusion 3", ("SD3Transformer2DModel",), (_rules,))
