# SPDX-License-Identifier: Apache-2.0
"""AdapterHub's library adapters: ``load_adapter``, which warns of keys that it leaves out; here that is an error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(sys.path.pop(0))  # the folder of this script has an adapters.py too

import adapters
import torch
from loading import IDS, Found, run
from transformers import AutoModelForCausalLM


def opened(base: Path) -> Callable[[Path | None], Found]:
    def load(adapter: Path | None) -> Found:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            adapters.init(model)
            info: dict[str, Any] = {}
            name = model.load_adapter(str(adapter), loading_info=info, use_safetensors=True, with_head=False)
            if info.get("unexpected_keys") or info.get("missing_keys"):
                raise ValueError(f"missing {info['missing_keys']}, unexpected {info['unexpected_keys']}")
            model.set_active_adapters(name)
        with torch.no_grad():
            return {"logits": model.eval()(input_ids=torch.tensor([IDS])).logits[0]}

    return load


if __name__ == "__main__":
    run(opened, "adapters", "transformers")
