# SPDX-License-Identifier: Apache-2.0
"""mlx-lm: ``load_adapters`` on a model that ``load_model`` made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from loading import IDS, Found, run
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model


def opened(base: Path) -> Callable[[Path | None], Found]:
    def load(adapter: Path | None) -> Found:
        model = load_model(base)[0]
        if adapter is not None:
            model = load_adapters(model, str(adapter))
        model.eval()
        return {"logits": np.array(model(mx.array([IDS]))[0].astype(mx.float32))}

    return load


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    run(opened, "mlx-lm", "mlx")
