# SPDX-License-Identifier: Apache-2.0
"""Makes graphs of tiny models with the exporters that people use, and what PEFT's adapters make of the models.

Run it from this folder, in an environment of each exporter (see ../README.md)::

    python make.py [--check] models torch genai mobius quantised   # transformers 5
    python make.py [--check] optimum                               # transformers 4
    python make.py [--check] olive

``bases/MODEL`` has the checkpoint in ``base``, inputs and the model's answer in ``run.safetensors``, and for each adapter PEFT's
folder ``ADAPTER`` and ``ADAPTER.safetensors``: the answer with it (``outputs``) and the weights that PEFT's merge changes
(``weights.*``). Every other folder is one exporter's graph of a base; ``pair.json`` says which, and with which versions.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    from regenerate import keep, same_values

    check = "--check" in sys.argv
    for part in [word for word in sys.argv[1:] if word != "--check"]:
        maker = importlib.import_module("models" if part == "models" else f"by_{part}")
        keep(HERE, maker.make, check=check, same=same_values)


if __name__ == "__main__":
    main()
