# SPDX-License-Identifier: Apache-2.0
"""KerasHub: ``load_lora_weights`` of the backbone of a causal model that it makes of a folder of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import keras
import keras_hub
import numpy as np
from loading import IDS, Found, run


def opened(base: Path) -> Callable[[Path | None], Found]:
    def load(adapter: Path | None) -> Found:
        model = keras_hub.models.CausalLM.from_preset(str(base), preprocessor=None, dtype="float32")
        if adapter is not None:
            backbone, path = model.backbone, adapter / "adapter.lora.h5"
            layers = [layer for layer in backbone._flatten_layers(include_self=False) if layer.weights]
            with h5py.File(path) as file:
                names = sorted({layers[int(number)].name for number in file["lora"] if number != "vars"})
                rank = int(file["lora/vars/rank"][()])
            backbone.enable_lora(rank, target_layer_names=names)
            backbone.load_lora_weights(str(path))
        given = {"token_ids": np.array([IDS]), "padding_mask": np.ones((1, len(IDS)), bool)}
        return {"logits": keras.ops.convert_to_numpy(model(given))[0]}

    return load


if __name__ == "__main__":
    run(opened, "keras-hub", "keras")
