# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapter_config.json, checked (facts: PEFT 0.21 ``LoraConfig``; formats/adapter kinds documented in docs/formats.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import regex

from surgery_formats.errors import FitError, MalformedError
from surgery_formats.text import show

__all__ = ["PeftConfig", "parse_config"]

PROMPT_KINDS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "MULTITASK_PROMPT_TUNING")
WEIGHT_KINDS = ("LORA", "TRAINABLE_TOKENS")

# Keys without any effect on what the stored tensors mean.
_HARMLESS = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "fan_in_fan_out",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "qalora_group_size",
        "runtime_config",
        "token_indices",
        "init_weights",
        "enable_lora",
        "merge_weights",
        "ensure_weight_tying",
        "inference",
    ]
)
_UNDERSTOOD = frozenset(
    [
        "r",
        "lora_alpha",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "rank_pattern",
        "alpha_pattern",
        "trainable_token_indices",
        "use_dora",
        "lora_bias",
        "target_parameters",
    ]
)
# Switches that change the arithmetic in a way no merged weight can have, or that the stored tensors alone cannot reproduce.
_REFUSED = {
    "layer_replication": "its layers are copies of the base's layers: no single weight can hold them",
    "alora_invocation_tokens": "it acts only after its invocation tokens: no merged weight does that",
    "arrow_config": "it routes between adapters at run time",
    "use_qalora": "its A acts on pooled inputs",
    "use_bdlora": "block-diagonal LoRA is not read yet",
    "kasa_config": "KaSA is not read yet",
    "velora_config": "VeLoRA is not read yet",
    "monteclora_config": "MonteCLoRA is not read yet",
    "megatron_config": "its tensors are one part of a parallel layer",
    "corda_config": "raw CorDA changes the base in a way its files do not record; convert it with PEFT first",
    "lora_ga_config": "raw LoRA-GA changes the base in a way its files do not record; convert it with PEFT first",
}
_RAW_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")
_REGEX_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields that decide what stored tensors mean.

    Attributes:
        kind: ``peft_type``.
        rank: ``r``; tensors decide, it is only needed where a tensor stacks experts.
        alpha: ``lora_alpha``.
        rank_pattern: Regular expressions on module paths; the first that matches wins.
        alpha_pattern: The same for alpha.
        rslora: Scale by ``alpha / sqrt(rank)``.
        dora: Whether magnitudes are expected.
        bias: ``none``, ``all`` or ``lora_only``.
        modules_to_save: Names of modules trained in full.
        target_parameters: Parameters (not modules) with a LoRA.
        token_indices: Trained token rows: one list, or one per module name.
        experts_old_order: Written by a PEFT before 0.19, which gave expert factors the other axis order.
        raw: The whole file.
    """

    kind: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    bias: str
    modules_to_save: tuple[str, ...]
    target_parameters: tuple[str, ...]
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    experts_old_order: bool
    raw: Mapping[str, Any]
    file: Path

    def rank_of(self, module: str) -> int:
        """Configured rank of a module."""
        key = self._first("rank_pattern", module)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, module: str) -> float:
        """Configured alpha of a module."""
        key = self._first("alpha_pattern", module)
        return self.alpha if key is None else self.alpha_pattern[key]

    def scale_of(self, module: str, rank: int) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)``."""
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

    def _first(self, field: Literal["rank_pattern", "alpha_pattern"], module: str) -> str | None:
        """The first key that matches as PEFT matches (``get_pattern_key``), with a limit on time."""
        for pattern in getattr(self, field):
            try:
                if regex.match(rf"(.*\.)?({pattern})$", module, timeout=_REGEX_SECONDS):
                    return str(pattern)
            except TimeoutError as error:
                raise MalformedError(
                    f"{field}: '{show(pattern)}' takes too long to match", file=self.file, hint="simplify it"
                ) from error
            except regex.error as error:
                raise MalformedError(
                    f"{field}: '{show(pattern)}' is not a regular expression ({error})", file=self.file
                ) from error
        return None


def parse_config(raw: Mapping[str, Any], file: Path) -> PeftConfig:
    """Check the fields that matter, refuse switches that are on and not understood.

    Raises:
        MalformedError: a field of a wrong type, or out of range.
        FitError: a kind, or a switch, that cannot be merged.
    """
    read = _Reader(raw, file)
    kind = raw.get("peft_type")
    if not isinstance(kind, str):
        raise MalformedError("no 'peft_type'", file=file, hint="is this an adapter's folder?")
    kind = kind.rpartition(".")[2]
    if kind not in WEIGHT_KINDS + PROMPT_KINDS:
        raise MalformedError(
            f"adapters of type '{show(kind)}' are not read", file=file, hint="`surgery formats` lists what is"
        )
    if kind in WEIGHT_KINDS:
        _refuse_unknown(raw, file)
    return PeftConfig(
        kind=kind,
        rank=read.integer("r", 8, low=1),
        alpha=read.number("lora_alpha", 8.0),
        rank_pattern=read.pattern("rank_pattern", lambda key, value: read.check_integer(key, value, 1)),
        alpha_pattern=read.pattern("alpha_pattern", read.check_number),
        rslora=read.flag("use_rslora"),
        dora=read.flag("use_dora"),
        bias=read.choice("bias", ("none", "all", "lora_only")),
        modules_to_save=read.names("modules_to_save"),
        target_parameters=read.names("target_parameters"),
        token_indices=_token_indices(read, kind),
        experts_old_order=_before_0_19(raw.get("peft_version")),
        raw=raw,
        file=file,
    )


def _refuse_unknown(raw: Mapping[str, Any], file: Path) -> None:
    for key, value in raw.items():
        if key in _REFUSED and value:
            raise FitError(f"'{key}' is set: {_REFUSED[key]}", file=file)
        if key not in _HARMLESS | _UNDERSTOOD | set(_REFUSED) and value not in (None, False, 0, "", {}, []):
            raise FitError(
                f"the switch '{show(key)}' is on and not known; it may change what the tensors mean",
                file=file,
                hint="remove it from adapter_config.json if it does not",
            )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_RAW_INITS):
        raise FitError(
            f"init_lora_weights is '{show(init)}': the adapter was trained on a changed base, W + sBA would be wrong",
            file=file,
            hint="save it with PEFT's path_initial_model_for_weight_conversion",
        )


def _before_0_19(version: object) -> bool:
    """PEFT records its version since 0.18; expert factors changed their axis order in 0.19 (huggingface/peft#3165)."""
    if not isinstance(version, str):
        return True
    numbers = [part for part in version.split(".")[:2] if part.isdecimal()]
    return len(numbers) == 2 and tuple(map(int, numbers)) < (0, 19)


def _token_indices(read: _Reader, kind: str) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
    key = "token_indices" if kind == "TRAINABLE_TOKENS" else "trainable_token_indices"
    value = read.raw.get(key)
    if isinstance(value, Mapping):
        return {name: read.indices(key, rows) for name, rows in value.items()}
    return read.indices(key, value or [])


@dataclass(frozen=True, slots=True)
class _Reader:
    raw: Mapping[str, Any]
    file: Path

    def fail(self, key: str, value: object, wanted: str) -> MalformedError:
        return MalformedError(f"'{show(key)}' is {show(repr(value), 40)}, not {wanted}", file=self.file)

    def check_integer(self, key: str, value: object, low: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 1 << 31:
            raise self.fail(key, value, f"a whole number of at least {low}")
        return value

    def check_number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(key, value, "a finite number")
        return float(value)

    def integer(self, key: str, default: int, low: int) -> int:
        value = self.raw.get(key)
        return default if value is None else self.check_integer(key, value, low)

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        return default if value is None else self.check_number(key, value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return bool(value)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.raw.get(key, allowed[0])
        if value not in allowed:
            raise self.fail(key, value, f"one of {', '.join(allowed)}")
        return str(value)

    def names(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.fail(key, value, "a list of names")
        return tuple(sorted(value))

    def pattern(self, key: str, check: Any) -> Mapping[str, Any]:
        value = self.raw.get(key) or {}
        if not isinstance(value, Mapping):
            raise self.fail(key, value, "an object")
        return {name: check(f"{key}.{name}", entry) for name, entry in value.items()}

    def indices(self, key: str, value: object) -> tuple[int, ...]:
        if not isinstance(value, list):
            raise self.fail(key, value, "a list of token ids")
        found = tuple(self.check_integer(key, entry, 0) for entry in value)
        if len(set(found)) != len(found):
            raise self.fail(key, value, "a list of distinct token ids")
        return found
