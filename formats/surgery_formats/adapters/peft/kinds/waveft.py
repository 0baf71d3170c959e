# SPDX-License-Identifier: Apache-2.0
"""WAVEFT: coefficients of a wavelet transform, at places that a seed gives (PEFT 0.21, ``tuners/waveft/layer.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.each import put_each
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.adapters.peft.write_config import targets
from surgery_formats.adapters.writing import commonest
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import FitError
from surgery_formats.text import show
from surgery_formats.updates import WAVELETS, Factor, Update, WaveFT

__all__ = ["WAVEFT"]


def _read(module: Module) -> ModuleUpdates:
    config, values = module.config, module.vector("waveft_spectrum")
    transformed = config.flag("use_idwt", default=True)
    wavelet = config.raw.get("wavelet_family", "db1") if transformed else ""
    if transformed and (not isinstance(wavelet, str) or wavelet not in WAVELETS):
        raise FitError(
            f"'wavelet_family' is '{show(str(wavelet))}'",
            file=config.file,
            hint="PEFT knows db1 to db10, sym2 to sym10, coif1 to coif5",
        )
    if not config.flag("proportional_parameters"):
        config.check_frequencies(module.path, values)
    seed = config.integer("random_loc_seed", 777, low=-(1 << 31))
    update = WaveFT(Factor.of(values), seed, wavelet, config.number("scaling", 25.0))
    return ModuleUpdates({module.site(): (update,)})


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    counts = {}

    def put(key: str, update: WaveFT) -> None:
        file.put(f"{key}.waveft_spectrum", update.values)
        counts[key.removeprefix(file.prefix)] = update.values.shape[0]

    why = "all modules of a file have one seed, wavelet and scale"
    written = put_each(file, updates, WaveFT, put, lambda update: (update.seed, update.wavelet, update.scale), why)
    file.defaults = {"fan_in_fan_out": False, "init_weights": True}
    if written:
        count = commonest(counts.values()) or 1
        file.fields = {
            "n_frequency": count,
            "n_frequency_pattern": {f"^{module}": n for module, n in counts.items() if n != count},
            "proportional_parameters": False,
            "random_loc_seed": written.seed,
            "scaling": written.scale,
            "target_modules": targets(file),
            "use_idwt": bool(written.wavelet),
            "wavelet_family": written.wavelet or "db1",
        }


WAVEFT = PeftKind(
    name="WAVEFT",
    factors=frozenset(["waveft_spectrum"]),
    read=_read,
    writes=frozenset([WaveFT.kind]),
    write=_write,
    switches=Switches(
        COMMON,
        frozenset(["n_frequency", "n_frequency_pattern", "proportional_parameters", "random_loc_seed", "scaling"])
        | {"bias", "modules_to_save", "use_idwt", "wavelet_family"},
    ),
)
