# SPDX-License-Identifier: Apache-2.0
"""Consumers by name, with versions: ``vllm``, ``vllm@0.9``. What judges is imported when it is used."""

from __future__ import annotations

import re

from surgery.consumers.comfyui import COMFYUI
from surgery.consumers.consumer import Consumer
from surgery.consumers.diffusers import DIFFUSERS
from surgery.consumers.edge_llm import EDGE_LLM
from surgery.consumers.llama_cpp import LLAMA_CPP
from surgery.consumers.mlx_lm import MLX_LM
from surgery.consumers.olive import OLIVE
from surgery.consumers.onnxruntime_genai import ONNXRUNTIME_GENAI
from surgery.consumers.peft import PEFT
from surgery.consumers.sglang import SGLANG
from surgery.consumers.tensorrt_llm import TENSORRT_LLM
from surgery.consumers.transformers import TRANSFORMERS
from surgery.consumers.vllm import VLLM
from surgery_formats.errors import FitError, NotFoundError, UsageError
from surgery_formats.plugins import with_plugins
from surgery_formats.text import closest, listing, show

__all__ = ["BUILT_IN", "ENTRY_POINTS", "asked_version", "consumer_named", "consumers"]

BUILT_IN: tuple[Consumer, ...] = (
    PEFT,
    TRANSFORMERS,
    VLLM,
    SGLANG,
    TENSORRT_LLM,
    EDGE_LLM,
    LLAMA_CPP,
    MLX_LM,
    ONNXRUNTIME_GENAI,
    OLIVE,
    DIFFUSERS,
    COMFYUI,
)
ENTRY_POINTS = "surgery.consumers"  # a plugin's entry point is an object like those above


def consumers() -> dict[str, Consumer]:
    """Every consumer by name: the built-in ones, then plugins'.

    Raises:
        SurgeryError: see `surgery_formats.plugins.with_plugins`.
    """
    return with_plugins(ENTRY_POINTS, BUILT_IN, "consumer", Consumer)


def consumer_named(text: str) -> tuple[Consumer, str]:
    """The consumer and the version that ``NAME`` or ``NAME@VERSION`` names; without one, the newest that is known.

    Raises:
        UsageError: not a name.
        NotFoundError: no such consumer.
        FitError: a version that is none, or one before the rules begin.
    """
    if not isinstance(text, str):
        raise UsageError(f"a consumer is named, as in 'vllm', not {type(text).__name__}")
    name, at, version = text.partition("@")
    known = consumers()
    if name not in known:
        hint = closest(name, known) or f"known: {listing(known, 20)}"
        raise NotFoundError(f"no consumer '{show(name)}'", hint=hint)
    found = known[name]
    version = version if at else found.version
    if asked_version(version) < asked_version(found.oldest):
        raise FitError(f"the rules of {name} begin at {found.oldest}, not at {show(version)}")
    return found, version


def asked_version(text: str) -> tuple[int, ...]:
    """``0.5.23.post1`` as numbers that compare: (0, 5, 23).

    Raises:
        FitError: it begins with no number.
    """
    digits = re.match(r"v?b?(\d+(?:\.\d+)*)", text)
    if digits is None:
        raise FitError(f"'{show(text)}' is no version", hint="for example 0.5.23")
    return tuple(int(number) for number in digits[1].split("."))
