# SPDX-License-Identifier: Apache-2.0
"""Single files in fp8 as people have them, and what ComfyUI makes of one.

A file is cast as it is, or has scales: told by the marker ``scaled_fp8``, by a tensor ``comfy_quant`` beside each weight, or
by the file's metadata. `as_comfyui_reads` follows ComfyUI's ``convert_old_quants`` and its operations of mixed precision: a layer
is quantised if one of the three says so, and nothing else is multiplied by a scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import surgery
from tests.support.adapter_files import Arrays
from tests.support.base_loras import lora_of
from tests.support.bases import KINDS, drawn, files_of

__all__ = ["FP8_COMBINATIONS", "STYLES", "WAYS", "Fp8Combination", "check_fp8", "fp8_file"]

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
STYLES = {
    "cast": "as it is, biases and norms too",
    "scaled_fp8": "`scale_weight`, `scale_input`, the marker `scaled_fp8`",
    "comfy_quant": "`weight_scale`, `comfy_quant`",
    "metadata": "`weight_scale`, `_quantization_metadata` in the header",
}
WAYS: dict[str, dict[str, object]] = {
    "16 bits": {},
    "16 bits where touched": {"only_touched": True},
    "fp8 again": {"quantized": "requantize", "rounding": "nearest"},
}
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "uint8": "U8"}
_TYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BF16,
    "F8_E4M3": E4M3,
    "U8": np.dtype(np.uint8),
}
_FORMAT = {"format": "float8_e4m3fn"}
_NOISE = (
    0.07  # of fp8, relative to the weight: rounding is off by a sixteenth at most, and the largest value may be cut
)


@dataclass(frozen=True, slots=True)
class Fp8Combination:
    """A file and a way to write it.

    Attributes:
        network: By its name in the golden rows.
        layout: `release` or `ComfyUI`.
        style: One of `STYLES`.
        way: One of `WAYS`.
    """

    network: str
    layout: str
    style: str
    way: str

    def __str__(self) -> str:
        return f"{self.network}, {self.layout}, {self.style}, {self.way}"


FP8_COMBINATIONS = tuple(
    Fp8Combination(network, layout, style, way)
    for network in KINDS
    for layout in ("release", "ComfyUI")
    for style in STYLES
    for way in WAYS
)


def fp8_file(tensors: Arrays, style: str, prefix: str) -> tuple[Arrays, dict[str, str]]:
    """The tensors and the metadata of a file whose denoiser, behind `prefix`, is in fp8."""
    found: Arrays = {f"{prefix}scaled_fp8": np.zeros(0, E4M3)} if style == "scaled_fp8" else {}
    layers = {}
    for name, tensor in tensors.items():
        inside, module = name.startswith(prefix), name.removesuffix(".weight")
        if not inside or style == "cast":
            found[name] = tensor.astype(E4M3 if inside else BF16)
        elif module == name or tensor.ndim != 2 or tensor.shape[0] < 2:
            found[name] = tensor.astype(BF16)
        else:
            scale = np.abs(tensor).max() / 448
            found[name] = (tensor / scale).astype(E4M3)
            where = "scale_weight" if style == "scaled_fp8" else "weight_scale"
            found[f"{module}.{where}"] = np.full((), scale, np.float32)
            layers[module] = _FORMAT
            if style == "scaled_fp8":
                found[f"{module}.scale_input"] = np.ones((), np.float32)
            if style == "comfy_quant":
                found[f"{module}.comfy_quant"] = np.frombuffer(json.dumps(_FORMAT).encode(), np.uint8)
    told = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return found, {"modelspec.title": "A base", **(told if style == "metadata" else {})}


def as_comfyui_reads(tensors: Arrays, metadata: Mapping[str, str], prefix: str) -> Arrays:
    """Values by name; what it cannot load, or would not multiply by its scale, is an error."""
    found, layers = dict(tensors), dict[str, object]()
    if (told := metadata.get("_quantization_metadata")) is not None:
        layers = json.loads(told)["layers"]
    elif found.pop(f"{prefix}scaled_fp8", None) is not None:
        for name in [name for name in found if name.endswith(".scale_weight")]:
            layers[name.removesuffix(".scale_weight")] = _FORMAT
            found[f"{name.removesuffix('.scale_weight')}.weight_scale"] = found.pop(name)
        found = {name: tensor for name, tensor in found.items() if not name.endswith(".scale_input")}
    for name in [name for name in found if name.endswith(".comfy_quant")]:
        layers[name.removesuffix(".comfy_quant")] = json.loads(found.pop(name).tobytes())
    values: Arrays = {}
    for module in layers:
        assert found[f"{module}.weight"].dtype == E4M3, module
        values[f"{module}.weight"] = found.pop(f"{module}.weight").astype(np.float32) * found.pop(
            f"{module}.weight_scale"
        )
    left = [name for name in found if "scale_" in name or name.endswith("weight_scale") or "scaled_fp8" in name]
    assert not [name for name in left if "shift" not in name], left
    return values | {name: tensor.astype(np.float32) for name, tensor in found.items()}


def write_file(path: Path, tensors: Arrays, metadata: Mapping[str, str]) -> None:
    """A safetensors file with types that its binding for numpy does not write."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    data = b""
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor).tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": _CODES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_file(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Its tensors in the order of the file, and its metadata."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__", {})
    found: Arrays = {}
    for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        a, b = told["data_offsets"]
        found[name] = np.frombuffer(raw[start + a : start + b], _TYPES[told["dtype"]]).reshape(told["shape"])
    return found, metadata


def check_fp8(combination: Fp8Combination, folder: Path) -> None:
    """Assert that ComfyUI reads the merge as what it reads of the base, plus the LoRA."""
    kind = KINDS[combination.network]
    weights = drawn(combination.network, np.float32)
    prefix = kind.prefix if combination.layout == "release" else kind.saved
    (base,) = files_of(weights, combination.layout).values()
    stored, metadata = fp8_file(base, combination.style, prefix)
    write_file(folder / "base.safetensors", stored, metadata)
    lora = lora_of(weights, "diffusers", encoders=False, without=".1.")
    save_file(lora.tensors, folder / "lora.safetensors")
    (added,) = files_of(lora.added, combination.layout).values()
    strength = (
        0.03 if combination.way == "fp8 again" else 1.0
    )  # the scale of a whole tensor stays, and so its largest value
    adapter = surgery.open(folder / "lora.safetensors") * strength
    surgery.merge(folder / "base.safetensors", adapter, output=folder / "out", **WAYS[combination.way])  # type: ignore[arg-type]
    got, told = read_file(folder / "out" / "base.safetensors")
    before, after = as_comfyui_reads(stored, metadata, prefix), as_comfyui_reads(got, told, prefix)
    assert before.keys() == after.keys() == base.keys()
    assert told["modelspec.title"] == metadata["modelspec.title"]
    if combination.way == "fp8 again":
        assert list(got) == list(stored)
        assert [tensor.dtype for tensor in got.values()] == [tensor.dtype for tensor in stored.values()]
    if combination.way == "16 bits":
        assert {tensor.dtype for tensor in got.values()} == {BF16}
    untouched = 0
    for name, values in before.items():
        wanted = values.astype(float) + strength * added[name]
        off = np.abs(after[name] - wanted)
        if not added[name].any() and combination.way != "16 bits":
            assert np.array_equal(after[name], values), name
            untouched += 1
        elif combination.way == "fp8 again":
            assert np.linalg.norm(off) <= _NOISE * np.linalg.norm(wanted), name
        else:
            assert (off <= 2.0**-8 * np.abs(wanted) + 1e-6 * np.abs(added[name]).max()).all(), name
    assert untouched or combination.way == "16 bits"
