# SPDX-License-Identifier: Apache-2.0
"""How the keys of one-file adapters begin, and how a key is taken apart into module and leaf."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from surgery_formats.adapters.grammar.leaves import ENCODERS, longest_leaf

__all__ = ["BUNDLE", "DOTTED", "FLAT", "OF_FLUX", "Key", "KeyPrefix", "split_key"]


@dataclass(frozen=True, slots=True)
class KeyPrefix:
    """How keys of one component begin.

    Attributes:
        text: With the separator behind it: ``lora_unet_``, ``transformer.``; empty for keys that begin with the module. A ``*``
            stands for any one segment.
        component: What the sites' component is called.
        flat: Whether dots of the module are written as underscores.
    """

    text: str
    component: str
    flat: bool

    def beginning_of(self, name: str) -> str | None:
        """What of a key this is; None if it is not how the key begins."""
        if "*" not in self.text:
            return self.text if name.startswith(self.text) else None
        before, after = self.text.split("*")
        segment, dot, _ = name.removeprefix(before).partition(".")
        begun = f"{before}{segment}{after}"
        return begun if dot and segment and name.startswith(begun) else None


def _prefixes(flat: bool, **components: str) -> tuple[KeyPrefix, ...]:
    mark = "_" if flat else "."
    return tuple(KeyPrefix(f"{text}{mark}", component, flat) for text, component in components.items())


FLAT = _prefixes(
    True,
    lora_unet="unet",
    lora_te="text_encoder",
    lora_te1="text_encoder",
    lora_te2="text_encoder_2",
    lora_te3="text_encoder_3",
    lora_transformer="transformer",
    lora_prior_unet="prior",
    lora_prior_te="text_encoder",
    lycoris="denoiser",
    oft_unet="unet",
)
"""sd-scripts and all who follow it: A1111, musubi-tuner, OneTrainer, LyCORIS (``lycoris_`` by itself)."""

DOTTED = _prefixes(
    False,
    transformer="transformer",
    unet="unet",
    text_encoder="text_encoder",
    text_encoder_2="text_encoder_2",
    text_encoder_3="text_encoder_3",
    prior="prior",
    diffusion_model="denoiser",
)
"""Prefixes of dotted keys: diffusers names the component, ComfyUI says ``diffusion_model``."""

OF_FLUX = ("base_model.model.double_blocks.", "base_model.model.single_blocks.")
"""Beginnings of keys of fal's trainer for Flux, which writes no configuration: its scale is 1."""

BUNDLE = "bundle_emb."
"""Beginning of keys with token embeddings beside a LoRA."""

_PROCESSOR = re.compile(r"(?P<block>.+?)\.(?:processor\.)?(?P<part>\w+)_lora\.(?P<side>down|up)\.weight")
_XLABS = re.compile(
    r"(?P<block>(double|single)_blocks\.\d+)\.processor\.(?P<part>\w+_lora[12]?)\.(?P<side>down|up)\.weight"
)
_XLABS_PARTS = {
    ("double", "qkv_lora1"): "img_attn.qkv",
    ("double", "proj_lora1"): "img_attn.proj",
    ("double", "qkv_lora2"): "txt_attn.qkv",
    ("double", "proj_lora2"): "txt_attn.proj",
    ("single", "qkv_lora"): "linear1_qkv",
    ("single", "proj_lora"): "linear2",
}
"""What XLabs' processors of Flux change: 1 is the image, 2 the text (diffusers 0.42.1, ComfyUI's ``convert_uso_lora``)."""

_ENDINGS = {"to_out": "to_out.0"}  # of an attention processor's parts, where the module is called otherwise
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True, slots=True)
class Key:
    """A key, taken apart.

    Attributes:
        prefix: How it begins.
        module: Path of the module, as a base would have it, flat if the prefix is.
        leaf: What stands behind it.
        stem: All of the key before the leaf, to spell another leaf of the same module.
    """

    prefix: KeyPrefix
    module: str
    leaf: str
    stem: str


def split_key(name: str, prefixes: Iterable[KeyPrefix]) -> Key | None:
    """Take a key apart; None if no prefix fits, or nothing stands between prefix and leaf.

    The leaf of a flat key is all after the first dot, known or not. That of a dotted one must be known, since only that
    tells where its module ends.
    """
    if name.startswith(BUNDLE):
        return _bundled(name)
    for prefix in prefixes:
        begun = prefix.beginning_of(name)
        if begun is None:
            continue
        rest = name[len(begun) :]
        if prefix.flat:
            module, dot, leaf = rest.partition(".")
            # VideoX-Fun writes two underscores behind the prefix: no module begins with one
            return Key(prefix, module.lstrip("_"), leaf, f"{begun}{module}.") if module and dot else None
        if key := _xlabs(prefix, rest) or _processor(prefix, rest):
            return key
        leaf = longest_leaf(rest)
        module = rest[: -len(leaf) - 1] if leaf else ""
        return Key(prefix, module, leaf, f"{begun}{module}.") if module else None
    return None


def _bundled(name: str) -> Key | None:
    """``bundle_emb.TOKEN.clip_l``: the token is all up to the next dot, as A1111 has it."""
    token, _, leaf = name.removeprefix(BUNDLE).partition(".")
    component = ENCODERS.get(leaf.removesuffix("_out"))
    if not token or component is None:
        return None
    return Key(KeyPrefix(BUNDLE, component, False), f"{BUNDLE}{token}", leaf, f"{BUNDLE}{token}.")


def _xlabs(prefix: KeyPrefix, rest: str) -> Key | None:
    """``double_blocks.0.processor.qkv_lora1.down.weight``."""
    match = _XLABS.fullmatch(rest)
    part = _XLABS_PARTS.get((match[2], match["part"])) if match else None
    if match is None or part is None:
        return None
    leaf = f"{match['side']}.weight"
    return Key(prefix, f"{match['block']}.{part}", leaf, f"{prefix.text}{rest}".removesuffix(leaf))


def _processor(prefix: KeyPrefix, rest: str) -> Key | None:
    """``attn1.processor.to_q_lora.down.weight``: factors beside an attention, named after its parts."""
    match = _PROCESSOR.fullmatch(rest)
    if match is None:
        return None
    block, part = match["block"], match["part"]
    of_text = prefix.component.startswith("text_encoder") and part in _TEXT
    module = f"{block}.{_TEXT[part] if of_text else _ENDINGS.get(part, part)}"
    name = f"{prefix.text}{rest}"
    return Key(prefix, module, f"lora.{match['side']}.weight", name.removesuffix(f"lora.{match['side']}.weight"))
