# SPDX-License-Identifier: Apache-2.0
"""Golden files of codecs: cases as `tests/storage/golden/golden_cases.py` writes them, and what every codec does with one."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgery_formats.arrays import Array
from surgery_formats.containers.safetensors import layout, open_safetensors
from surgery_formats.errors import SurgeryError
from surgery_formats.storage.base import Storage, StorageKind, read_block, read_rows
from surgery_formats.storage.quantised import is_quantised
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.storage import StorageCase

__all__ = ["GoldenCase", "broken", "check_values", "conformance_case", "golden_cases", "survives_any_bytes"]


@dataclass(frozen=True)
class GoldenCase:
    """Weights of one model: stored tensors, what they stand for, and config.json."""

    tensors: Mapping[str, StoredTensor]
    decoded: Mapping[str, StoredTensor]
    config: Mapping[str, Any]

    def claimed(self, kind: StorageKind) -> dict[str, Storage]:
        return {weight.name: weight for weight in kind.claim(self.tensors, self.config)}


def golden_cases(path: Path) -> dict[str, GoldenCase]:
    file = open_safetensors(path)
    configs = json.loads(file.metadata["configs"])
    cases = {name: GoldenCase({}, {}, {"quantization_config": told} if told else {}) for name, told in configs.items()}
    for tensor in file.tensors:
        case, part, name = tensor.name.split("|")
        dict.__setitem__(getattr(cases[case], part), name, replace(tensor, name=name))
    return cases


def check_values(case: GoldenCase, kind: StorageKind) -> None:
    """Every decoded weight is claimed and has its values to the bit, or to one rounding; also any of its rows."""
    weights = case.claimed(kind)
    assert weights.keys() == case.decoded.keys()
    owned = [source.name for weight in weights.values() for source in weight.sources]
    assert sorted(owned) == sorted(case.tensors), "a tensor that nothing accounts for"
    for name, weight in weights.items():
        wanted = case.decoded[name].read()
        assert weight.sizes == wanted.shape
        assert np.array_equal(read_rows(weight).astype(wanted.dtype), wanted), name
        rows = weight.shape[0]
        whole = read_block(weight, 0, rows)
        for start in range(0, rows, 3):
            for stop in {start + 1, (start + rows + 1) // 2, rows}:
                assert np.array_equal(read_block(weight, start, stop), whole[start:stop]), (name, start, stop)


def conformance_case(case: GoldenCase, kind: StorageKind, parts: tuple[str, ...], **config: Any) -> StorageCase:
    """A weight ``layer.weight`` for `QUANTISED_CHECKS`; of its tensors only ``layer.`` with one of `parts`."""
    stored = {part: case.tensors[f"layer.{part}"].read() for part in parts}
    values = read_rows(case.claimed(kind)["layer.weight"])

    def encode(name: str, _: Array) -> dict[str, Array]:
        return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in stored.items()}

    return StorageCase(kind.claim, encode, values, {**case.config, **config})


def broken(case: GoldenCase, folder: Path, **changed: Array | None) -> dict[str, StoredTensor]:
    """The tensors with those named ``layer.PART`` in place of their own, or left out."""
    stored = {name: tensor.read() for name, tensor in case.tensors.items()}
    stored |= {f"layer.{part}": value for part, value in changed.items() if value is not None}
    for part in (part for part, value in changed.items() if value is None):
        del stored[f"layer.{part}"]
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(tensor) for name, tensor in stored.items()}, folder / "broken.safetensors")
    return {tensor.name: tensor for tensor in open_safetensors(folder / "broken.safetensors").tensors}


def survives_any_bytes(case: GoldenCase, kind: StorageKind, folder: Path, rounds: int) -> None:
    """Values, types and shapes changed at random: what comes out is numbers or a `SurgeryError`, and each of them some times."""
    chance, read = random.Random(0), 0
    for _ in range(rounds):
        changed = dict(case.tensors)
        for name in chance.sample(sorted(changed), k=min(2, len(changed))):
            changed[name] = _mutated(changed[name], chance, folder)
        try:
            for weight in kind.claim(changed, case.config):
                values = read_block(weight, 0, weight.shape[0])
                assert values.shape == weight.shape
                finite = np.nan_to_num(values, nan=0, posinf=1, neginf=-1)
                weight.put(0, finite, np.empty_like(values))
                if is_quantised(weight) and (grid := weight.fit(0, finite)) is not None:
                    weight.pack(0, grid.nearest(finite), grid)
            read += 1
        except SurgeryError:
            continue
    assert 0 < read < rounds


def _mutated(tensor: StoredTensor, chance: random.Random, folder: Path) -> StoredTensor:
    raw = bytearray(tensor.file.read(tensor.offset, tensor.nbytes))
    dtype, shape = tensor.dtype, list(tensor.shape)
    way = chance.randrange(4)
    if way == 0 and raw:
        for _ in range(chance.randrange(1, 9)):
            raw[chance.randrange(len(raw))] = chance.choice((0, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    elif way == 1 and shape:
        axis = chance.randrange(len(shape))
        shape[axis] = chance.choice((0, 1, shape[axis] + 1, shape[axis] * 2, max(shape[axis] - 1, 0)))
    elif way == 2:
        dtype = chance.choice([each for each in type(dtype) if each.bits >= 8])
    else:
        shape = chance.choice(([], [1], [tensor.numel], shape[::-1], [1, *shape], [*shape, 1]))
    nbytes = dtype.nbytes(int(np.prod(shape, dtype=np.int64)))
    header, ranges = layout([("x", dtype, tuple(shape))], {})
    path = folder / "mutated.safetensors"
    path.unlink(missing_ok=True)  # the one before is still open
    path.write_bytes(header + bytes(raw[:nbytes]).ljust(ranges["x"][1], b"\x01"))
    (made,) = open_safetensors(path).tensors
    return replace(made, name=tensor.name)
