# SPDX-License-Identifier: Apache-2.0
"""What every storage must do: checks for a test suite, each of which raises AssertionError.

@pytest.mark.parametrize("check", STORAGE_CHECKS, ids=lambda check: check.__name__)
def test_the_storage_conforms(check, tmp_path):
    check(StorageCase(MINE.claim, encode, values), tmp_path)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from surgery_formats.arrays import Array, cast, empty
from surgery_formats.containers.safetensors import layout, open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import PartBytes, Storage, StoredPart, read_block, read_rows
from surgery_formats.storage.quantised import Quantised, is_quantised
from surgery_formats.tensors.tensor import StoredTensor, as_bytes
from surgery_formats.testing.promise import promised

__all__ = ["QUANTISED_CHECKS", "STORAGE_CHECKS", "StorageCase"]

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
        metadata: Of the file that holds the tensors.
        tolerance: How far a value that is read may be from the one that was encoded, relative to the greatest value.
    """

    claim: Claim
    encode: Callable[[str, Array], Mapping[str, Array]]
    values: Array
    config: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0
    metadata: Mapping[str, str] = field(default_factory=dict)


def _name_of(case: StorageCase) -> str:
    """Of the storage whose `claim` it is."""
    return str(getattr(getattr(case.claim, "__self__", case.claim), "name", "") or case.claim)


def claims_all_tensors_of_its_weights(case: StorageCase, folder: Path) -> None:
    """Every stored tensor belongs to one weight, which has the name and the sizes that the model's code gives it."""
    names = (_NAME, "block.1.linear.weight")
    stored = _stored(
        case, folder, {key: value for name in names for key, value in case.encode(name, case.values).items()}
    )
    weights = list(case.claim(stored, case.config))
    assert sorted(weight.name for weight in weights) == sorted(names)
    claimed = [source for weight in weights for source in weight.sources]
    assert sorted(source.name for source in claimed) == sorted(stored)
    assert all(source is stored[source.name] for source in claimed)
    for weight in weights:
        assert weight.sizes == tuple(case.values.shape)
        assert weight.shape[0] * weight.shape[1] == case.values.size


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
    values = cast(read_rows(_weight(case, folder)), DType.F64)
    encoded = cast(case.values, DType.F64)
    assert values.shape == encoded.shape
    assert float(abs(values - encoded).max()) <= case.tolerance * float(abs(encoded).max())


def reads_any_rows(case: StorageCase, folder: Path) -> None:
    """Any range of rows is that range of the whole."""
    weight = _weight(case, folder)
    rows = weight.shape[0]
    whole = read_block(weight, 0, rows)
    for start in range(rows + 1):
        for stop in {start, start + 1, (start + rows) // 2, rows}:
            assert numpy.array_equal(read_block(weight, start, stop), whole[start:stop]), (start, stop)


def puts_back_the_bytes_it_read(case: StorageCase, folder: Path) -> None:
    """Values that did not change become the bytes that were there."""
    weight = _weight(case, folder)
    written, _ = _put(weight, cast(read_block(weight, 0, weight.shape[0]), DType.F32), [weight.shape[0]])
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
        assert numpy.array_equal(same, rounded), height


def says_what_readers_will_get(case: StorageCase, folder: Path) -> None:
    """`rounded` is what is read from the bytes that were put."""
    weight = _weight(case, folder)
    written, rounded = _put(weight, _changed(weight), [weight.shape[0]])
    again = _reopened(case, folder, weight, written)
    assert numpy.array_equal(read_block(again, 0, again.shape[0]), rounded)


def refuses_rows_that_cannot_be_put_alone(case: StorageCase, folder: Path) -> None:
    """Blocks that begin or end within a group raise ValueError."""
    weight = _weight(case, folder)
    values = _changed(weight)
    rows = weight.shape[0]
    parts = [(1, rows), (0, weight.group + 1)] if weight.group > 1 else []
    for start, stop in parts:
        if start == 0 and stop >= rows:
            continue  # all rows
        try:
            _put_block(weight, values, start, stop)
        except ValueError:
            continue
        raise AssertionError(f"rows {start} to {stop} were put, in groups of {weight.group}")


def leaves_other_weights_alone(case: StorageCase, folder: Path) -> None:
    """Tensors of other storages are not claimed, whatever stands beside them."""
    if set(case.encode(_NAME, case.values)) == {_NAME}:
        return  # the storage of single tensors, which has whatever nothing else claims
    others = {"block.0.linear.bias": numpy.zeros(4), "embed.weight": numpy.zeros((4, 4)), "ids": numpy.arange(3)}
    assert list(case.claim(_stored(case, folder, others), case.config)) == []
    claimed = list(case.claim(_stored(case, folder, {**others, **case.encode(_NAME, case.values)}), case.config))
    assert [weight.name for weight in claimed] == [_NAME]


def refuses_a_weight_of_which_a_tensor_is_missing(case: StorageCase, folder: Path) -> None:
    """A weight without one of its tensors is malformed, or no weight of this storage; it is never read."""
    encoded = case.encode(_NAME, case.values)
    for missing in encoded if len(encoded) > 1 else ():
        rest = _stored(case, folder, {name: tensor for name, tensor in encoded.items() if name != missing})
        try:
            assert list(case.claim(rest, case.config)) == [], missing
        except MalformedError:
            continue


STORAGE_CHECKS: tuple[Callable[[StorageCase, Path], None], ...] = promised(
    "storage",
    _name_of,
    (
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
    ),
)
"""Each takes a case and an empty folder, and raises AssertionError."""


def values_are_what_the_codes_stand_for(case: StorageCase, folder: Path) -> None:
    """Codes and grid of any rows, and of any columns of these, give the values that are read."""
    weight = _quantised(case, folder)
    rows, columns = weight.shape
    whole = read_block(weight, 0, rows)
    for start, stop in {(0, rows), (0, 1), (rows - 1, rows), (rows // 3, rows - rows // 3)}:
        codes, grid = weight.codes(start, stop), weight.grid(start, stop)
        assert codes.shape == (stop - start, columns)
        for first, last in {(0, columns), (0, 1), (columns // 3, columns - 1), (columns - 1, columns)}:
            values = grid.values(codes[:, first:last], first)
            assert values.dtype == numpy.float32
            assert numpy.array_equal(values, whole[start:stop, first:last]), (start, stop, first, last)


def packs_the_codes_it_unpacked(case: StorageCase, folder: Path) -> None:
    """Codes on the stored grid are the stored bytes."""
    weight = _quantised(case, folder)
    rows = weight.shape[0]
    packed = weight.pack(0, weight.codes(0, rows), weight.grid(0, rows))
    for source, raw in zip(weight.sources, _joined(weight, packed), strict=True):
        assert raw == source.file.read(source.offset, source.nbytes), source.name


def takes_the_nearest_code(case: StorageCase, folder: Path) -> None:
    """No other code stands for a number that is nearer to the value, on the stored grid and on one that is fitted."""
    weight = _quantised(case, folder)
    rows, columns = weight.shape
    values = _changed(weight) * numpy.float32(1.3)  # some beyond the ends of the grid
    stored = weight.codes(0, rows)
    for grid in filter(None, (weight.grid(0, rows), weight.fit(0, values))):
        for first, last in ((0, columns), (columns // 3, columns - 1)):
            wanted = cast(values[:, first:last], DType.F64)
            codes = grid.nearest(values[:, first:last], first)
            chosen = abs(cast(grid.values(codes, first), DType.F64) - wanted)
            for code in numpy.unique(numpy.concatenate([stored.ravel(), grid.nearest(values).ravel()])):
                other = abs(cast(grid.values(numpy.full_like(codes, code), first), DType.F64) - wanted)
                slack = 1e-6 * abs(wanted)  # a tie in float32
                assert bool((~numpy.isfinite(other) | (chosen <= other + slack)).all()), code


def reads_back_a_fitted_grid(case: StorageCase, folder: Path) -> None:
    """Scales that are chosen anew stand for, once they are read from a file, what the grid said."""
    weight = _quantised(case, folder)
    values = _changed(weight)
    grid = weight.fit(0, values)
    if grid is None:
        return
    codes = grid.nearest(values)
    again = _reopened(case, folder, weight, _joined(weight, weight.pack(0, codes, grid)))
    assert numpy.array_equal(read_block(again, 0, again.shape[0]), grid.values(codes))
    stored = weight.grid(0, weight.shape[0])
    errors = [float(((each.values(each.nearest(values)) - values) ** 2).mean()) for each in (grid, stored)]
    assert errors[0] <= 1.5 * errors[1], "the scales that are there are better than those that are fitted"


QUANTISED_CHECKS: tuple[Callable[[StorageCase, Path], None], ...] = (
    *STORAGE_CHECKS,
    *promised(
        "storage",
        _name_of,
        (
            values_are_what_the_codes_stand_for,
            packs_the_codes_it_unpacked,
            takes_the_nearest_code,
            reads_back_a_fitted_grid,
        ),
    ),
)
"""For storages that satisfy `surgery_formats.storage.quantised.Quantised`."""


def _stored(case: StorageCase, folder: Path, tensors: Mapping[str, Array]) -> dict[str, StoredTensor]:
    from safetensors.numpy import save_file

    path = folder / "weights.safetensors"
    save_file({name: numpy.asarray(tensor, order="C") for name, tensor in tensors.items()}, path, dict(case.metadata))
    return {tensor.name: tensor for tensor in open_safetensors(path).tensors}


def _weight(case: StorageCase, folder: Path) -> Storage:
    (weight,) = case.claim(_stored(case, folder, case.encode(_NAME, case.values)), case.config)
    return weight


def _quantised(case: StorageCase, folder: Path) -> Quantised:
    weight = _weight(case, folder)
    assert is_quantised(weight), type(weight).__name__
    return weight


def _joined(weight: Storage, packed: Iterable[PartBytes]) -> list[bytearray]:
    data = [bytearray(part.nbytes) for part in weight.parts(weight.name)]
    for piece in packed:
        data[piece.part][piece.offset : piece.offset + len(piece.data)] = piece.data
    return data


def _reopened(case: StorageCase, folder: Path, weight: Storage, written: Iterable[bytes | bytearray]) -> Storage:
    """The weight from a file with these bytes."""
    parts = weight.parts(weight.name)
    header, ranges = layout([(part.name, part.dtype, part.shape) for part in parts], case.metadata)
    data = bytearray(header) + bytearray(sum(size for _, size in ranges.values()))
    for part, raw in zip(parts, written, strict=True):
        offset, size = ranges[part.name]
        data[offset : offset + size] = raw
    path = folder / "again.safetensors"
    path.write_bytes(data)
    (again,) = case.claim({tensor.name: tensor for tensor in open_safetensors(path).tensors}, case.config)
    return again


def _changed(weight: Storage) -> Array:
    """Other values of the same size, as an update leaves them."""
    values = cast(read_block(weight, 0, weight.shape[0]), DType.F32)
    return values * 0.75 + values[::-1] * 0.5


def _heights(rows: int, height: int) -> Iterator[int]:
    for start in range(0, rows, height):
        yield min(height, rows - start)


def _put(weight: Storage, values: Array, heights: Iterable[int]) -> tuple[list[bytearray], Array]:
    """The bytes of every part, and the values they stand for; no byte may be put twice or left out."""
    parts = weight.parts(weight.name)
    data = [bytearray(part.nbytes) for part in parts]
    reached = [0 for _ in parts]
    rounded = empty(weight.shape, weight.dtype)
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


def _put_block(weight: Storage, values: Array, start: int, stop: int) -> tuple[list[tuple[int, int, bytes]], Array]:
    block = numpy.ascontiguousarray(values[start:stop])
    rounded = empty(block.shape, weight.dtype)
    encoded = [(piece.part, piece.offset, bytes(piece.data)) for piece in weight.put(start, block, rounded)]
    return encoded, rounded
