# SPDX-License-Identifier: Apache-2.0
"""config.json of an output: the base's own bytes, unless the weights now say something else."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from surgery.engine.plan import Compute, Copy, PlannedTensor, SideFile
from surgery_formats.binding.bind import Binding
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Component
from surgery_formats.storage.quantised import CONFIG_KEYS

__all__ = ["corrected_config"]

_TASKS = {
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
_HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")


def corrected_config(binding: Binding, outputs: Sequence[PlannedTensor], dtype: DType | None) -> list[SideFile]:
    """config.json of every component that has one: vocabulary size, tie, stored type and task heads made true."""
    side_files = []
    for component in binding.checkpoint.components.values():
        if not component.config:
            continue
        config = copy.deepcopy(dict(component.config))
        written = [tensor for tensor in outputs if tensor.component == component.name and not tensor.part]
        _vocabulary(config, component, written)
        _quantisation(config, component, written)
        if component.name in binding.untied:
            _holder(config, "tie_word_embeddings")["tie_word_embeddings"] = False
        if dtype is not None and (key := next((k for k in ("dtype", "torch_dtype") if k in config), None)):
            config[key] = dtype.torch_name
        _task_head(config, binding, written)
        name = f"{component.name}/config.json" if component.name else "config.json"
        if config == component.config and (component.folder / "config.json").exists():
            side_files.append(SideFile(name, source=component.folder / "config.json"))
        else:
            side_files.append(SideFile(name, data=json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"))
    return side_files


def _holder(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The object that holds a text model's `key`: the config itself, or its ``text_config``."""
    inner = config.get("text_config")
    return inner if key not in config and isinstance(inner, dict) else config


def _vocabulary(config: dict[str, Any], component: Component, outputs: Sequence[PlannedTensor]) -> None:
    embedding = next((tensor for tensor in outputs if tensor.weight == component.embedding), None)
    if embedding is None or embedding.step.sizes == component.parameters[component.embedding].sizes:
        return
    _holder(config, "vocab_size")["vocab_size"] = embedding.step.sizes[0]


def _quantisation(config: dict[str, Any], component: Component, outputs: Sequence[PlannedTensor]) -> None:
    """A model none of whose weights is quantised any more says so."""
    if not component.is_quantised or any(_is_quantised(tensor.step) for tensor in outputs):
        return
    for key in CONFIG_KEYS:
        _holder(config, key).pop(key, None)


def _is_quantised(step: Copy | Compute) -> bool:
    """Whether a weight is written as codes."""
    written = step.weight if isinstance(step, Copy) else step.target
    return getattr(written, "elements", written) is None  # an encoding alone is one of elements


def _task_head(config: dict[str, Any], binding: Binding, outputs: Sequence[PlannedTensor]) -> None:
    """An adapter that brings a classifier makes the model one."""
    heads = [
        tensor
        for tensor in outputs
        if tensor.outcome == "added"
        and tensor.name.split(".")[-2:-1] in (["score"], ["classifier"], ["qa_outputs"])
        and tensor.name.endswith(".weight")
    ]
    task = next((adapter.task for adapter, _ in binding.adapters if adapter.task), "")
    architectures = config.get("architectures")
    if not heads or task not in _TASKS or not isinstance(architectures, list):
        return
    config["architectures"] = [_renamed(str(name), _TASKS[task]) for name in architectures]
    labels = heads[0].shape[0]
    labelled = config.get("id2label")
    if task != "question-answering" and not (isinstance(labelled, dict) and len(labelled) == labels):
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}


def _renamed(architecture: str, suffix: str) -> str:
    stem = next((architecture.removesuffix(head) for head in _HEADS if architecture.endswith(head)), architecture)
    return stem.removesuffix("Model") + suffix
