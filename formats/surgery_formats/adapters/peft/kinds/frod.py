# SPDX-License-Identifier: Apache-2.0
"""FROD: a diagonal and single elements between a weight's own directions and shared ones (PEFT 0.21, ``tuners/frod``)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.keys import ROOT
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.adapters.writing import copied, rate_of
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.updates import Factor, FRoD, Update

__all__ = ["FROD"]

_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")


def _category(module: str) -> str:
    """The name under which modules share their directions, as PEFT makes it of a module's path."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    return "attention_output" if parts[-3:] == ["attention", "output", "dense"] else "_".join(parts[-2:])


def _read(module: Module) -> ModuleUpdates:
    diagonal, values = module.vector("frod_lambda_l"), module.part("frod_lambda_s_values")
    category = _category(module.path)
    V, places, size = (module.shared.get(f"{name}.{category}") for name in _SHARED)
    if V is None or places is None:
        raise FitError(
            f"the directions that it shares, '{ROOT}frod_V.{category}', are not in the file (save_projection is off): "
            "PEFT computes them from all weights of one name, with signs that only its own library gives",
            file=diagonal.file.path,
            tensor=diagonal.name,
            hint="load it with PEFT where it was trained, set save_projection in its configuration, and save it again",
        )
    if V.shape != (diagonal.numel, diagonal.numel):
        raise malformed(V, f"'frod_lambda_l' has {diagonal.numel} numbers")
    if places.shape != (2, values.numel) or len(values.shape) != 1 or places.dtype not in (DType.I64, DType.I32):
        raise malformed(places, f"no places of {values.numel} values")
    update = FRoD(Factor.of(V), Factor.of(diagonal), Factor.of(values), places, (size,) if size else ())
    return ModuleUpdates({module.site(): (update,)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    """Modules of one name share the first one's directions."""
    shared: dict[str, FRoD] = {}
    for site, update in updates:
        if not isinstance(update, FRoD):
            file.hold_other(site, update)
            continue
        module = file.module_of(site, update)[0]
        key, first = f"{file.prefix}{module}", shared.setdefault(_category(module), update)
        if (first.V, first.places) != (update.V, update.places) or not update.sizes:
            file.drop(site, update, f"all modules named '{_category(module)}' share their directions")
            continue
        file.put(f"{key}.frod_lambda_l", update.diagonal)
        file.put(f"{key}.frod_lambda_s_values", update.values)
        file.ledger.keep(site, update, "exact", f"{key}.frod_lambda_l")
    for category, update in shared.items():
        file.put(f"{ROOT}frod_V.{category}", update.V)
        for name, tensor in zip(_SHARED[1:], (update.places, *update.sizes), strict=False):
            file.add(copied(f"{ROOT}{name}.{category}", tensor))
    file.defaults = {"fan_in_fan_out": False, "frod_dropout": 0.0, "init_weights": True}
    rate = rate_of((update.values.shape[0], update.V.shape[0] ** 2) for update in shared.values())
    file.fields = {"save_projection": True, "sparse_rate": rate, "target_modules": targets(file)}


FROD = PeftKind(
    name="FROD",
    factors=frozenset(["frod_lambda_l", "frod_lambda_s_values"]),
    read=_read,
    writes=frozenset([FRoD.kind]),
    write=_write,
    switches=Switches(
        COMMON
        | {
            "frod_dropout",
            "progressbar",
            "projection_prng_key",
            "regularization_alpha",
            "runtime_offload_base_weight",
            "sparse_rate",
        },
        frozenset(["bias", "modules_to_save", "save_projection"]),
    ),
    shared=frozenset(f"{name}." for name in _SHARED),
)
