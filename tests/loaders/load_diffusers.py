# SPDX-License-Identifier: Apache-2.0
"""diffusers: ``load_lora_weights`` of a pipeline, or ``from_single_file`` of a release's file with ``pipeline`` beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from denoiser_families import TOKENS, denoiser_of, given
from loading import Found, run

SAID: list[str] = []


class Warnings(logging.Handler):
    """How these loaders report tensors that they leave out."""

    def emit(self, record: logging.LogRecord) -> None:
        SAID.append(record.getMessage())


def opened(base: Path) -> Callable[[Path | None], Found]:
    folder = base if base.is_dir() else base.parent / "pipeline"
    index = json.loads((folder / "model_index.json").read_text())
    absent = {key: None for key, value in index.items() if isinstance(value, list) and value[0] is None}

    def load(adapter: Path | None) -> Found:
        pipe: Any = getattr(diffusers, index["_class_name"]).from_pretrained(
            folder, torch_dtype=torch.float32, **absent
        )
        part = denoiser_of(pipe)
        if base.is_file():
            kind = type(getattr(pipe, part))
            model = kind.from_single_file(str(base), config=str(folder), subfolder=part, torch_dtype=torch.float32)
            pipe.register_modules(**{part: model})
        SAID.clear()
        if adapter is not None:
            pipe.load_lora_weights(str(adapter))
            said = [line for line in SAID if not line.startswith("No LoRA keys associated to")]
            if said:
                raise ValueError("; ".join(said))
        with torch.no_grad():
            model = getattr(pipe, part).eval()
            predicted = model(**given(model), return_dict=False)[0]
            found = {"predicted": torch.stack(list(predicted))}
            for name in ("text_encoder", "text_encoder_2"):
                if getattr(pipe, name, None) is not None:
                    ids = torch.arange(3, 3 + TOKENS)[None]
                    found[name] = getattr(pipe, name).eval()(ids, output_hidden_states=True).hidden_states[-1]
        return found

    return load


if __name__ == "__main__":
    for library in ("diffusers", "peft"):
        logging.getLogger(library).addHandler(Warnings(logging.WARNING))
    run(opened, "diffusers", "peft", "transformers")
