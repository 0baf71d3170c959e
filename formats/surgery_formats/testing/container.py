# SPDX-License-Identifier: Apache-2.0
"""What every container must do: checks for a test suite, each of which raises AssertionError.

@pytest.mark.parametrize("check", CONTAINER_CHECKS, ids=lambda check: check.__name__)
def test_the_container_conforms(check, tmp_path):
    check(ContainerCase(MINE, write_mine), tmp_path)
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy

from surgery_formats.arrays import Array, cast
from surgery_formats.containers.base import Container, FileContainer, ShardSet, TensorSpec, WritableContainer
from surgery_formats.containers.weight_files import output_container
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError, SurgeryError
from surgery_formats.tensors.tensor import StoredTensor, as_bytes
from surgery_formats.testing.foreign import foreign_paths
from surgery_formats.testing.promise import promised

__all__ = ["CONTAINER_CHECKS", "TYPES", "ContainerCase"]

TYPES = (DType.F64, DType.F32, DType.F16, DType.BF16, DType.I64, DType.I32, DType.U8, DType.BOOL)
"""Of the tensors that a container is tried with."""

_CUTS = 40
_FLIPS = 300


@dataclass(frozen=True, slots=True)
class ContainerCase:
    """A container under test.

    Attributes:
        container: The object.
        write: Writes tensors into a folder with the format's original program, or at least without `container`, and
            returns the path that `container` opens.
        types: Those of `TYPES` that the format has.
    """

    container: Container
    write: Callable[[Path, Mapping[str, Array]], Path]
    types: tuple[DType, ...] = TYPES

    @property
    def tensors(self) -> dict[str, Array]:
        """Every common type, and every kind of shape."""
        draw = numpy.random.default_rng(0)
        values = draw.standard_normal((7, 5), numpy.float32)
        types = [dtype for dtype in TYPES[:-1] if dtype in self.types]
        tensors = {f"block.{i}.weight": cast(abs(values * 40), dtype) for i, dtype in enumerate(types)}
        if DType.BOOL in self.types:
            tensors["mask"] = values > 0
        return tensors | {
            "scalar": numpy.array(2.5, numpy.float32),
            "vector": values[0].copy(),
            "empty": numpy.zeros((0, 3), numpy.float32),
            "convolution": draw.standard_normal((4, 3, 2, 2), numpy.float32),
            "déjà vu": numpy.ones(3, numpy.float32),
        }


def detects_its_own(case: ContainerCase, folder: Path) -> None:
    """`detect` recognises files of the original program."""
    assert case.container.detect(case.write(folder, case.tensors))


def is_silent_about_foreign_files(case: ContainerCase, folder: Path) -> None:
    """`detect` is False, and raises nothing, for what is missing, empty, garbage or no file at all."""
    suffixes = case.container.suffixes if isinstance(case.container, FileContainer) else (".safetensors.index.json",)
    for path in foreign_paths(folder, ("file", *(f"model{suffix}" for suffix in suffixes))):
        assert case.container.detect(path) is False, path


def opens_what_was_written(case: ContainerCase, folder: Path) -> None:
    """Names, types, shapes and values are those of the file."""
    expected = case.tensors
    opened = _opened(case.container, case.write(folder, expected))
    assert opened.keys() == expected.keys()
    for name, tensor in opened.items():
        _assert_same(tensor, expected[name])


def stays_inside_its_files(case: ContainerCase, folder: Path) -> None:
    """The bytes of every tensor lie in its file, and are as many as its type and shape take."""
    for tensor in _opened(case.container, case.write(folder, case.tensors)).values():
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= tensor.file.size
        assert tensor.strides is not None or tensor.nbytes * 8 == tensor.numel * tensor.dtype.bits


def reads_rows_as_slices(case: ContainerCase, folder: Path) -> None:
    """Rows of a tensor are a slice of the whole."""
    for tensor in _opened(case.container, case.write(folder, case.tensors)).values():
        whole = tensor.read()
        for start, stop in ((0, 1), (1, 3), (2, None), (0, 0)) if tensor.shape else ():
            assert numpy.array_equal(tensor.read(start, stop), whole[start:stop]), tensor.name


def refuses_truncated_files(case: ContainerCase, folder: Path) -> None:
    """A file that is truncated anywhere is malformed."""
    path = case.write(folder, case.tensors)
    for file in _weight_files(case.container, path):
        raw = file.read_bytes()
        for size in {0, 1, 8, *(len(raw) * i // _CUTS for i in range(_CUTS)), len(raw) - 1}:
            file.write_bytes(raw[:size])
            try:
                case.container.open(path)
            except MalformedError:
                continue
            raise AssertionError(f"{file.name}: {size} of {len(raw)} bytes are opened")
        file.write_bytes(raw)


def survives_damage(case: ContainerCase, folder: Path) -> None:
    """A file with a wrong byte is opened or refused: no other error, no tensor beyond its file."""
    path, draw = case.write(folder, case.tensors), random.Random(0)
    for file in _weight_files(case.container, path):
        raw = file.read_bytes()
        for _ in range(_FLIPS):
            damaged = bytearray(raw)
            damaged[draw.randrange(min(len(raw), 4096))] = draw.randrange(256)
            damaged[-1 - draw.randrange(min(len(raw), 1024))] = draw.randrange(256)
            file.write_bytes(damaged)
            with contextlib.suppress(SurgeryError):
                for tensor in _opened(case.container, path).values():
                    assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= tensor.file.size
        file.write_bytes(raw)


def writes_what_it_opens(case: ContainerCase, folder: Path) -> None:
    """A file written by `lay_out` opens with the same contents; a read-only container names one that can be written."""
    container, expected = case.container, case.tensors
    if not isinstance(container, WritableContainer):
        if isinstance(container, FileContainer):
            output_container(container.name)
        else:
            assert container.written_as == container.name
        return
    assert container.written_as == container.name
    specs: list[TensorSpec] = [(name, DType.of(t.dtype), tuple(t.shape)) for name, t in expected.items()]
    (shards,) = container.open(case.write(folder, expected)).values()
    for like, alignment in ((None, 1), (None, 4096), (shards.shards[0], 1)):
        layout = container.lay_out(specs, like, alignment)
        assert layout == container.lay_out(specs, like, alignment)
        begin = min(offset for offset, nbytes in layout.ranges.values() if nbytes)
        assert len(layout.header) <= begin
        assert begin % alignment == 0
        path = folder / f"written{container.suffixes[0]}"
        with open(path, "wb") as file:
            file.write(layout.header)
            file.truncate(layout.nbytes)
            for name, (offset, nbytes) in layout.ranges.items():
                assert offset + nbytes <= layout.nbytes
                file.seek(offset)
                assert file.write(as_bytes(expected[name])) == nbytes
        opened = _opened(container, path)
        assert opened.keys() == expected.keys()
        for name, tensor in opened.items():
            _assert_same(tensor, expected[name])


CONTAINER_CHECKS: tuple[Callable[[ContainerCase, Path], None], ...] = promised(
    "container",
    lambda case: case.container.name,
    (
        detects_its_own,
        is_silent_about_foreign_files,
        opens_what_was_written,
        stays_inside_its_files,
        reads_rows_as_slices,
        refuses_truncated_files,
        survives_damage,
        writes_what_it_opens,
    ),
)


def _opened(container: Container, path: Path) -> dict[str, StoredTensor]:
    """Every tensor of every network."""
    networks: list[ShardSet] = list(container.open(path).values())
    return {name: tensor for network in networks for name, tensor in network.tensors.items()}


def _weight_files(container: Container, path: Path) -> list[Path]:
    return [shard.path for network in container.open(path).values() for shard in network.shards]


def _assert_same(tensor: StoredTensor, expected: Array) -> None:
    assert tensor.dtype.numpy == expected.dtype, tensor.name
    assert tensor.shape == tuple(expected.shape), tensor.name
    assert numpy.array_equal(tensor.read(), expected), tensor.name
