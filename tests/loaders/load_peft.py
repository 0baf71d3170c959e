# SPDX-License-Identifier: Apache-2.0
"""PEFT: ``PeftModel.from_pretrained``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from loading import IDS, Found, run
from peft import PeftModel
from transformers import AutoModelForCausalLM


def opened(base: Path) -> Callable[[Path | None], Found]:
    def load(adapter: Path | None) -> Found:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        with torch.no_grad():
            return {"logits": model.eval()(input_ids=torch.tensor([IDS])).logits[0, -len(IDS) :]}

    return load


if __name__ == "__main__":
    run(opened, "peft", "transformers")
