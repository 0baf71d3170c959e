# SPDX-License-Identifier: Apache-2.0
"""An adapter that PEFT writes today merges right into what ``save_pretrained`` writes today, whatever the model type."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import surgery
from tests.support.tiny_models import causal_types, multimodal_types, tiny

SOME = (
    *("aria_text", "deepseek_v3", "gpt2", "gpt_neox", "gpt_oss", "granitemoe", "hrm_text", "inkling2_text", "jetmoe"),
    *("big_bird", "llama", "llava", "mixtral", "mllama", "nemotron_h", "qianfan_ocr", "qwen3_5_moe", "qwen3_vl_moe"),
)
"""Types that stand for the ways in which names on disk differ from those of the modules."""

REFUSED: dict[str, str] = {}
"""Types that are refused, with the reason: this list can only shrink."""

_SMALLEST = 180
"""Types of which a tiny model can be made with the installed transformers, at the least."""


def _targets(model: Any) -> tuple[list[str], list[str]]:
    """Linear modules that PEFT can wrap, and stacks of experts."""
    modules = dict(model.named_modules())
    recurrent = any("A_log" in name or "mixer" in name or "mamba" in name for name, _ in model.named_parameters())
    read_directly = ("out_proj", "x_proj", "dt_proj") if recurrent else ()  # PEFT attaches nothing there
    linear = [
        name
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
        and not name.endswith(("lm_head", "router.classifier", *read_directly))
    ]
    stacks = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
        and ("expert" in name or "moe" in name)
        and not isinstance(modules[name.rpartition(".")[0]], torch.nn.Linear | torch.nn.Conv1d)
    ]
    return linear, sorted(stacks)


def _logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def _written(model_type: str, folder: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A base and an adapter in `folder`: the class, and the logits without and with the adapter."""
    model = tiny(model_type)
    _logits(model)
    model.save_pretrained(folder / "base")
    made = type(model)
    model, info = made.from_pretrained(folder / "base", dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError("transformers does not find what it saved")
    without = _logits(model.eval())
    linear, stacks = _targets(model)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=linear, target_parameters=stacks or None)
    attached = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in attached.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    attached.eval().save_pretrained(folder / "adapter")
    return made, without, _logits(attached)


def _difference(model_type: str, folder: Path) -> float:
    """The greatest difference of the merged model's logits from the attached, as a share of the adapter's effect."""
    made, without, wanted = _written(model_type, folder)
    surgery.merge(folder / "base", [folder / "adapter"], output=folder / "merged")
    merged, info = made.from_pretrained(folder / "merged", dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        return math.inf
    return float((_logits(merged.eval()) - wanted).abs().max() / (wanted - without).abs().max())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("model_type", SOME)
def test_merged_is_attached(model_type: str, tmp_path: Path) -> None:
    assert _difference(model_type, tmp_path) < 1e-3


@pytest.mark.slow
def test_merged_is_attached_for_every_type(tmp_path: Path) -> None:
    right: list[str] = []
    refused: dict[str, str] = {}
    wrong: dict[str, float] = {}
    unmade: dict[str, str] = {}
    for model_type in sorted({*causal_types(), *multimodal_types()}):
        folder = tmp_path / model_type
        try:
            difference = _difference(model_type, folder)
        except surgery.SurgeryError as error:
            refused[model_type] = str(error)
        except Exception as error:  # transformers cannot make, run or adapt so small a model of this type
            unmade[model_type] = str(error)[:100]
        else:
            if difference < 1e-3:
                right.append(model_type)
            else:
                wrong[model_type] = difference
    print(f"right: {len(right)}", *right, f"\nrefused: {len(refused)}")
    print(*(f"{name}: {why}" for name, why in refused.items()), sep="\n")
    print(f"no tiny model: {len(unmade)}", *unmade)
    assert not wrong
    assert set(refused) == set(REFUSED)
    assert len(right) + len(refused) >= _SMALLEST
