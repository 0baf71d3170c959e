# SPDX-License-Identifier: Apache-2.0
"""onnxruntime: a graph with inputs for LoRAs, run with an ``.onnx_adapter`` as its active adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from loading import IDS, Found, run


def opened(base: Path) -> Callable[[Path | None], Found]:
    session = onnxruntime.InferenceSession(base / "model.onnx", providers=["CPUExecutionProvider"])
    given = {
        "input_ids": np.array([IDS], np.int64),
        "attention_mask": np.ones((1, len(IDS)), np.int64),
        "position_ids": np.arange(len(IDS), dtype=np.int64)[None],
    }
    asked = {one.name: one for one in session.get_inputs()}
    feeds = {name: value for name, value in given.items() if name in asked}
    for name, one in asked.items():  # what was said before: nothing
        if name.startswith("past_key_values."):
            sizes = [size if isinstance(size, int) else 1 if at == 0 else 0 for at, size in enumerate(one.shape)]
            feeds[name] = np.zeros(sizes, np.float32)

    def load(adapter: Path | None) -> Found:
        options = onnxruntime.RunOptions()
        held = onnxruntime.LoraAdapter()  # has to live until the run ends
        if adapter is not None:
            held.Load(str(adapter))
            options.add_active_adapter(held)
        return {"logits": session.run(["logits"], feeds, options)[0][0]}

    return load


if __name__ == "__main__":
    run(opened, "onnxruntime-gpu")
