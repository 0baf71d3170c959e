# SPDX-License-Identifier: Apache-2.0
"""What a PEFT configuration says beyond factors, also where another format carries it along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery_formats.adapters.peft.keys import HEADS, ancestors
from surgery_formats.updates import Held

__all__ = ["TASK_TYPES", "held_by_config", "is_peft", "stored_transposed", "task_of"]

TASK_TYPES = {
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "text-generation": "CAUSAL_LM",
    "text2text-generation": "SEQ_2_SEQ_LM",
    "feature-extraction": "FEATURE_EXTRACTION",
}
"""PEFT's ``task_type`` by the name of the task on the Hub."""


def is_peft(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of PEFT's."""
    return "peft_type" in config


def task_of(config: Mapping[str, Any]) -> str:
    """The task of the model with the adapter, as the Hub names it; empty if the configuration does not tell."""
    named = config.get("task_type")
    return next((task for task, task_type in TASK_TYPES.items() if task_type == named), "")


def stored_transposed(config: Mapping[str, Any]) -> bool:
    """Whether the base stores the weights of linear layers as ``(in, out)``, as GPT-2 does."""
    return config.get("fan_in_fan_out") is True


def held_by_config(path: str, config: Mapping[str, Any]) -> Held:
    """Where a parameter stored whole is held, by the configuration of its adapter; in place if that is not one of PEFT.

    PEFT also saves embeddings that it did not train, when a vocabulary was resized.

    Args:
        path: Of the parameter.
        config: As it was written, which another format may have carried along.
    """
    module, _, leaf = path.rpartition(".")
    listed = config.get("modules_to_save")
    saved = tuple(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else ()
    if any(ancestor.endswith(saved) for ancestor in ancestors(module)):
        return "copy"
    if not is_peft(config) or leaf == "bias":
        return "in place"
    return "copy" if HEADS & set(module.split(".")) else "carried"
