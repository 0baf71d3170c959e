# SPDX-License-Identifier: Apache-2.0
"""Read and check PEFT's adapter_config.json (docs/peft.md; source: PEFT 0.21, ``LoraConfig``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from surgery_formats.adapters.peft.config_fields import FieldReader
from surgery_formats.adapters.peft.keys import bare_pattern, path_ends
from surgery_formats.adapters.peft.patterns import Patterns
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["COMMON", "CONFIG_FILE", "PeftConfig", "Switches", "parse_config"]

CONFIG_FILE = "adapter_config.json"
_RAW_INITS: Mapping[str, str] = {
    "pissa_niter": "the part of the base that it replaces was found by random numbers without a seed",
    "loftq": "it was trained on a base that LoftQ rounded, which no file records",
    "corda": "the part of the base that it replaces was chosen by data that its files do not have",
    "lora_ga": "the part of the base that it replaces was chosen by gradients that its files do not have",
}
"""Starting points that changed the base in a way nobody can repeat from the files."""
_REGEX_SECONDS = 0.5
NOT_READ: Mapping[str, str] = {
    "ADAPTION_PROMPT": "its gates act inside attention: neither a weight nor a prefix can hold them",
    "MULTITASK_PROMPT_TUNING": "it holds one prompt per task and the task is chosen at run time",
    "XLORA": "it routes between adapters at run time",
    "POLY": "it routes between adapters at run time",
    "SHADOW": "it runs a second, smaller model beside the base and mixes its states in: keep both, in PEFT",
}
"""Kinds that are known and refused, and why."""
COMMON = frozenset(
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
        "layers_to_transform",
        "layers_pattern",
        "runtime_config",
        "inference",
        "init_weights",
        "fan_in_fan_out",  # PEFT overrides it by the type of the module; the base's family decides here
    ]
)
"""Fields of every kind that change nothing about what tensors mean."""


@dataclass(frozen=True, slots=True)
class Switches:
    """How each field of a kind's configuration affects the meaning of its tensors.

    A field that is set and not listed here is refused.

    Attributes:
        harmless: Fields with no effect on what the stored tensors mean: training, targets, initial values.
        understood: Fields that the reader applies.
        refused: Fields, with the reason, that change the arithmetic in a way that no merged weight can have or that the
            stored tensors alone cannot reproduce.
        alpha: Field that holds alpha.
        signed: Whether a negative alpha subtracts what was trained; else PEFT takes another number for it.
        least_rank: Smallest value of ``r``; 0 where a kind has another way to give sizes.
        rank_lists: Whether ``rank_pattern`` says of each of a module's first directions whether it was kept (AdaLoRA).
    """

    harmless: frozenset[str] = COMMON
    understood: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    alpha: str = "lora_alpha"
    signed: bool = True
    least_rank: int = 1
    rank_lists: bool = False


@dataclass(frozen=True)
class PeftConfig:
    """The fields that decide what stored tensors mean.

    Attributes:
        kind: ``peft_type``.
        rank: ``r``; tensors decide, it is only needed where a tensor stacks experts.
        alpha: ``lora_alpha``, or ``alpha``.
        rank_pattern: Regular expressions on module paths; the first that matches wins.
        alpha_pattern: The same for alpha.
        rslora: Scale by ``alpha / sqrt(rank)``.
        dora: Whether magnitudes are expected.
        bias: ``none``, ``all``, or ``<kind>_only``.
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

    def check_rank(self, module: str, rank: int, tensor: StoredTensor) -> None:
        """Refuse a rank of the file that is not the configured one.

        Raises:
            MalformedError: they differ.
        """
        key = self._first("rank_pattern", module)
        if key is None and self.raw.get("r") is None:
            return
        stated, field = self.rank_of(module), "r" if key is None else f"rank_pattern['{show(key)}']"
        if rank != stated:
            raise MalformedError(
                f"rank {rank}, but {field} says {stated}: which of them was trained cannot be told",
                file=tensor.file.path,
                tensor=tensor.name,
                hint="PEFT refuses it too. Put right what is wrong in adapter_config.json, or save the adapter again",
            )

    def check_frequencies(self, module: str, tensor: StoredTensor, *, behind_dot: bool = False) -> None:
        """Refuse a vector that has not as many coefficients as ``n_frequency``, or its pattern, says.

        Args:
            module: Its path.
            tensor: The vector.
            behind_dot: Whether PEFT takes a pattern for the end of a path behind a dot, or for the path itself, only.

        Raises:
            MalformedError: the numbers differ.
        """
        field, reader = "n_frequency", FieldReader(self.raw, self.file)
        pattern = reader.pattern("n_frequency_pattern", reader.check_rank)

        def matches(key: str) -> bool:
            if behind_dot:
                return key == module or self._matches(field, rf".*\.{key}$", module, whole=True)
            return self._matches(field, key, module, whole=False)

        key = next((key for key in pattern if matches(key)), None)
        if key is None and self.raw.get(field) is None:
            return
        stated = reader.integer(field, 1000, low=1) if key is None else pattern[key]
        if tensor.numel != stated:
            where = field if key is None else f"n_frequency_pattern['{show(key)}']"
            raise MalformedError(
                f"{tensor.numel} coefficients, but {where} says {stated}: one of them is not of this adapter",
                file=tensor.file.path,
                tensor=tensor.name,
                hint="PEFT refuses it too. Put right what is wrong in adapter_config.json, or save the adapter again",
            )

    def lists(self, field: Literal["target_modules", "exclude_modules"], module: str) -> bool:
        """Whether a path ends as one of the names of a field, of which a file may have as many as modules."""
        return not self._listed[field].isdisjoint(path_ends(module))

    @cached_property
    def _listed(self) -> Mapping[str, frozenset[str]]:
        """The names of each field; none of a pattern."""
        fields = {field: self.raw.get(field) for field in ("target_modules", "exclude_modules")}
        return {
            field: frozenset(bare_pattern(name) for name in names if isinstance(name, str))
            if isinstance(names, list | Mapping)
            else frozenset()
            for field, names in fields.items()
        }

    def _first(self, field: Literal["rank_pattern", "alpha_pattern"], module: str) -> str | None:
        """The first key that matches as PEFT matches (``get_pattern_key``), with a limit on time."""
        if "\n" in module:  # of which `$` and the dot know
            return next((p for p in getattr(self, field) if self._matches(field, p, module, whole=False)), None)
        return self._patterns[field].first(module, lambda p: self._matches(field, p, module, whole=False))

    @cached_property
    def _patterns(self) -> Mapping[str, Patterns]:
        return {"rank_pattern": Patterns(self.rank_pattern), "alpha_pattern": Patterns(self.alpha_pattern)}

    def _matches(self, field: str, pattern: str, module: str, *, whole: bool) -> bool:
        import regex  # slow to import, and few configurations hold patterns

        bare = bare_pattern(pattern)
        anchored = rf"(?:{bare})\Z" if whole else rf"(.*\.)?({bare})$"
        try:
            return regex.match(anchored, module, timeout=_REGEX_SECONDS) is not None
        except TimeoutError as error:
            raise MalformedError(
                f"{field}: '{show(pattern)}' takes too long to match", file=self.file, hint="simplify it"
            ) from error
        except regex.error as error:
            raise MalformedError(
                f"{field}: '{show(pattern)}' is not a regular expression ({error})", file=self.file
            ) from error

    def flag(self, key: str, default: bool = False) -> bool:
        """Another field that is true or false."""
        return FieldReader(self.raw, self.file).flag(key, default)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """Another field that is one of these words, the first by default."""
        return FieldReader(self.raw, self.file).choice(key, allowed)

    def integer(self, key: str, default: int, low: int = 0) -> int:
        """Another field that is a whole number of at least `low`."""
        return FieldReader(self.raw, self.file).integer(key, default, low)

    def number(self, key: str, default: float) -> float:
        """Another field that is a finite number."""
        return FieldReader(self.raw, self.file).number(key, default)

    def before(self, major: int, minor: int) -> bool:
        """Whether it was written by a PEFT before ``major.minor``, or before PEFT recorded its version (0.18)."""
        return _before(self.raw.get("peft_version"), (major, minor))

    def selects(self, key: str, module: str) -> bool | None:
        """Whether field `key`, a whole-path pattern or a list of endings, names `module`; None without such a field."""
        value = self.raw.get(key)
        if value is None:
            return None
        if isinstance(value, str):
            return self._matches(key, value, module, whole=True)
        return module.endswith(FieldReader(self.raw, self.file).names(key))


def parse_config(raw: Mapping[str, Any], file: Path, kinds: Mapping[str, Switches]) -> PeftConfig:
    """Check the fields that matter, refuse switches that are on and not understood.

    Args:
        raw: The file's content.
        file: For messages.
        kinds: Switches of every kind that is read, by ``peft_type``.

    Raises:
        MalformedError: a field of a wrong type, or out of range.
        FitError: a kind, or a switch, that cannot be merged.
    """
    if raw.keys() >= {"r", "lora_alpha"}:  # all that tinker-cookbook asks of one
        raw = {"peft_type": "LORA", **raw}
    read = FieldReader(raw, file)
    kind = raw.get("peft_type")
    if not isinstance(kind, str):
        raise MalformedError("no 'peft_type'", file=file, hint="is this an adapter's folder?")
    kind = kind.rpartition(".")[2]
    if kind in NOT_READ:
        raise FitError(f"adapters of type '{kind}' are not read: {NOT_READ[kind]}", file=file)
    if kind not in kinds:
        raise MalformedError(
            f"adapters of type '{show(kind)}' are not read", file=file, hint="`surgery formats` lists what is"
        )
    switches = kinds[kind]
    _refuse_unknown(raw, switches, file)
    return PeftConfig(
        kind=kind,
        rank=read.integer("r", 8, low=switches.least_rank),
        alpha=read.number(switches.alpha, 8.0),
        rank_pattern=read.pattern("rank_pattern", read.count if switches.rank_lists else read.check_rank)
        if "rank_pattern" in switches.understood
        else {},
        alpha_pattern=read.pattern("alpha_pattern", read.check_number),
        rslora=read.flag("use_rslora"),
        dora=read.flag("use_dora"),
        bias=read.bias(),
        modules_to_save=read.names("modules_to_save"),
        target_parameters=read.names("target_parameters"),
        token_indices=_token_indices(read, kind),
        experts_old_order=_before(raw.get("peft_version"), (0, 19)),
        raw=raw,
        file=file,
    )


def _refuse_unknown(raw: Mapping[str, Any], known: Switches, file: Path) -> None:
    for key, value in raw.items():
        if key in known.refused and value:
            raise FitError(f"'{key}' is set: {known.refused[key]}", file=file)
        if key not in known.harmless | known.understood | set(known.refused) and value not in (
            None,
            False,
            0,
            "",
            {},
            [],
        ):
            raise FitError(
                f"the switch '{show(key)}' is on and not known; it may change what the tensors mean",
                file=file,
                hint="a newer version may know it; the program that wrote it can merge it",
            )
    init = raw.get("init_lora_weights")
    why = [why for raw, why in _RAW_INITS.items() if isinstance(init, str) and init.lower().startswith(raw)]
    if why:
        raise FitError(
            f"init_lora_weights is '{show(init)}': {why[0]}, and W + sBA would be wrong",
            file=file,
            hint="save it with PEFT's path_initial_model_for_weight_conversion",
        )


def _before(version: object, since: tuple[int, int]) -> bool:
    """PEFT records its version since 0.18; expert factors changed their axis order in 0.19 (huggingface/peft#3165)."""
    if not isinstance(version, str):
        return True
    numbers = [part for part in version.split(".")[:2] if part.isdecimal()]
    return len(numbers) == 2 and tuple(map(int, numbers)) < since


def _token_indices(read: FieldReader, kind: str) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
    key = "token_indices" if kind == "TRAINABLE_TOKENS" else "trainable_token_indices"
    value = read.raw.get(key)
    if isinstance(value, Mapping):
        return {name: read.indices(key, rows) for name, rows in value.items()}
    return read.indices(key, value or [])
