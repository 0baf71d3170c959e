# SPDX-License-Identifier: Apache-2.0
"""A file that is scaled, resized or split without a base keeps its keys, their order, its types and its strings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from surgery import combine, diff, merge, resize
from surgery_formats.adapters.hashes import HASHES
from surgery_formats.adapters.registry import read_adapter
from tests.support.adapter_files import GOLDEN

FILES = (
    "kohya/sd1/lora",
    "kohya/sd1/lora-fp16",
    "kohya/sd1/lora-noalpha",
    "kohya/sdxl/sgm-names",
    "lycoris/locon",
    "dotted/diffusers",
    "dotted/diffusers-lora-down",
    "dotted/diffusers-processors",
    "dotted/lightx2v",
    "dotted/lightning",
    "dotted/diffsynth",
    "flux/xlabs",
    "flux/fal",
)
STATED = {"ss_network_dim", "ss_network_alpha", "lora_adapter_metadata", *HASHES}  # what has to follow


def _header(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    strings = header.pop("__metadata__", {})
    return {name: entry["dtype"] for name, entry in header.items()}, strings


def _same_but_numbers(source: Path, written: Path, *, computed: bool = False) -> None:
    (mine, strings), (theirs, kept) = _header(source), _header(written)
    assert list(theirs) == [name for name in mine if name in theirs]
    assert computed or theirs.items() <= mine.items()
    assert {key: kept.get(key) for key in strings.keys() - STATED} == {k: strings[k] for k in strings.keys() - STATED}
    assert kept.keys() == strings.keys()


@pytest.mark.parametrize("name", FILES)
def test_it_is_scaled(name: str, tmp_path: Path) -> None:
    source, half = GOLDEN / name / "adapter.safetensors", tmp_path / "half.safetensors"
    combine({source: 0.5}, output=half)
    _same_but_numbers(source, half, computed=name.startswith("dotted"))  # without alphas, factors are multiplied
    assert load_file(half).keys() == load_file(source).keys()
    assert diff(source, half).difference == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("name", FILES)
def test_it_is_resized(name: str, tmp_path: Path) -> None:
    source, small = GOLDEN / name / "adapter.safetensors", tmp_path / "small.safetensors"
    resize(source, rank=1, output=small)
    mine, theirs = (_header(file)[0] for file in (source, small))
    assert mine.keys() == theirs.keys()
    if "fp16" not in name:
        _same_but_numbers(source, small)
    resize(source, rank=1, output=tmp_path / "half.safetensors", dtype="fp16")
    assert {dtype for key, dtype in _header(tmp_path / "half.safetensors")[0].items() if "alpha" not in key} == {"F16"}


@pytest.mark.parametrize("name", FILES)
def test_it_is_split(name: str, tmp_path: Path) -> None:
    source = GOLDEN / name / "adapter.safetensors"
    modules = sorted({str(site).rpartition(".")[0] for site in read_adapter(source).updates})
    half = modules[: len(modules) // 2]
    patterns = [f"{module.rpartition(':')[2]}*" for module in half]
    combine([source], only=patterns, output=tmp_path / "one.safetensors")
    combine([source], without=patterns, output=tmp_path / "other.safetensors")
    one, other, whole = (
        load_file(file) for file in (tmp_path / "one.safetensors", tmp_path / "other.safetensors", source)
    )
    assert one.keys() | other.keys() == whole.keys()
    assert not one.keys() & other.keys()
    for file, tensors in ((tmp_path / "one.safetensors", one), (tmp_path / "other.safetensors", other)):
        _same_but_numbers(source, file)
        assert all(value.tobytes() == whole[key].tobytes() for key, value in tensors.items())


def test_a_scale_that_only_the_header_states_is_not_taken_twice(tmp_path: Path) -> None:
    """``ss_network_alpha`` of a file without alphas: what is scaled is in the factors, and the header says what it said."""
    source, half = GOLDEN / "kohya/sd1/lora-noalpha/adapter.safetensors", tmp_path / "half.safetensors"
    base = GOLDEN / "kohya/sd1/base"
    combine({source: 0.5}, output=half)
    assert _header(half)[1]["ss_network_alpha"] == _header(source)[1]["ss_network_alpha"]
    merge(base, {source: 0.5}, output=tmp_path / "a")
    merge(base, half, output=tmp_path / "b")
    for file in sorted((tmp_path / "a").rglob("*.safetensors")):
        mine, theirs = load_file(file), load_file(tmp_path / "b" / file.relative_to(tmp_path / "a"))
        assert all(abs(mine[key] - theirs[key]).max() <= 1e-6 for key in mine)
