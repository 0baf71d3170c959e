# SPDX-License-Identifier: Apache-2.0
"""Compact folders that are damaged or lie are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery import convert
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import SurgeryError
from tests.support.adapter_files import Arrays, draw, write_peft

Q = "base_model.model.model.layers.0.self_attn.q_proj"
SITE = "model.layers.0.self_attn.q_proj.weight"


def _folder(tmp_path: Path, factors: str = "int4") -> Path:
    stem = "base_model.model.model.layers.0.mlp.down_proj"
    tensors = {f"{stem}.lora_A.weight": draw(1, 3, 8), f"{stem}.lora_B.weight": draw(2, 6, 3)}
    tensors |= {f"{Q}.lora_A.weight": draw(3, 1, 5), f"{Q}.lora_B.weight": draw(4, 5, 1)}  # an odd number of codes
    source = write_peft(tmp_path / "a", tensors, r=3, rank_pattern={"q_proj": 1})
    convert(source, "compact", output=tmp_path / "c", factors=factors)
    return tmp_path / "c"


def _edit_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / "compact.json").read_text())
    change(raw)
    (folder / "compact.json").write_text(json.dumps(raw))


def _edit_tensors(folder: Path, change: Callable[[Arrays], object]) -> None:
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    tensors = load(folder / "adapter.safetensors")
    change(tensors)  # type: ignore[arg-type]
    save({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter.safetensors")


CODES, SCALES = f"{SITE}.lora_A.codes", f"{SITE}.lora_A.scales"
_JSON: dict[str, tuple[Callable[[dict[str, Any]], object], int, str]] = {
    "version": (lambda c: c.update(version=2), 4, "version 2"),
    "version-text": (lambda c: c.update(version="1"), 3, "int was expected"),
    "format": (lambda c: c.update(format="surgery-compact-2"), 3, "not surgery-compact"),
    "factors": (lambda c: c.update(factors="int2"), 4, "int2"),
    "group": (lambda c: c.update(group=0), 3, "not a size"),
    "group-other": (lambda c: c.update(group=3), 3, "instead of BF16"),
    "twice": (lambda c: c["parameters"].append(c["parameters"][0]), 3, "twice"),
    "unknown-kind": (lambda c: c["parameters"][0]["updates"][0].update(kind="LoHa"), 4, "LoHa"),
    "left-over": (lambda c: c["parameters"].pop(), 3, "have no use"),
    "no-update": (lambda c: c["parameters"][0].update(updates=[]), 3, "without an update"),
    "rank": (lambda c: c["parameters"][0]["updates"][0].update(rank=True), 3, "'rank'"),
    "rank-huge": (lambda c: c["parameters"][0]["updates"][0].update(rank=2**30), 3, "instead of U8"),
    "experts-huge": (
        lambda c: c["parameters"][0]["updates"][0].update(experts=2**30, either_way=False), 3, "instead of U8",
    ),
    "shape": (lambda c: c["parameters"][0]["updates"][0].update(shape=[6]), 3, "of shape"),
    "scale": (lambda c: c["parameters"][0]["updates"][0].update(scale="2"), 3, "not a number"),
    "scale-nan": (lambda c: c["parameters"][0]["updates"][0].update(scale=float("nan")), 3, "NaN"),
    "path": (lambda c: c["parameters"][0].update(path=3), 3, "str was expected"),
    "modules": (lambda c: c.update(new_modules=[1]), 3, "new_modules"),
    "parameters": (lambda c: c.update(parameters={}), 3, "list was expected"),
}  # fmt: skip


@pytest.mark.parametrize("fault", _JSON)
def test_a_faulty_description_is_refused_with_its_file(tmp_path: Path, fault: str) -> None:
    change, code, words = _JSON[fault]
    folder = _folder(tmp_path)
    _edit_json(folder, change)
    with pytest.raises(SurgeryError, match=words) as caught:
        read_adapter(folder)
    assert caught.value.exit_code == code
    assert caught.value.file is not None


def _set(key: str, at: tuple[int, ...], value: float) -> Callable[[Arrays], object]:
    return lambda t: t[key].__setitem__(at, value)


_TENSORS: dict[str, tuple[str, Callable[[Arrays], object], int, str]] = {
    "codes-shape": ("int4", lambda t: t.update({CODES: t[CODES][:, :2]}), 3, "instead of U8"),
    "codes-type": ("int8", lambda t: t.update({CODES: t[CODES].float()}), 3, "instead of I8"),
    "scales-shape": ("int4", lambda t: t.update({SCALES: t[SCALES].repeat(1, 2)}), 3, "instead of BF16"),
    "scales-type": ("int4", lambda t: t.update({SCALES: t[SCALES].float()}), 3, "instead of BF16"),
    "missing": ("int4", lambda t: t.pop(SCALES), 3, "no tensor"),
    "stranger": ("int4", lambda t: t.update(x=t[SCALES].clone()), 3, "have no use"),
    "nan-scale": ("int8", _set(SCALES, (0, 0), float("nan")), 4, "NaN or Inf"),
    "inf-scale": ("int4", _set(SCALES, (0, 0), float("inf")), 4, "NaN or Inf"),
    "padding": ("int4", _set(CODES, (0, 2), 0x17), 3, "behind its last code"),
    "code": ("int4", _set(CODES, (0, 0), 0x18), 3, "a code below -7"),
    "code8": ("int8", _set(CODES, (0, 0, 0), -128), 3, "a code below -127"),
}


@pytest.mark.parametrize("fault", _TENSORS)
def test_tensors_that_do_not_fit(tmp_path: Path, fault: str) -> None:
    factors, change, code, words = _TENSORS[fault]
    folder = _folder(tmp_path, factors)
    _edit_tensors(folder, change)
    with pytest.raises(SurgeryError, match=words) as caught:
        convert(folder, "peft", output=tmp_path / "out")
    assert caught.value.exit_code == code
    assert caught.value.tensor or "no tensor" in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    whole = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(whole[:-1])
    with pytest.raises(SurgeryError) as caught:
        read_adapter(folder)
    assert caught.value.exit_code == 3
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(SurgeryError, match=r"no adapter\.safetensors"):
        read_adapter(folder)


def test_other_folders_are_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "compact.json").write_text('{"format": "another"}')
    save_file({"x": np.zeros(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(SurgeryError, match="not an adapter of a known format"):
        read_adapter(tmp_path)
