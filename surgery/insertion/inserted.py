# SPDX-License-Identifier: Apache-2.0
"""Fresh parts that no weight can hold: virtual tokens, keys and values in front of every layer, bottlenecks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from surgery.insertion.draws import Draws
from surgery.insertion.modules import LinearModules, model_type
from surgery_formats.adapters.adapterhub.fresh import bottleneck_config, bottleneck_places
from surgery_formats.adapters.adapterhub.read import inserted_module
from surgery_formats.adapters.peft.fresh import FreshTargets, prompt_config
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Site
from surgery_formats.canonical.prompts import Prefix, SoftPrompt
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.models.families.settings import ModelSettings
from surgery_formats.storage.base import read_rows
from surgery_formats.tensors.computed import computed, zeros
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates import Update

__all__ = ["INSERTED_KINDS", "BegunPrompt", "begun_bottlenecks", "begun_prefix", "begun_prompt"]

INSERTED_KINDS = ("bottleneck", "prompt", "prefix")


@dataclass(frozen=True, slots=True)
class BegunPrompt:
    """Virtual tokens, and the configuration of the adapter that has them."""

    prompt: SoftPrompt
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Decoder:
    """Sizes that a prompt needs."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, base: Component) -> _Decoder:
        text = base.config.get("text_config")
        settings = ModelSettings(text if isinstance(text, Mapping) else base.config)
        hidden = settings.count("hidden_size", "n_embd", "d_model", "dim")
        heads = settings.count("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
        layers = settings.count("num_hidden_layers", "num_layers", "n_layer", "n_layers")
        kv_heads = settings.optional_count("num_key_value_heads") or heads
        head_dim = settings.optional_count("head_dim") or settings.optional_count("d_kv") or hidden // heads
        return cls(hidden, layers, heads, kv_heads, head_dim)


def begun_prompt(base: Component, about: FreshTargets, tokens: int, draws: Draws, text: tuple[int, ...]) -> BegunPrompt:
    """Virtual tokens that begin as rows of the vocabulary: of a text, over and over, or drawn from all of it.

    Args:
        base: The model.
        about: What the configuration says.
        tokens: How many.
        draws: Random numbers.
        text: Tokens to begin as; empty draws them.

    Raises:
        FitError: the embedding is not known, or a token is not in it.
    """
    if not base.embedding:
        raise FitError("which of its tensors is the token embedding is not known", file=base.folder)
    embedding = base.parameters[base.embedding]
    vocabulary, width = embedding.shape
    sizes = _Decoder.of(base)
    submodules = 2 if base.config.get("is_encoder_decoder") is True else 1
    count = submodules * tokens
    if text:
        ids = [text[number % len(text)] for number in range(count)]
        if beyond := [token for token in ids if token >= vocabulary]:
            raise FitError(f"token {beyond[0]} of the text is not one of the {vocabulary} that the base has")
    else:
        ids = [int(share * vocabulary) for share in draws.of("prompt").uniform((count,))]

    def rows() -> Array:
        return numpy.concatenate([read_rows(embedding.storage, token, token + 1) for token in ids])

    table = computed("prompt_embeddings", (count, width), embedding.sources, rows)
    prompt = SoftPrompt("PROMPT_TUNING", table, tokens, width, submodules)
    config = prompt_config(about, "PROMPT_TUNING", tokens, width, submodules, sizes.layers, sizes.heads)
    return BegunPrompt(prompt, config)


def begun_prefix(base: Component, about: FreshTargets, tokens: int, draws: Draws) -> BegunPrompt:
    """Keys and values in front of every layer's, normal numbers of variance 1 as PEFT draws them."""
    if base.config.get("is_encoder_decoder") is True:
        raise FitError("a prefix is begun for models of one stack only, and this has an encoder and a decoder")
    sizes = _Decoder.of(base)
    width = sizes.kv_heads * sizes.head_dim
    shape = tokens, 2 * sizes.layers * width
    table = computed("prompt_embeddings", shape, (), lambda: draws.normal("prefix", shape))
    prefix = Prefix(sizes.layers, sizes.kv_heads, sizes.head_dim)
    prompt = SoftPrompt("PREFIX_TUNING", table, tokens, width, 1, prefix)
    config = prompt_config(about, "PREFIX_TUNING", tokens, width, 1, sizes.layers, sizes.kv_heads)
    return BegunPrompt(prompt, config)


def begun_bottlenecks(
    base: Component, found: LinearModules, name: str, base_name: str, width: int, draws: Draws
) -> tuple[Mapping[Site, tuple[Update, ...]], dict[str, Any]]:
    """A bottleneck behind every MLP, whose up projection is zero, and the configuration of AdapterHub's library."""
    hidden = _Decoder.of(base).hidden
    config = bottleneck_config(name, base_name, model_type(base), hidden, width)
    updates: dict[Site, tuple[Update, ...]] = {}
    for place in bottleneck_places(model_type(base), [module.path for module in found.linear]):
        down, shape = f"{place}.adapter_down.0.weight", (width, hidden)

        def drawn(key: str = down, sizes: tuple[int, int] = shape) -> Array:
            return draws.uniform(key, sizes, sizes[1])

        held: dict[str, Tensor] = {
            "adapter_down.0.bias": zeros(f"{place}.adapter_down.0.bias", DType.F32, (width,)),
            "adapter_down.0.weight": computed(down, shape, (), drawn),
            "adapter_up.bias": zeros(f"{place}.adapter_up.bias", DType.F32, (hidden,)),
            "adapter_up.weight": zeros(f"{place}.adapter_up.weight", DType.F32, (hidden, width)),
        }
        updates[Site(f"{place}.adapters.weight")] = (inserted_module("adapters", held),)
    if not updates:
        raise FitError("none of its layers is known by AdapterHub's names", file=base.folder)
    return updates, config
