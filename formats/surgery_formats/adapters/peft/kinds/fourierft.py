# SPDX-License-Identifier: Apache-2.0
"""FOURIERFT: coefficients at random frequencies (PEFT 0.21, ``tuners/fourierft/layer.py``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import setting_and_pattern, targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, FourierFT, Update

__all__ = ["FOURIERFT"]

_SEED, _SCALING = 777, 150.0  # PEFT's defaults


def _read(module: Module) -> ModuleUpdates:
    stored, config = module.vector("fourierft_spectrum"), module.config
    config.check_frequencies(module.path, stored, behind_dot=True)
    seed = config.integer("random_loc_seed", _SEED, low=-(1 << 31))
    return ModuleUpdates({module.site(): (FourierFT(Factor.of(stored), seed, config.number("scaling", _SCALING)),)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """All modules have one scale, the first one's; another goes into the coefficients."""
    scale = next((update.scale for _, update in updates if isinstance(update, FourierFT)), _SCALING)
    if file.own is not None:
        scale = file.own.number("scaling", _SCALING)
    counts: dict[str, int] = {}

    def put(key: str, update: FourierFT) -> float:
        times = 1.0 if update.scale == scale else update.scale / scale
        file.put(f"{key}.fourierft_spectrum", update.spectrum, times=times)
        counts[key.removeprefix(file.prefix)] = update.spectrum.shape[0]
        return times

    first = put_each(
        file, updates, FourierFT, put, lambda update: update.seed, "all modules of a file draw from one seed"
    )
    count, pattern = setting_and_pattern(counts or {"": 1000}, anchored=False)
    file.defaults = {"fan_in_fan_out": False, "init_weights": False}
    file.fields = {
        "n_frequency": count,
        "n_frequency_pattern": pattern,
        "random_loc_seed": _SEED if first is None else first.seed,
        "scaling": scale,
        "target_modules": targets(file),
    }


def _issues(config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Iterable[str]:
    if "random_loc_seed" not in config:
        yield f"no random_loc_seed in its configuration: PEFT's default, {_SEED}, is used"


FOURIERFT = PeftKind(
    name="FOURIERFT",
    factors=frozenset(["fourierft_spectrum"]),
    read=_read,
    writes=frozenset([FourierFT.kind]),
    write=_write,
    switches=Switches(
        COMMON,
        frozenset(["n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling", "bias", "modules_to_save"]),
    ),
    issues=_issues,
)
