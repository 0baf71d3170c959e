# SPDX-License-Identifier: Apache-2.0
"""gguf.safetensors: blocks that llama.cpp's reference quantisers made of the same values, and what they stand for.

Run with llama-cpp-python, gguf and safetensors: ``python make_gguf.py``, or with ``--check`` to compare.

``X.blocks`` are of ``quantize_row_X_ref`` (libggml-base of llama-cpp-python), of types without one random bytes with scales
that are finite. ``X.decoded`` are of ``gguf.quants``; of Q8_K, which it lacks, of ``dequantize_row_q8_K``.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.metadata import version
from pathlib import Path

import gguf.quants
import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).with_name("gguf.safetensors")
LIBRARY = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))

QUANTISED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0"),
)
RANDOM = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


def values() -> np.ndarray:
    """Normal numbers; of the second row some groups are zero, positive, tiny, constant, or have an outlier."""
    made = np.random.default_rng(17).standard_normal((4, 256), np.float32) * np.float32(0.03)
    made[1, :32] = 0
    made[1, 32:64] = abs(made[1, 32:64])
    made[1, 64:96] *= 1e-5
    made[1, 96:112] = 0.25
    made[1, 130] = -3
    made[2] *= 40
    return made


def quantised(name: str, weight: np.ndarray) -> np.ndarray:
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    quantise = getattr(LIBRARY, f"quantize_row_{_function(name)}_ref")
    quantise.argtypes, quantise.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    blocks = np.zeros((len(weight), weight.shape[1] // block * nbytes), np.uint8)
    for row, out in zip(weight, blocks, strict=True):
        quantise(np.ascontiguousarray(row).ctypes.data, out.ctypes.data, row.size)
    if name == "IQ4_NL":  # the codes of a group of zeros are what was on the stack before
        groups = blocks.reshape(-1, nbytes)
        groups[(groups[:, :2] == 0).all(axis=1)] = 0
    return blocks


def decoded(name: str, blocks: np.ndarray) -> np.ndarray:
    if name != "Q8_K":
        return gguf.quants.dequantize(blocks, GGMLQuantizationType[name])
    out = np.zeros((len(blocks), 256), np.float32)
    LIBRARY.dequantize_row_q8_K.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    for row, into in zip(blocks, out, strict=True):
        LIBRARY.dequantize_row_q8_K(np.ascontiguousarray(row).ctypes.data, into.ctypes.data, 256)
    return out


def random(name: str) -> np.ndarray:
    draw = np.random.default_rng(list(name.encode()))
    _, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    while True:
        blocks = draw.integers(0, 256, (2, nbytes)).astype(np.uint8)
        with np.errstate(all="ignore"):
            if np.isfinite(decoded(name, blocks)).all():
                return blocks


def _function(name: str) -> str:
    return name.lower() if not name.endswith("_K") else f"{name[:-1].lower()}K"


def main() -> None:
    weight = values()
    blocks = {name: quantised(name, weight) for name in QUANTISED} | {name: random(name) for name in RANDOM}
    tensors = {"values": weight}
    for name, each in blocks.items():
        tensors |= {f"{name}.blocks": each, f"{name}.decoded": decoded(name, each)}
    versions = {package: version(package) for package in ("gguf", "llama-cpp-python", "numpy")}
    if "--check" in sys.argv:
        stored = load_file(GOLDEN)
        assert stored.keys() == tensors.keys()
        assert all(np.array_equal(stored[name], tensor) for name, tensor in tensors.items()), "differs"
    else:
        save_file(tensors, GOLDEN, versions)


if __name__ == "__main__":
    main()
