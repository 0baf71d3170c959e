# SPDX-License-Identifier: Apache-2.0
"""A LoRA on every linear module and every stack of experts, for every model type of which a tiny model can be made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft

from tests.support.attached import Outcome, attach, linear_modules, outcome, stacks
from tests.support.tiny_models import model_types

__all__ = ["REFUSED", "Sweep", "fused", "lora", "sweep"]

REFUSED: Mapping[str, str] = {
    "diffusion_gemma": "its encoder's weights are its decoder's, under names that no file has",
    "encoder-decoder": "the decoder's head is its embedding, and no file has it",
    "ibert": "its head is its embedding, and no file has it",
    "molmo2": "one matrix on disk holds the rows of three modules, by sizes that only the model's code has",
    "molmo2_text": "one matrix on disk holds the rows of three modules, by sizes that only the model's code has",
    "vision-encoder-decoder": "the decoder's head is its embedding, and no file has it",
}
"""Types that are refused, with the reason: this list can only shrink."""


def fused() -> Iterator[str]:
    """Types whose experts lie one by one on the hub, and stacked in the model's code."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import MergeModulelist

    for name, entries in conversion_mapping._build_checkpoint_conversion_mapping().items():
        if any(isinstance(one, MergeModulelist) for entry in entries for one in getattr(entry, "operations", ())):
            yield name


def lora(model: Any) -> peft.LoraConfig:
    """On all of a model that PEFT can wrap, but its head."""
    return peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=linear_modules(model), target_parameters=stacks(model) or None
    )


@dataclass(frozen=True)
class Sweep:
    """What came of each type.

    Attributes:
        outcomes: By type.
        unmade: Types of which there is no tiny model, and what transformers or PEFT say.
    """

    outcomes: Mapping[str, Outcome]
    unmade: Mapping[str, str]

    @property
    def right(self) -> list[str]:
        """Types that merge right into every layout of their base."""
        return [name for name, one in self.outcomes.items() if not (one.wrong or one.refused)]


def sweep(folder: Path, progress: Callable[[str], object] = lambda name: None) -> Sweep:
    """Try every type."""
    outcomes, unmade = {}, {}
    for name in sorted(model_types()):
        progress(name)
        try:
            made = attach(name, folder / name, lora)
        except Exception as error:  # transformers cannot make, run or save so small a model, or PEFT cannot adapt it
            unmade[name] = f"{type(error).__name__}: {error}"[:200].replace("\n", " ")
            continue
        outcomes[name] = outcome(made)
        shutil.rmtree(folder / name)
    return Sweep(outcomes, unmade)
