# SPDX-License-Identifier: Apache-2.0
"""What every storage must do: checks for a test suite, each of which raises AssertionError.

@pytest.mark.parametrize("check", STORAGE_CHECKS, ids=lambda check: check.__name__)
def test_the_storage_conforms(check, tmp_path):
    check(StorageCase(MINE.claim, encode, torch.randn(64, 32)), tmp_path)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from surgery_formats.containers.safetensors import layout, open_safetensors
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import Storage, StoredPart, read_block, read_rows
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

__all__ = ["STORAGE_CHECKS", "StorageCase"]

_NAME = "block.0.linear.weight"

Claim = Callable[[Mapping[str, StoredTensor], Mapping[str, Any]], Iterable[Storage]]


@dataclass(frozen=True, slots=True)
class StorageCase:
    """A storage under test.

    Attributes:
        claim: `StorageKind.claim`.
        encode: ``encode(name, values)`` returns the stored tensors of a weight as the original program makes them.
        values: Of a weight, float32, with more rows than one group.
        config: config.json of a network with such weights.
        tolerance: How far a value that is read may be from the one that was encoded, relative to the greatest value.
    """

    claim: Claim
    encode: Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]
    values: torch.Tensor
    config: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0


def claims_all_tensors_of_its_weights(case: StorageCase, folder: Path) -> None:
    """Every stored tensor belongs to one weight, which has the name and the sizes that the model's code gives it."""
    names = (_NAME, "block.1.linear.weight")
    stored = _stored(folder, {key: value for name in names for key, value in case.encode(name, case.values).items()})
    weights = list(case.claim(stored, case.config))
    assert sorted(weight.name for weight in weights) == sorted(names)
    claimed = [source for weight in weights for source in weight.sources]
    assert sorted(source.name for source in claimed) == sorted(stored)
    assert all(source is stored[source.name] for source in claimed)
    for weight in weights:
        assert weight.sizes == tuple(case.values.shape)
        assert weight.shape[0] * weight.shape[1] == case.values.numel()


def writes_the_tensors_it_reads(case: StorageCase, folder: Path) -> None:
    """`parts` are the sources: names, types and shapes, in order; under another name the same types and shapes."""
    weight = _weight(case, folder)
    own = [StoredPart(source.name, source.dtype, source.shape) for source in weight.sources]
    assert list(weight.parts(weight.name)) == own
    renamed = weight.parts("other.weight")
    assert [(part.dtype, part.shape) for part in renamed] == [(part.dtype, part.shape) for part in own]
    assert len({part.name for part in (*renamed, *own)}) == 2 * len(own)


def reads_what_was_encoded(case: StorageCase, folder: Path) -> None:
    """The values are those that were encoded, as far as the storage can hold them."""
    values = read_rows(_weight(case, folder)).double()
    encoded = case.values.double()
    assert values.shape == encoded.shape
    assert float((values - encoded).abs().max()) <= case.tolerance * float(encoded.abs().max())


def reads_any_rows(case: StorageCase, folder: Path) -> None:
    """Any range of rows is that range of the whole."""
    weight = _weight(case, folder)
    rows = weight.shape[0]
    whole = read_block(weight, 0, rows)
    for start in range(rows + 1):
        for stop in {start, start + 1, (start + rows) // 2, rows}:
            assert read_block(weight, start, stop).equal(whole[start:stop]), (start, stop)


def puts_back_the_bytes_it_read(case: StorageCase, folder: Path) -> None:
    """Values that did not change become the bytes that were there."""
    weight = _weight(case, folder)
    written, _ = _put(weight, read_block(weight, 0, weight.shape[0]).float(), [weight.shape[0]])
    for source, raw in zip(weight.sources, written, strict=True):
        assert raw == source.file.read(source.offset, source.nbytes), source.name


def puts_the_same_bytes_in_any_split(case: StorageCase, folder: Path) -> None:
    """Blocks of any height that `group` allows give every byte of the whole once, and are not written to."""
    weight = _weight(case, folder)
    values = _changed(weight)
    whole, rounded = _put(weight, values, [weight.shape[0]])
    for height in range(weight.group, weight.shape[0] + 1, weight.group):
        parts, same = _put(weight, values, _heights(weight.shape[0], height))
        assert parts == whole, height
        assert same.equal(rounded), height


def says_what_readers_will_get(case: StorageCase, folder: Path) -> None:
    """`rounded` is what is read from the bytes that were put."""
    weight = _weight(case, folder)
    parts = weight.parts(weight.name)
    written, rounded = _put(weight, _changed(weight), [weight.shape[0]])
    header, ranges = layout([(part.name, part.dtype, part.shape) for part in parts], {})
    data = bytearray(header) + bytearray(sum(size for _, size in ranges.values()))
    for part, raw in zip(parts, written, strict=True):
        offset, size = ranges[part.name]
        data[offset : offset + size] = raw
    path = folder / "again.safetensors"
    path.write_bytes(data)
    tensors = {tensor.name: tensor for tensor in open_safetensors(path).tensors}
    (again,) = case.claim(tensors, case.config)
    assert read_block(again, 0, again.shape[0]).equal(rounded)


def refuses_rows_that_cannot_be_put_alone(case: StorageCase, folder: Path) -> None:
    """Blocks that begin or end within a group raise ValueError."""
    weight = _weight(case, folder)
    values = _changed(weight)
    for start, stop in ((1, weight.group + 1), (0, weight.group + 1)) if weight.group > 1 else ():
        try:
            _put_block(weight, values, start, stop)
        except ValueError:
            continue
        raise AssertionError(f"rows {start} to {stop} were put, in groups of {weight.group}")


def leaves_other_weights_alone(case: StorageCase, folder: Path) -> None:
    """Tensors of other storages are not claimed, whatever stands beside them."""
    if set(case.encode(_NAME, case.values)) == {_NAME}:
        return  # the storage of single tensors, which has whatever nothing else claims
    others = {"block.0.linear.bias": torch.zeros(4), "embed.weight": torch.zeros(4, 4), "ids": torch.arange(3)}
    assert list(case.claim(_stored(folder, others), case.config)) == []
    claimed = list(case.claim(_stored(folder, {**others, **case.encode(_NAME, case.values)}), case.config))
    assert [weight.name for weight in claimed] == [_NAME]


def refuses_a_weight_of_which_a_tensor_is_missing(case: StorageCase, folder: Path) -> None:
    """A weight without one of its tensors is malformed, or no weight of this storage; it is never read."""
    encoded = case.encode(_NAME, case.values)
    for missing in encoded if len(encoded) > 1 else ():
        rest = _stored(folder, {name: tensor for name, tensor in encoded.items() if name != missing})
        try:
            assert list(case.claim(rest, case.config)) == [], missing
        except MalformedError:
            continue


STORAGE_CHECKS: tuple[Callable[[StorageCase, Path], None], ...] = (
    claims_all_tensors_of_its_weights,
    writes_the_tensors_it_reads,
    reads_what_was_encoded,
    reads_any_rows,
    puts_back_the_bytes_it_read,
    puts_the_same_bytes_in_any_split,
    says_what_readers_will_get,
    refuses_rows_that_cannot_be_put_alone,
    leaves_other_weights_alone,
    refuses_a_weight_of_which_a_tensor_is_missing,
)
"""Each takes a case and an empty folder, and raises AssertionError."""


def _stored(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    path = folder / "weights.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return {tensor.name: tensor for tensor in open_safetensors(path).tensors}


def _weight(case: StorageCase, folder: Path) -> Storage:
    (weight,) = case.claim(_stored(folder, case.encode(_NAME, case.values)), case.config)
    return weight


def _changed(weight: Storage) -> torch.Tensor:
    """Other values of the same size, as an update leaves them."""
    values = read_block(weight, 0, weight.shape[0]).float()
    return values * 0.75 + values.flip(0) * 0.5


def _heights(rows: int, height: int) -> Iterator[int]:
    for start in range(0, rows, height):
        yield min(height, rows - start)


def _put(weight: Storage, values: torch.Tensor, heights: Iterable[int]) -> tuple[list[bytearray], torch.Tensor]:
    """The bytes of every part, and the values they stand for; no byte may be put twice or left out."""
    parts = weight.parts(weight.name)
    data = [bytearray(part.nbytes) for part in parts]
    reached = [0 for _ in parts]
    rounded = torch.empty(weight.shape, dtype=weight.dtype.torch)
    start = 0
    for height in heights:
        before = bytes(as_bytes(values))
        encoded, block = _put_block(weight, values, start, start + height)
        for part, offset, raw in encoded:
            assert offset == reached[part], "bytes that are put twice, out of order, or not at all"
            data[part][offset : offset + len(raw)] = raw
            reached[part] += len(raw)
        rounded[start : start + height] = block
        assert bytes(as_bytes(values)) == before, "the block was written to"
        start += height
    assert reached == [part.nbytes for part in parts], "bytes that are not put at all"
    return data, rounded


def _put_block(
    weight: Storage, values: torch.Tensor, start: int, stop: int
) -> tuple[list[tuple[int, int, bytes]], torch.Tensor]:
    block = values[start:stop].contiguous()
    rounded = torch.empty(block.shape, dtype=weight.dtype.torch)
    encoded = [(piece.part, piece.offset, bytes(piece.data)) for piece in weight.put(start, block, rounded)]
    return encoded, rounded
