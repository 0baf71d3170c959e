# SPDX-License-Identifier: Apache-2.0
"""The language models inside vision-language models: the family named by ``text_config``, under a prefix, read with text alone.

Names of the whole model are as transformers' classes tell them; what the encoder of images computes is not described here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import Model
from surgery_formats.models.families.registry import family_of
from surgery_formats.models.families.settings import ModelSettings
from surgery_formats.text import show

__all__ = ["LANGUAGE_OF_VISION", "VISION_LANGUAGE"]

_ROOTS = ("model.language_model.", "language_model.model.", "model.text_model.", "language_model.", "model.")
_HEADS = ("lm_head", "language_model.lm_head")
_UNUSED = "not of the language model, which is what is exported"
_CLASS = "ForConditionalGeneration"
_SECTIONED = ("mrope_section", "mrope_interleaved")

_QWEN2_VL: Mapping[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1_000_000.0,
    "max_window_layers": 80,
}
_MISTRAL3: Mapping[str, Any] = {
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "max_position_embeddings": 131072,
    "num_hidden_layers": 40,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000000.0,
    "sliding_window": None,
    "vocab_size": 131072,
}
_TEXT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llava": ("llama", {}),
    "llava_next": ("llama", {}),
    "gemma3": ("gemma3_text", {}),
    "gemma3n": ("gemma3n_text", {}),
    "mistral3": ("mistral", _MISTRAL3),
    "internvl": ("qwen2", {}),
    "idefics3": ("llama", {"rms_norm_eps": 1e-5}),
    "smolvlm": ("llama", {"rms_norm_eps": 1e-5}),
    "qwen2_vl": ("qwen2_vl_text", {}),
    "qwen2_5_vl": ("qwen2_5_vl_text", {}),
    "qwen3_vl": ("qwen3_vl_text", {}),
}
"""The type of the language model of each type, and its settings, where there is no ``text_config``."""

_TIED = ("gemma3", "gemma3n", "mistral3", "internvl")
_TIED_BY_TEXT = ("llava", "qwen2_vl", "qwen2_5_vl")
"""Types whose head ``text_config`` ties too; of others it says nothing where the file has a head."""

_SECTIONS = (16, 24, 24)
"""Pairs of a head's values by time, height and width, where a configuration has none (Qwen2-VL)."""

_DEEP = "the first layers add features of images, which are not embeddings"
_NO_GRID = "mrope_section is not the sizes of three parts of half a head"

_PLAIN: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", _QWEN2_VL),
    "qwen2_5_vl_text": ("qwen2", _QWEN2_VL),
    "qwen3_vl_text": ("qwen3", {"max_position_embeddings": 128000, "rope_theta": 500000.0}),
}
"""Types that compute another type's model if a token's positions in time, height and width are one number, as a text's are."""


def recipe(settings: ModelSettings) -> Model:
    """The language model of ``text_config``, which reads token ids; images have no way in."""
    outer = settings.text("model_type", default="")
    classes = settings.architectures()
    if classes and not any(name.endswith(_CLASS) for name in classes):
        raise settings.fault(f"architectures is {show(', '.join(classes), 80)}; supported is {_CLASS}")
    kind, missing = _TEXT[outer]
    text = settings.mapping("text_config")
    if text is None:
        text = dict(missing) if not settings.has("hidden_size") else settings.everything("model_type", "architectures")
    stored = any(f"{head}.weight" in settings.names for head in _HEADS)
    by_text = text.get("tie_word_embeddings") is True and (outer in _TIED_BY_TEXT or not stored)
    tied = settings.flag("tie_word_embeddings", default=outer in _TIED) or by_text
    if outer == "gemma3" and text.get("final_logit_softcapping") is not None:
        raise settings.fault("final_logit_softcapping is set, which transformers does not apply beside images")
    text = {"model_type": kind, **text, "tie_word_embeddings": tied, "architectures": None}
    model, own = _inner(settings, text, recipe)
    unused = dict.fromkeys((name for name in settings.names if not name.startswith(own)), _UNUSED)
    model = replace(model, unused={**unused, **model.unused})
    return replace(model, images="blocks") if outer == "gemma3" else model


def text_recipe(settings: ModelSettings) -> Model:
    """The language model of Qwen2-VL, 2.5-VL or 3-VL by itself (arXiv:2409.12191)."""
    return _inner(settings, settings.everything(), text_recipe)[0]


def _inner(
    settings: ModelSettings, text: dict[str, Any], own: Callable[[ModelSettings], Model]
) -> tuple[Model, tuple[str, str]]:
    """The model of `text`, and what names of its tensors begin with.

    Raises:
        FitError: its type has no recipe, or that of models with a language model inside, which is `own`.
    """
    inner = ModelSettings(_plain(settings, text), settings.names, settings.task)
    inner.root = next((root for root in _ROOTS if f"{root}embed_tokens.weight" in settings.names), "")
    if not inner.root and own is recipe:
        inner.root = _ROOTS[0]
    inner.head = next((head for head in _HEADS if f"{head}.weight" in settings.names), _HEADS[0])
    family = family_of({"model_type": inner.text("model_type", default="")})
    if family.recipe is None or family.recipe is own:
        raise settings.fault(f"text_config is of model_type '{show(text.get('model_type'), 40)}', which has no recipe")
    model = family.recipe(inner)
    if (kind := text.get("model_type")) in _PLAIN:
        model = replace(model, only_text=_DEEP) if kind == "qwen3_vl_text" else _on_a_grid(model, text)
    return model, (inner.root, f"{inner.head}.")


def _on_a_grid(model: Model, text: Mapping[str, Any]) -> Model:
    """The model whose pairs of a head's values follow time, height and width, section by section."""
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    told = rope.get("mrope_section", _SECTIONS) if isinstance(rope, Mapping) else ()
    sections: Sequence[Any] = told if isinstance(told, list | tuple) else ()
    whole = all(type(size) is int and size >= 0 for size in sections)
    dims = next((layer.attention.rope.dims for layer in model.layers if layer.attention.rope), 0)
    if not whole or len(sections) != 3 or 2 * sum(sections) != dims:
        return replace(model, only_text=_NO_GRID)
    axes = tuple(axis for axis, size in enumerate(sections) for _ in range(size))
    layers = tuple(
        replace(layer, attention=replace(layer.attention, rope=replace(layer.attention.rope, axes=axes)))
        if layer.attention.rope
        else layer
        for layer in model.layers
    )
    return replace(model, layers=layers, images="grid")


def _plain(settings: ModelSettings, text: dict[str, Any]) -> dict[str, Any]:
    """Settings of the family that computes the same for a text, see `_PLAIN`."""
    kind = text["model_type"]
    if not isinstance(kind, str) or kind not in _PLAIN:
        return text
    name, defaults = _PLAIN[kind]
    found = {**defaults, **text, "model_type": name}
    for key in ("rope_scaling", "rope_parameters"):
        rope = found.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise settings.fault(f"{key} must be an object")
        plain = {word: value for word, value in rope.items() if word not in _SECTIONED}
        found[key] = {word: "default" if value == "mrope" else value for word, value in plain.items()}
    return found


VISION_LANGUAGE = Family(names=tuple(_TEXT), recipe=recipe)
LANGUAGE_OF_VISION = Family(names=tuple(_PLAIN), recipe=text_recipe)
