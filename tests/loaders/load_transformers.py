# SPDX-License-Identifier: Apache-2.0
"""transformers: ``model.load_adapter``, which needs PEFT beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from loading import IDS, Found, run
from transformers import AutoModelForCausalLM


def opened(base: Path) -> Callable[[Path], Found]:
    def load(adapter: Path) -> Found:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.load_adapter(str(adapter))
        with torch.no_grad():
            return {"logits": model.eval()(input_ids=torch.tensor([IDS])).logits[0]}

    return load


if __name__ == "__main__":
    run(opened, "transformers", "peft")
