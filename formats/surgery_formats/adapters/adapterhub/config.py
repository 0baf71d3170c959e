# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json of AdapterHub: which methods one adapter has, and what their numbers mean (adapters 1.3.0)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.text import show

__all__ = ["HubConfig", "LoRASettings", "parse_hub_config", "read_hub_config"]

_UNSCALED_BEFORE = (1, 1)
"""The version that began to scale LoRA (adapters#770): before it, files act as if alpha were the rank."""


@dataclass(frozen=True, slots=True)
class LoRASettings:
    """One method of the architecture ``lora``: LoRA, DoRA, VeRA, or (IA)^3, which the library calls a LoRA that scales.

    Attributes:
        rank: ``r``.
        alpha: As it acts.
        multiplies: Whether it is (IA)^3.
        dora: Whether it has magnitudes.
        matrices: Which of queries, keys and values it is on, as ``qkv``.
    """

    rank: int
    alpha: float
    multiplies: bool
    dora: bool
    matrices: str


@dataclass(frozen=True, slots=True)
class HubConfig:
    """A configuration.

    Attributes:
        raw: The whole file.
        file: The file.
        name: Of the adapter, which is in the keys of its tensors.
        methods: What the adapter is made of; several for a union.
        loras: Those of the architecture ``lora``.
        issues: What to know of them.
    """

    raw: Mapping[str, Any]
    file: Path
    name: str
    methods: tuple[Mapping[str, Any], ...]
    loras: tuple[LoRASettings, ...]
    issues: tuple[str, ...]

    @property
    def kind(self) -> str:
        """For reports: ``LORA``, ``UNION``."""
        own = self.raw["config"]
        return str(own.get("architecture") or "bottleneck").upper()

    def lora_of(self, rank: int, tensor: str) -> LoRASettings:
        """The method that a module with this rank belongs to.

        Raises:
            FitError: no method of this rank, or several that act differently.
        """
        fitting = {method for method in self.loras if method.rank == rank}
        if len(fitting) != 1:
            what = "no LoRA" if not fitting else "several LoRAs"
            raise FitError(f"its configuration has {what} of rank {rank}", file=self.file, tensor=tensor)
        return fitting.pop()


def read_hub_config(file: Path) -> HubConfig:
    """Read adapter_config.json.

    Raises:
        MalformedError: a field is missing or odd.
    """
    return parse_hub_config(read_object(file), file)


def parse_hub_config(raw: Mapping[str, Any], file: Path) -> HubConfig:
    """The contents of adapter_config.json, which `file` is, or will be.

    Raises:
        MalformedError: a field is missing or odd.
    """
    own, name = raw.get("config"), raw.get("name")
    if not isinstance(own, Mapping) or not isinstance(name, str) or not name:
        raise MalformedError("no 'config', or no 'name' of the adapter", file=file)
    parts = own.get("configs", []) if own.get("architecture") == "union" else [own]
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise MalformedError("'configs' of a union is not a list of objects", file=file)
    methods = tuple(parts)
    unscaled = _is_unscaled(raw.get("version"))
    loras = tuple(
        _lora(method, file, unscaled=unscaled)
        for method in methods
        if method.get("architecture") in ("lora", "mtl_lora")
    )
    wrong = unscaled and any(
        method.get("architecture") == "lora" and method.get("alpha") != method.get("r") for method in methods
    )
    return HubConfig(raw, file, name, methods, loras, (_UNSCALED,) if wrong else ())


_UNSCALED = (
    "written before adapters 1.1, which did not scale LoRA: it is read as trained, as if its alpha were its rank "
    "(adapters#770)"
)


def _is_unscaled(version: object) -> bool:
    found = re.match(r"adapters\.(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) < _UNSCALED_BEFORE


def _lora(method: Mapping[str, Any], file: Path, *, unscaled: bool) -> LoRASettings:
    rank, alpha = method.get("r", 8), method.get("alpha", 8)
    mode, matrices = method.get("composition_mode", "add"), method.get("attn_matrices", ["q", "v"])
    if type(rank) is not int or rank < 1:
        raise MalformedError(f"'r' is {show(repr(rank), 40)}", file=file)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) < 1e30:
        raise MalformedError(f"'alpha' is {show(repr(alpha), 40)}", file=file)
    if mode not in ("add", "scale") or not isinstance(matrices, list):
        raise MalformedError(f"'composition_mode' is {show(repr(mode), 40)}", file=file)
    chosen = "".join(name for name in "qkv" if name in matrices)
    alpha = rank if unscaled and method.get("architecture") == "lora" else alpha
    return LoRASettings(rank, float(alpha), mode == "scale", method.get("use_dora") is True, chosen)
