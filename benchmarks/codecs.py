# SPDX-License-Identifier: Apache-2.0
"""Nanoseconds per element to read, to round to and to put quantised weights, on one thread: `python benchmarks/codecs.py [CODEC ...]`.

A codec joins by a line in `CODECS`: the stored tensors of a weight of random codes, and the values that its format
defines for them. Before anything is timed, what is read is compared with these, and what is put with the stored bytes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from surgery_formats.arrays import Array
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.storage.base import read_block
from surgery_formats.storage.bitsandbytes.four_bit import levels_of
from surgery_formats.storage.packing import pack
from surgery_formats.storage.quantised import is_quantised
from surgery_formats.storage.registry import claimed_weights

ROWS, COLUMNS, HEIGHT = 2048, 4096, 256
RANDOM = np.random.default_rng(0)
Made = tuple[dict[str, Array], Array]


def four_bit(kind: str, *, nested: bool = False, columns: int = COLUMNS) -> Made:
    levels, count = levels_of(kind).values, ROWS * columns
    packed = RANDOM.integers(0, 256, (count // 2, 1), np.uint8)
    state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [ROWS, columns]}
    stored = {"w.weight": packed, "w.weight.quant_map": levels}
    scales = RANDOM.random(count // 64, np.float32) + np.float32(0.1)
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
        stored["w.weight.nested_quant_map"] = table = np.linspace(-1, 1, 256, dtype=np.float32)
        stored["w.weight.nested_absmax"] = second = RANDOM.random(count // 64 // 256, np.float32) * np.float32(0.4)
        codes = RANDOM.integers(0, 256, count // 64, np.uint8)
        scales, stored["w.weight.absmax"] = table[codes] * np.repeat(second, 256) + np.float32(0.5), codes
    else:
        stored["w.weight.absmax"] = scales
    stored[f"w.weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    values = levels[np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, 64)] * scales[:, None]
    return stored, values.reshape(ROWS, columns)


def int8() -> Made:
    codes = RANDOM.integers(-127, 128, (ROWS, COLUMNS)).astype(np.int8)
    scales = RANDOM.random(ROWS, np.float32) + np.float32(0.1)
    return {"w.weight": codes, "w.SCB": scales}, codes * scales[:, None] * np.float32(1 / 127)


def hqq4() -> Made:
    packed = RANDOM.integers(0, 256, (ROWS * COLUMNS // 128, 64), np.uint8)
    scale, zero = (RANDOM.random((2 * len(packed), 1), np.float32) + np.float32(k) for k in (0.1, 7))
    numbers = {"nbits": 4, "group_size": 64, "axis": 1}
    stored = {f"w.{name}": np.array(number, np.int32) for name, number in numbers.items()}
    stored |= {"w.shape": np.array([ROWS, COLUMNS]), "w.packing": np.frombuffer(b"4bit_u8", np.uint8)}
    values = (np.concatenate([packed >> 4, packed & 15]) - zero) * scale
    return {**stored, "w.W_q": packed, "w.scale": scale, "w.zero": zero}, values.reshape(ROWS, COLUMNS)


def groups(inputs: int, outputs: int) -> tuple[Array, Array, Array]:
    """Codes of 4 bits, scales and zero points of 128 inputs, all ``(in, out)``."""
    codes = RANDOM.integers(0, 16, (inputs, outputs)).astype(np.uint8)
    scales = RANDOM.random((inputs // 128, outputs), np.float32).astype(np.float16)
    return codes, scales, RANDOM.integers(1, 16, scales.shape)


def by_group(codes: Array, scales: Array, zeros: Array) -> Array:
    pieces = codes.reshape(len(scales), -1, codes.shape[1]) - zeros[:, None].astype(np.float32)
    return (pieces * scales[:, None].astype(np.float32)).reshape(codes.shape)


def gptq4(*, act: bool = False) -> Made:
    codes, scales, zeros = groups(ROWS, COLUMNS)
    stored = {"w.qweight": pack(codes, 4, 0).view(np.int32), "w.qzeros": pack(zeros - 1, 4).view(np.int32)}
    if not act:
        return {**stored, "w.scales": scales}, by_group(codes, scales, zeros)
    index = RANDOM.permutation(np.arange(ROWS, dtype=np.int32) // 128)
    values = (codes - zeros[index].astype(np.float32)) * scales[index].astype(np.float32)
    return {**stored, "w.scales": scales, "w.g_idx": index}, values


def awq4() -> Made:
    codes, scales, zeros = groups(ROWS, COLUMNS)
    words = (pack(each, 4, order=(0, 2, 4, 6, 1, 3, 5, 7)).view(np.int32) for each in (codes, zeros))
    return {"w.qweight": next(words), "w.qzeros": next(words), "w.scales": scales}, by_group(codes, scales, zeros)


def mlx(bits: int) -> Made:
    codes = RANDOM.integers(0, 1 << bits, (ROWS, COLUMNS)).astype(np.uint8)
    scales, biases = (RANDOM.random((ROWS, COLUMNS // 64), np.float32).astype(np.float16) for _ in range(2))
    pieces = codes.reshape(ROWS, -1, 64) * scales[..., None].astype(np.float32) + biases[..., None].astype(np.float32)
    return {"w.weight": pack(codes, bits), "w.scales": scales, "w.biases": biases}, pieces.reshape(codes.shape)


def fp8(rows: int, columns: int, dtype: str = "float8_e4m3fn") -> Made:
    """With a scale for blocks of so many rows and columns."""
    codes = RANDOM.integers(0, 120, (ROWS, COLUMNS)).astype(np.uint8)
    codes |= RANDOM.integers(0, 2, codes.shape).astype(np.uint8) << 7
    scales = RANDOM.random((ROWS // rows, COLUMNS // columns), np.float32) + np.float32(0.1)
    numbers = codes.view(getattr(ml_dtypes, dtype))
    pieces = numbers.astype(np.float32).reshape(len(scales), rows, -1, columns) * scales[:, None, :, None]
    return {"w.weight": numbers, "w.weight_scale_inv": scales}, pieces.reshape(codes.shape)


def fp4(group: int, scales: Array, stored: dict[str, Array]) -> Made:
    codes = RANDOM.integers(0, 16, (ROWS, COLUMNS)).astype(np.uint8)
    numbers = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32).reshape(ROWS, -1, group)
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    return {"w.weight": packed, **stored}, (numbers * scales[..., None]).reshape(codes.shape)


def nvfp4() -> Made:
    scales = (RANDOM.random((ROWS, COLUMNS // 16), np.float32) * 400 + 1).astype(ml_dtypes.float8_e4m3fn)
    overall = np.float32(1e-5)
    return fp4(
        16, scales.astype(np.float32) * overall, {"w.weight_scale": scales, "w.weight_scale_2": np.array(overall)}
    )


def mxfp4() -> Made:
    exponents = RANDOM.integers(110, 130, (ROWS, COLUMNS // 32)).astype(np.uint8)
    return fp4(32, exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), {"w.weight_scale": exponents})


def integers(bits: int, *, zeros: bool = False) -> Made:
    """As compressed-tensors packs them, in groups of 128."""
    codes = RANDOM.integers(0, 1 << bits, (ROWS, COLUMNS)).astype(np.uint8)
    scales = (RANDOM.random((ROWS, COLUMNS // 128), np.float32) + np.float32(0.1)).astype(ml_dtypes.bfloat16)
    stored = {"w.weight_packed": pack(codes, bits).view(np.int32), "w.weight_scale": scales}
    stored["w.weight_shape"] = np.array([ROWS, COLUMNS])
    zero = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    if zeros:
        zero = RANDOM.integers(0, 1 << bits, scales.shape).astype(np.uint8)
        stored["w.weight_zero_point"] = pack(zero, bits, 0).view(np.int32)
    pieces = codes.reshape(ROWS, -1, 128) - zero[..., None].astype(np.float32)
    return stored, (pieces * scales.astype(np.float32)[..., None]).reshape(codes.shape)


CODECS: dict[str, Callable[[], Made]] = {
    "NF4": lambda: four_bit("nf4"),
    "NF4, nested scales": lambda: four_bit("nf4", nested=True),
    "NF4, blocks across rows": lambda: four_bit("nf4", columns=COLUMNS + 32),
    "FP4": lambda: four_bit("fp4"),
    "INT8": int8,
    "HQQ4": hqq4,
    "GPTQ4": gptq4,
    "GPTQ4, scattered groups": lambda: gptq4(act=True),
    "AWQ4": awq4,
    "MLX4": lambda: mlx(4),
    "MLX3": lambda: mlx(3),
    "FP8, blocks": lambda: fp8(128, 128),
    "FP8, rows": lambda: fp8(1, COLUMNS),
    "FP8, one scale": lambda: fp8(ROWS, COLUMNS),
    "FP8, E5M2": lambda: fp8(128, 128, "float8_e5m2"),
    "NVFP4": nvfp4,
    "MXFP4": mxfp4,
    "compressed-tensors INT4": lambda: integers(4),
    "compressed-tensors INT4, zeros": lambda: integers(4, zeros=True),
    "compressed-tensors INT3": lambda: integers(3),
}
GROUPS = {"bits": 4, "group_size": 128}
CONFIGS = {
    "GPTQ4": {"quantization_config": {**GROUPS, "quant_method": "gptq"}},
    "GPTQ4, scattered groups": {"quantization_config": {**GROUPS, "quant_method": "gptq", "desc_act": True}},
    "AWQ4": {"quantization_config": {**GROUPS, "quant_method": "awq"}},
    "MLX4": {"quantization": {"bits": 4, "group_size": 64}},
    "MLX3": {"quantization": {"bits": 3, "group_size": 64}},
}
"""config.json, of the formats that need one."""


def nanoseconds(work: Callable[[int], object], group: int, elements: int) -> float:
    """Per element, the best of five passes over all rows."""
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for start in range(0, ROWS, max(HEIGHT, group)):
            work(start)
        best = min(best, time.perf_counter() - begun)
    return best / elements * 1e9


def measure(name: str, folder: Path) -> str:
    stored, values = CODECS[name]()
    save_file(stored, folder / "weights.safetensors")
    tensors = {tensor.name: tensor for tensor in open_safetensors(folder / "weights.safetensors").tensors}
    weight = next(iter(claimed_weights(tensors, CONFIGS.get(name, {})).values()))
    assert is_quantised(weight)
    height, block = max(HEIGHT, weight.group), np.empty_like(values)
    assert np.array_equal(read_block(weight, 0, ROWS), values)
    for start in range(0, ROWS, height):
        for piece in weight.put(start, values[start : start + height], block[start : start + height]):
            raw = weight.sources[piece.part]
            assert bytes(piece.data) == bytes(raw.file.read(raw.offset + piece.offset, len(piece.data))), raw.name
    assert np.array_equal(block, values)
    grids = {start: weight.grid(start, start + height) for start in range(0, ROWS, height)}
    works: list[Callable[[int], object]] = [
        lambda start: weight.read_into(block[start : start + height], start),
        lambda start: grids[start].nearest(values[start : start + height]),
        lambda start: weight.put(start, values[start : start + height], block[start : start + height]),
    ]
    read, nearest, put = (nanoseconds(work, height, values.size) for work in works)
    return f"{name:32} {read:6.2f} {nearest:8.2f} {put:6.2f}"


if __name__ == "__main__":
    print(f"{'ns per element':32} {'read':>6} {'nearest':>8} {'put':>6}")
    for chosen in sys.argv[1:] or CODECS:
        with tempfile.TemporaryDirectory() as made:
            print(measure(chosen, Path(made)))
