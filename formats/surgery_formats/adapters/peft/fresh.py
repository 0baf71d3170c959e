# SPDX-License-Identifier: Apache-2.0
"""Configurations of adapters that nobody has trained yet, as PEFT 0.21 would write them after one step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery_formats.adapters.alphas import written_alpha
from surgery_formats.adapters.peft.carried import TASK_TYPES
from surgery_formats.adapters.peft.kinds.lora_variants import base_fields
from surgery_formats.updates import Part

__all__ = [
    "FreshTargets",
    "ia3_config",
    "lora_config",
    "lycoris_config",
    "oft_config",
    "prompt_config",
    "spelt_targets",
    "vera_config",
]

_SERIES = 5  # terms of the Cayley-Neumann series, PEFT's default
_SERIES_SINCE = "0.18.0"  # the version whose series it is


@dataclass(frozen=True, slots=True)
class FreshTargets:
    """What every configuration says.

    Attributes:
        base_name: Name of the base.
        task: As the Hub names it, or empty.
        modules: The value of ``target_modules``, see `spelt_targets`; None of a prompt.
        transposed: Whether the base stores the weights of the modules as ``(in, out)``.
    """

    base_name: str
    task: str
    modules: tuple[str, ...] | None = None
    transposed: bool = False

    def config(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The configuration of an adapter of this kind."""
        own: dict[str, Any] = {
            "auto_mapping": None,
            "base_model_name_or_path": self.base_name or None,
            "inference_mode": True,
            "peft_type": kind,
            "revision": None,
            "task_type": TASK_TYPES.get(self.task),
        }
        if self.modules is not None:
            own |= {"modules_to_save": None, "target_modules": list(self.modules)}
        return own | fields


def spelt_targets(chosen: Collection[str], among: Collection[str]) -> tuple[str, ...]:
    """The shortest names that PEFT matches with these modules and no others: it compares ends of paths behind a dot.

    Args:
        chosen: Paths of modules.
        among: Paths of all modules, `chosen` included.
    """
    wanted, here, everywhere = set(chosen), dict[str, int](), dict[str, int]()
    for path in among:
        for end in _ends(path):
            everywhere[end] = everywhere.get(end, 0) + 1
            here[end] = here.get(end, 0) + (path in wanted)
    return tuple(sorted({next((end for end in _ends(path) if here[end] == everywhere[end]), path) for path in wanted}))


def _ends(path: str) -> Iterable[str]:
    """``proj``, ``attn.proj`` ... up to the whole path."""
    segments = path.split(".")
    return (".".join(segments[start:]) for start in range(len(segments) - 1, -1, -1))


def lora_config(
    about: FreshTargets, rank: int, alpha: float, *, dora: bool = False, rslora: bool = False, taken: Part | None = None
) -> dict[str, Any]:
    """LORA. `taken` is the part of the base that PEFT takes away when it loads the adapter (raw PiSSA and OLoRA)."""
    return about.config(
        "LORA",
        alpha_pattern={},
        bias="none",
        fan_in_fan_out=about.transposed,
        lora_alpha=written_alpha(alpha),
        lora_bias=False,
        lora_dropout=0.0,
        r=rank,
        rank_pattern={},
        use_dora=dora,
        use_rslora=rslora,
        **{"init_lora_weights": True, **base_fields(taken)},
    )


def plain_start(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same factors on a base from which their part was taken already."""
    return {**config, "init_lora_weights": True}


def lycoris_config(about: FreshTargets, kind: str, rank: int, alpha: float) -> dict[str, Any]:
    """LOHA or LOKR; the second factor of a LoKr is as PEFT sizes it without a ``decompose_factor``."""
    fields: Mapping[str, Any] = {} if kind == "LOHA" else {
        "decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False,
    }  # fmt: skip
    return about.config(
        kind,
        alpha=written_alpha(alpha),
        alpha_pattern={},
        init_weights=True,
        module_dropout=0.0,
        r=rank,
        rank_dropout=0.0,
        rank_pattern={},
        use_effective_conv2d=False,
        **fields,
    )


def ia3_config(about: FreshTargets, feedforward: tuple[str, ...]) -> dict[str, Any]:
    """IA3; `feedforward` are the targets whose inputs are stretched."""
    return about.config(
        "IA3", fan_in_fan_out=about.transposed, feedforward_modules=list(feedforward), init_ia3_weights=True
    )


def oft_config(about: FreshTargets, block: int) -> tuple[dict[str, Any], int]:
    """OFT with blocks of this side, and the terms of the series by which it rotates."""
    config = about.config(
        "OFT",
        bias="none",
        block_share=False,
        coft=False,
        fan_in_fan_out=about.transposed,
        init_weights=True,
        module_dropout=0.0,
        num_cayley_neumann_terms=_SERIES,
        oft_block_size=block,
        peft_version=_SERIES_SINCE,
        r=0,
        use_cayley_neumann=True,
    )
    return config, _SERIES


def vera_config(about: FreshTargets, rank: int, key: int, initial: float) -> dict[str, Any]:
    """VERA, whose projections are drawn again from `key`."""
    return about.config(
        "VERA",
        bias="none",
        d_initial=initial,
        fan_in_fan_out=about.transposed,
        init_weights=True,
        projection_prng_key=key,
        r=rank,
        save_projection=False,
        vera_dropout=0.0,
    )


def prompt_config(
    about: FreshTargets, kind: str, tokens: int, width: int, submodules: int, layers: int, heads: int
) -> dict[str, Any]:
    """PROMPT_TUNING or PREFIX_TUNING: `width` numbers per token, in `heads` heads of keys."""
    fields: Mapping[str, Any] = (
        {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
        if kind == "PROMPT_TUNING"
        else {"encoder_hidden_size": width, "prefix_projection": False}
    )
    return about.config(
        kind,
        num_attention_heads=heads,
        num_layers=layers,
        num_transformer_submodules=submodules,
        num_virtual_tokens=tokens,
        token_dim=width,
        **fields,
    )
