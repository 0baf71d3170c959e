# SPDX-License-Identifier: Apache-2.0
"""Adapters made by PEFT, and PEFT's merge in any dtype: the float64 merge is the reference, the stored-dtype merge the peer."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from tests.oracles import disk, models

__all__ = ["Merged", "attach", "forwardable", "merge", "quiet", "randomise", "train"]


@dataclass(frozen=True)
class Merged:
    """What PEFT makes of a base and its adapters: logits before merging, tensors by on-disk name after, config after."""

    attached: Tensor
    tensors: dict[str, Tensor]
    config: dict[str, Any]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT's warnings are the subject of the cases, not of their output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_SCALES = {"hada_": 0.4, "lokr_": 0.3, "oft_": 0.08, "vera_lambda": 0.5, "prompt_encoder": 0.3}


def randomise(model: Any, generator: torch.Generator) -> None:
    """Make every trainable tensor random: no zero lora_B, no magnitude that equals the norm of its row, no unchanged head."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if scale := next((s for part, s in _SCALES.items() if part in name), None):
            parameter.data.copy_(scale * noise)
        elif "ia3_l" in name:
            parameter.data.copy_(1 + 0.3 * noise)
        elif "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * noise)
        elif "lora_" in name:
            parameter.data.copy_(0.2 * noise)
        else:  # modules_to_save, biases, token rows
            parameter.data.add_(0.1 * noise)


def forwardable(wrapped: Any) -> Any:
    """Whisper's forward asks its convolutions for their stride, which PEFT's wrapper has not got."""
    for module in wrapped.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), torch.nn.Conv1d):
            module.stride = module.get_base_layer().stride
    return wrapped.eval()


def train(
    arch: str, base: Path, kind: str, config: Mapping[str, Any], folder: Path, *, seed: int, resize: int = 0
) -> Tensor:
    """Write a random adapter of ``arch`` into ``folder``, as PEFT saves it after training; returns its logits."""
    with quiet():
        model = models.load(arch, base, "float32")
        if resize:
            generator = torch.Generator().manual_seed(seed + 1)
            old = model.get_input_embeddings().num_embeddings
            model.resize_token_embeddings(old + resize, mean_resizing=False)
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.weight.data[old:] = 0.2 * torch.randn(resize, module.weight.shape[1], generator=generator)
        wrapped = peft.get_peft_model(model, getattr(peft, kind)(**config))
        randomise(wrapped, torch.Generator().manual_seed(seed))
        wrapped.save_pretrained(folder)
        return models.run(arch, forwardable(wrapped))


def attach(arch: str, base: Path, adapters: Sequence[tuple[Path, float]], dtype: str, resize: int = 0) -> Any:
    """The PEFT model with all adapters active, each scaled by its weight."""
    with quiet():
        model = models.load(arch, base, dtype)
        if resize:
            model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + resize, mean_resizing=False)
        names = [f"a{i}" for i in range(len(adapters))]
        wrapped = peft.PeftModel.from_pretrained(model, os.fspath(adapters[0][0]), adapter_name=names[0])
        for name, (path, _) in zip(names[1:], adapters[1:], strict=True):
            wrapped.load_adapter(os.fspath(path), adapter_name=name)
        if len(names) > 1:
            wrapped.base_model.set_adapter(names)
        for module in wrapped.modules():
            if isinstance(module, LoraLayer | LycorisLayer):
                for name, (_, weight) in zip(names, adapters, strict=True):
                    if name in module.scaling:
                        module.scaling[name] *= weight
        return forwardable(wrapped)


def merge(
    arch: str, base: Path, adapters: Sequence[tuple[Path, float]], dtype: str = "float64", resize: int = 0
) -> Merged:
    """PEFT's ``merge_and_unload`` of a copy of the base in ``dtype``, saved by transformers and read back from the disk."""
    with quiet():
        wrapped = attach(arch, base, adapters, dtype, resize)
        attached = models.run(arch, wrapped)
        merged = wrapped.merge_and_unload(adapter_names=[f"a{i}" for i in range(len(adapters))])
        if models.ARCHS[arch].config is None:
            return Merged(attached, {k: v.clone() for k, v in merged.state_dict().items()}, {})
        with disk.scratch() as folder:
            merged.save_pretrained(folder)
            return Merged(attached, disk.read_tensors(folder), merged.config.to_dict())
