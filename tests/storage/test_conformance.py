# SPDX-License-Identifier: Apache-2.0
"""The storage of single tensors and a plugin's of two pass the suite that `surgery_formats.testing` offers, and faulty ones do not."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import surgery
from surgery.verbs.formats import StorageEntry
from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError, SurgeryError
from surgery_formats.storage.plain import Plain
from surgery_formats.storage.registry import BUILT_IN, claimed_weights, storage_kinds
from surgery_formats.tensors.computed import zeros
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.plugins import installed, installed_project
from surgery_formats.testing.storage import QUANTISED_CHECKS, STORAGE_CHECKS, StorageCase

TOY = Path(__file__).parents[1] / "plugins" / "toy_storage"
sys.path.insert(0, str(TOY))
from toy_storage import CODES, SCALES, TOY4, ToyWeight, quantised  # noqa: E402  # a package of its own

Check = Callable[[StorageCase, Path], None]
VALUES = np.random.default_rng(0).standard_normal((24, 32), np.float32)


def plain(dtype: DType, *shape: int) -> StorageCase:
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    stacked = len(shape) == 3

    def claim(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Plain]:
        return (Plain.of(tensor, stacked=stacked) for tensor in tensors.values())

    return StorageCase(claim, lambda name, values: {name: cast(values, dtype)}, values, tolerance=2.0**-8)


def toy(band: int) -> StorageCase:
    def encode(name: str, values: Array) -> dict[str, Array]:
        codes, scales, _ = quantised(values, len(values) // band, 2)
        return {name + CODES: codes, name + SCALES: scales}

    return StorageCase(TOY4.claim, encode, VALUES, tolerance=0.6 / 7)


CASES = {
    "float32": plain(DType.F32, 24, 32),
    "bfloat16": plain(DType.BF16, 24, 32),
    "bias": plain(DType.F32, 24),
    "convolution": plain(DType.F16, 8, 4, 3, 3),
    "experts": plain(DType.F32, 3, 4, 8),
    "toy": toy(1),
    "toy in bands of four rows": toy(4),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", STORAGE_CHECKS, ids=lambda check: check.__name__)
def test_the_storage_conforms(check: Check, case: StorageCase, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("band", [1, 4])
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_the_plugin_says_what_a_codec_says(check: Check, band: int, tmp_path: Path) -> None:
    check(toy(band), tmp_path)


@dataclass(frozen=True, slots=True)
class Faulty(ToyWeight):
    """A toy weight with one fault."""

    fault: str = ""

    def read_into(self, block: Array, start: int) -> None:
        ToyWeight.read_into(self, block, 0 if self.fault == "reads the first rows" else start)
        if self.fault == "reads larger values":
            block *= 1.5

    def put(self, start: int, block: Array, rounded: Array) -> Any:
        encoded = ToyWeight.put(self, start, block, rounded)
        if self.fault == "puts no scales":
            return encoded[:1]
        if self.fault == "puts all blocks at the front":
            return tuple(replace(one, offset=0) for one in encoded)
        if self.fault == "tells the exact values":
            rounded[...] = block
        if self.fault == "writes into the block":
            block[...] = 0
        return encoded


@dataclass(frozen=True, slots=True)
class Loose(ToyWeight):
    """A toy weight that puts any rows, whatever band they belong to."""

    def put(self, start: int, block: Array, rounded: Array) -> Any:
        rows = ToyWeight(self.name, self.packed, self.scales)
        whole = np.zeros((self.group, self.shape[1]), np.float32)
        whole[: len(block)] = block[: self.group]
        return rows.put(start // self.group * self.group, whole, np.empty_like(whole))


FAULTS = {
    "reads the first rows": "reads_any_rows",
    "reads larger values": "reads_what_was_encoded",
    "puts no scales": "puts_back_the_bytes_it_read",
    "puts all blocks at the front": "puts_the_same_bytes_in_any_split",
    "tells the exact values": "says_what_readers_will_get",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_storage_fails_the_check_that_is_meant_for_it(fault: str, tmp_path: Path) -> None:
    def claim(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Faulty]:
        return (Faulty(one.name, one.packed, one.scales, fault) for one in TOY4.claim(tensors, config))

    check = next(check for check in STORAGE_CHECKS if check.__name__ == FAULTS[fault])
    check(toy(4), tmp_path)
    with pytest.raises(AssertionError):
        check(replace(toy(4), claim=claim), tmp_path)


def test_a_storage_that_takes_half_a_band_fails(tmp_path: Path) -> None:
    def claim(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Loose]:
        return (Loose(one.name, one.packed, one.scales) for one in TOY4.claim(tensors, config))

    check = next(check for check in STORAGE_CHECKS if check.__name__ == "refuses_rows_that_cannot_be_put_alone")
    with pytest.raises(AssertionError, match="groups of 4"):
        check(replace(toy(4), claim=claim), tmp_path)


def test_a_plugin_is_found_while_it_is_installed() -> None:
    built_in = [kind.name for kind in BUILT_IN]
    assert list(storage_kinds()) == built_in
    with installed_project(TOY):
        assert list(storage_kinds()) == [*built_in, "toy4"]
        assert surgery.formats().storages[-1] == StorageEntry("toy4", TOY4.title, built_in=False)
        assert re.search(rf"toy4 +{re.escape(TOY4.title)} \(plugin\)", str(surgery.formats()))
    assert [entry.name for entry in surgery.formats().storages] == built_in
    with installed("surgery.storages", "thief", "toy_storage:nothing"), pytest.raises(SurgeryError, match="'thief'"):
        storage_kinds()


def test_a_tensor_that_two_weights_claim_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from surgery_formats.containers.safetensors import open_safetensors

    save_file(dict(toy(1).encode("w", VALUES)), tmp_path / "w.safetensors")
    tensors = {tensor.name: tensor for tensor in open_safetensors(tmp_path / "w.safetensors").tensors}

    @dataclass(frozen=True)
    class Other:
        name: str = "other"
        title: str = ""

        def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[ToyWeight]:
            return (replace(weight, name="another") for weight in TOY4.claim(tensors, config))

    with installed("surgery.storages", "a", TOY4):
        assert set(claimed_weights(tensors, {})) == {"w.toy_codes", "w.toy_scales"}
        with installed("surgery.storages", "b", Other()), pytest.raises(MalformedError, match="'another' and to 'w'"):
            claimed_weights(tensors, {})


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from surgery_formats.containers.safetensors import open_safetensors

    encoded = {**toy(1).encode("v", VALUES), **toy(1).encode("w", VALUES)}
    save_file(encoded, tmp_path / "w.safetensors")
    tensors = {tensor.name: tensor for tensor in open_safetensors(tmp_path / "w.safetensors").tensors}

    @dataclass(frozen=True)
    class SameName:
        name: str = "same"
        title: str = ""

        def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[ToyWeight]:
            return (replace(weight, name="w") for weight in TOY4.claim(tensors, config))

    with installed("surgery.storages", "same", SameName()), pytest.raises(MalformedError, match="'w' is claimed twice"):
        claimed_weights(tensors, {})


def test_a_weight_without_stored_tensors_is_refused() -> None:
    class Claimer:
        name, title = "empty", ""

        def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Plain]:
            yield Plain.of(zeros("w", DType.F32, (2, 2)))

    with installed("surgery.storages", "empty", Claimer()), pytest.raises(MalformedError, match="'empty' claims 'w'"):
        claimed_weights({}, {})


def test_a_weight_of_an_older_interface_is_refused_by_the_name_of_its_storage() -> None:
    class Claimer:
        name, title = "older", ""

        def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Any]:
            whole = Plain.of(zeros("w", DType.F32, (2, 2)))
            members = (name for name in dir(whole) if not name.startswith("_") and name != "elements")
            yield type("Older", (), {name: getattr(whole, name) for name in members})()

    with installed("surgery.storages", "older", Claimer()), pytest.raises(SurgeryError, match=r"'older'.*no elements"):
        claimed_weights({}, {})


def test_a_weight_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from surgery_formats.containers.safetensors import open_safetensors

    save_file({**toy(1).encode("w", VALUES), "w": VALUES}, tmp_path / "w.safetensors")
    tensors = {tensor.name: tensor for tensor in open_safetensors(tmp_path / "w.safetensors").tensors}
    with installed_project(TOY), pytest.raises(MalformedError, match="twice"):
        claimed_weights(tensors, {})
