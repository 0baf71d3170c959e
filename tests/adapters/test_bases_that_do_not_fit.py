# SPDX-License-Identifier: Apache-2.0
"""Formats whose files have the sizes of the base: what its config.json says is checked before it is relied on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surgery import convert
from surgery_formats.errors import FitError
from tests.support.adapter_files import draw, write_base, write_peft

QUERIES = "model.layers.0.self_attn.q_proj"
CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
    "vocab_size": 12,
}


def converted(folder: Path, target: str, config: dict[str, Any]) -> float | None:
    factors = {"lora_A": draw(1, 2, 16), "lora_B": draw(2, 16, 2)}
    peft = write_peft(folder / "peft", {f"base_model.model.{QUERIES}.{side}.weight": v for side, v in factors.items()})
    base = write_base(folder / "base", {f"{QUERIES}.weight": (16, 16)}, config)
    return convert(peft, target, output=folder / "out", base=base).max_error


@pytest.mark.parametrize("target", ["keras", "litgpt"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": "four"}, "num_attention_heads is four"),
        ({"num_attention_heads": 3}, "is not one of 3 heads|not a multiple of num_attention_heads 3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"head_dim": 3}, "is not one of 4 heads of 3|which is .12, 16. by the base's config.json"),
        ({"hidden_size": None}, "hidden_size is missing|which is .4096, 4096. by the base's config.json"),
        ({"model_type": ["llama"]}, "is no "),
    ],
)
def test_sizes_that_no_model_has_are_refused(target: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(FitError, match=said):
        converted(tmp_path, target, CONFIG | change)


@pytest.mark.parametrize("target", ["keras", "litgpt"])
def test_the_same_base_with_its_own_sizes_is_taken(target: str, tmp_path: Path) -> None:
    assert (converted(tmp_path, target, CONFIG) or 0.0) <= 1e-6
