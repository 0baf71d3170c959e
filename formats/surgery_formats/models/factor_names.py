# SPDX-License-Identifier: Apache-2.0
"""Names that only factors of adapters have, so that a file of factors is never taken for a model.

It is a matter of names alone: `open_checkpoint` asks it of every model, and needs no reader of adapters for that.
"""

from __future__ import annotations

import re
from collections.abc import Collection

__all__ = ["ADAPTER_NAMES", "FACTOR_SUFFIXES", "holds_factors_alone", "named_adapter"]

FACTOR_SUFFIXES = (
    *(f"lora_{side}{name}.weight" for name in ("", ".default") for side in "AB"),
    *(
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
    ),
    *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale"),
    *(f"{mark}.{side}.weight" for mark in ("lora", "_lora", "_lora1", "_lora2") for side in ("down", "up")),
    *("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    *("lora_a", "lora_b", "lora_a.weight", "lora_b.weight"),
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *("oft_blocks", "oft_R.weight", "ia3_l", "diff_b", "reshape_weight"),
)
"""How the names of factors end, whatever stands before. Short words that models have too are none of them."""

ADAPTER_NAMES: tuple[tuple[str, str], ...] = (
    (r"emb_params|clip_[lg]|<[^.]*>|string_to_param\..*", "a textual inversion: rows of an embedding"),
    (
        r"(\w+\.)?base_model\.model\..*\.(lora_[AB](\.\w+)?\.weight|ia3_l|hada_\w+)",
        "PEFT's weights without their adapter_config.json",
    ),
    (r".*\.lora_[ab]\.weight|.*\.magnitude", "factors of torchtune"),
    (r".*\.(lora_[AB](\.default)?(\.weight)?|lora_(down|up|mid)\.weight)", "factors of a LoRA"),
)
"""Layouts by the names of all of their tensors, alphas and the like left out: a pattern, and what it is."""

_BESIDE = re.compile(r".*\.(alpha|scale|dora_scale|diff|diff_b|lora_[AB]\.bias)")


def holds_factors_alone(names: Collection[str]) -> bool:
    """Whether a file holds factors, and not the weights that they are for.

    At least half of its tensors are factors (others: alphas, biases, norms trained in full), and the weight of no
    module that has factors is there.
    """
    factored = [name for name in names if name.endswith(FACTOR_SUFFIXES)]  # of most models none
    if not factored:
        return False
    beside = sum(_BESIDE.fullmatch(name) is not None for name in names)
    known = names if isinstance(names, set | frozenset | dict) else frozenset(names)
    modules = {_module(name) for name in factored}
    bases = (f"{module}{leaf}" for module in modules for leaf in (".weight", ".base_layer.weight"))
    return 2 * (len(factored) + beside) >= len(names) and not any(base in known for base in bases)


def _module(name: str) -> str:
    suffix = next(suffix for suffix in FACTOR_SUFFIXES if name.endswith(suffix))
    return name.removesuffix(suffix).rstrip("._")


def named_adapter(names: Collection[str]) -> str:
    """What a file is that holds no model but an adapter, by its tensors' names; empty for anything else."""
    told = [name for name in names if not _BESIDE.fullmatch(name)]
    if not told:
        return ""
    known = next((what for pattern, what in ADAPTER_NAMES if all(re.fullmatch(pattern, name) for name in told)), "")
    return known or ("factors of an adapter" if holds_factors_alone(names) else "")
