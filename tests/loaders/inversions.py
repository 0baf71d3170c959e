# SPDX-License-Identifier: Apache-2.0
"""Textual inversions that we write for diffusers.

No weight can hold one: the dense weights are the text encoder that transformers gave a row for each token.
"""

from __future__ import annotations

from pathlib import Path

import surgery
from tests.loaders.acting import Trial, program_of, start

__all__ = ["ACTS", "trials"]

ACTS = ("A1111's to learned-embeds", "learned-embeds to A1111's")


def trials(folder: Path) -> dict[str, Trial]:
    """Everything that diffusers is given."""
    start([*program_of("textual-inversion"), "--make", str(folder)])
    learned, back = folder / "learned.safetensors", folder / "back" / "embedding.safetensors"
    back.parent.mkdir()  # the file's name is the token
    surgery.convert(folder / "embedding.safetensors", "learned-embeds", output=learned)
    surgery.convert(learned, "embedding", output=back)
    base, dense = folder / "pipeline", folder / "dense"
    return {name: Trial(base, dense, file, None) for name, file in zip(ACTS, (learned, back), strict=True)}
