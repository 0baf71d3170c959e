# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter that a format has rendered: all or nothing, rounded once, read back before it appears."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy

from surgery._version import __version__
from surgery.engine.recorded import recorded_recipe
from surgery.progress import Callback, Progress
from surgery_formats.adapters.format import Format, Moved, NewTensor, Rendering
from surgery_formats.adapters.packing import PackedFile
from surgery_formats.arrays import Array, all_finite, cast
from surgery_formats.containers.weight_files import is_weight_file
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError, SurgeryError, UsageError
from surgery_formats.files.output.folder import SIGNED, OutputFolder, output_folder
from surgery_formats.files.output.single import check_single, write_single
from surgery_formats.files.output.staging import check_folder
from surgery_formats.files.raw import File
from surgery_formats.models.identity import fingerprint, fingerprint_of
from surgery_formats.tensors.tensor import as_bytes
from surgery_formats.text import show

__all__ = [
    "Prove",
    "WriteOptions",
    "check_adapter_output",
    "job_id",
    "put_adapter",
    "rendered_fingerprint",
    "rendered_size",
    "stored_as",
    "write_adapter",
]

_LARGEST_BUFFER = 16 << 20
"""Bytes. What is larger gets memory of its own, for as long as it is written."""

Put = Callable[[bytes | memoryview, int], None]
Confirm = Callable[[memoryview, int, File, int], None]
"""Reads back bytes of an output, by their offset, that were read from a file, at an offset there; raises if they differ."""
Prove = Callable[[Path], Mapping[str, Any]]
"""Reads back what lies at a path, raises if it is not what was meant, and returns the manifest's facts."""


@dataclass(frozen=True)
class WriteOptions:
    """Where and how an adapter is written; none of it changes what is written.

    Attributes:
        output: File or folder to make. Must not exist unless `overwrite`; its parent must.
        inputs: What is read; the output may not be one of them.
        side_files: Copied into a folder, by name.
        overwrite: Replace what is there, atomically.
        progress: Called with every tensor.
        threads: Threads that compute tensors, for a rendering whose tensors do not share what they are computed from.
        last: Called before the output appears, to write what it belongs to.
    """

    output: Path
    inputs: tuple[Path, ...] = ()
    side_files: Mapping[str, Path] = field(default_factory=dict)
    overwrite: bool = False
    progress: Callback | None = None
    threads: int = 1
    last: Callable[[], object] | None = None


def stored_as(rendering: Rendering, dtype: DType | None) -> Rendering:
    """`rendering` with its matrices stored as `dtype`.

    Scalars (kohya's alpha) keep theirs: rounding one would change every delta.
    """
    if dtype is None:
        return rendering
    cast = (replace(t, dtype=dtype) if t.shape and t.dtype.is_float else t for t in rendering.tensors)
    return replace(rendering, tensors=tuple(cast))


def job_id(facts: Mapping[str, Any], inputs: Iterable[File | str], rendering: Rendering) -> str:
    """Names a job by the contents of its inputs (files, or fingerprints), in their order, its options and what it will write."""
    small = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(rendering.small_files.items())}
    tensors = [(tensor.name, tensor.dtype.label, tensor.shape) for tensor in rendering.tensors]
    prints = [entry if isinstance(entry, str) else fingerprint(entry) for entry in inputs]
    whole = [__version__, dict(facts), small, dict(rendering.metadata), tensors, prints]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def check_adapter_output(target: Format, output: Path, inputs: tuple[Path, ...], *, overwrite: bool) -> None:
    """Refuse an output that `write_adapter` could not write, before hours are spent on it; nothing is touched.

    Raises:
        NotFoundError, UsageError, FitError, OutputExistsError: as `write_adapter`.
    """
    if target.single_file:
        check_single(output, overwrite=overwrite, inputs=inputs)
    else:
        check_folder(output, overwrite=overwrite, inputs=inputs)


def write_adapter(rendering: Rendering, target: Format, job: str, prove: Prove, options: WriteOptions) -> Path:
    """Write `rendering` as a file or folder.

    Args:
        rendering: What to write.
        target: Its format.
        job: See `job_id`.
        prove: Called before the output appears.
        options: Where and how.

    Returns:
        The output.

    Raises:
        FitError: a value does not fit its type.
        UsageError: the name of a file does not end as its format wants it.
        ProofError: as `prove`.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    output = options.output
    content = _TensorFile.of(rendering, output if target.single_file else output / rendering.tensor_file)

    def proved(path: Path) -> Mapping[str, Any]:
        try:
            facts = prove(path)
        except SurgeryError as error:  # nobody knows the hidden file or folder, which is gone when this is read
            if error.file is not None:
                error.file = error.file.replace(str(path), str(output)).replace(path.name, output.name)
            raise
        if options.last is not None:
            options.last()
        return facts

    if target.single_file:
        suffix = Path(rendering.tensor_file).suffix
        if output.suffix != suffix:
            named = output.with_suffix(suffix) if is_weight_file(output.name) else Path(f"{output}{suffix}")
            raise UsageError(f"the name must end in {suffix}", file=output, hint=f"write to {show(named, 200)}")
        return write_single(
            output,
            job,
            content.size,
            lambda file: content.fill(file.pwrite, options.threads, options.progress, file.confirm),
            overwrite=options.overwrite,
            inputs=options.inputs,
            prove=lambda path: (proved(path), None)[1],
        )
    with output_folder(output, job, overwrite=options.overwrite, inputs=options.inputs, hashes=SIGNED) as folder:
        for name, path in options.side_files.items():
            if name not in rendering.small_files:
                folder.write_small(name, path.read_bytes())
        put_adapter(rendering, folder, threads=options.threads, progress=options.progress)
        folder.commit({**proved(folder.staged), "version": __version__} | recorded_recipe())
    return output


def put_adapter(
    rendering: Rendering, folder: OutputFolder, within: str = "", threads: int = 1, progress: Callback | None = None
) -> int:
    """Write the files of `rendering` into a staged folder, or into the folder `within` it; returns the bytes of weights.

    Raises:
        FitError, ResourceError: as `write_adapter`.
    """
    content = _TensorFile.of(rendering, folder.shown / (within + rendering.tensor_file))
    for name, data in rendering.small_files.items():
        folder.write_small(within + name, data)
    file = folder.create(within + rendering.tensor_file, content.size)
    content.fill(file.pwrite, threads, progress)
    file.finish({})
    return content.size


@dataclass(frozen=True)
class _TensorFile:
    """The file of weights of a rendering.

    Attributes:
        packed: Its plan.
        tensors: By name.
        path: What messages call it.
    """

    packed: PackedFile
    tensors: Mapping[str, NewTensor]
    path: Path

    @classmethod
    def of(cls, rendering: Rendering, path: Path | None = None) -> _TensorFile:
        """The file that `rendering` will be at `path`."""
        specs = [(tensor.name, tensor.dtype, tensor.shape) for tensor in rendering.tensors]
        tensors = {tensor.name: tensor for tensor in rendering.tensors}
        return cls(rendering.packing(specs, rendering.metadata), tensors, path or Path(rendering.tensor_file))

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return self.packed.nbytes

    def fill(
        self, put: Put, threads: int = 1, progress: Callback | None = None, confirm: Confirm | None = None
    ) -> None:
        """Hand all bytes to `put`, and to `confirm` those that were moved, when they are written."""
        from surgery_formats.threads import one_thread

        # For hundreds of small tensors a team of threads costs more than it does.
        with one_thread(), ThreadPoolExecutor(threads, "surgery-tensors") as pool:
            line = _Line(self, pool, threads, confirm)
            done = 0
            for offset, data in self.packed.pieces(line.tensors()):
                put(data, offset)
                line.written(offset)
                done += len(data)
                if progress is not None and offset:
                    progress(Progress(min(done, self.size), self.size, "writing"))
            line.finish()

    def order(self) -> Iterable[str]:
        """Names as they are made: as they lie, or those one after the other that are solved for at once."""
        if not self.packed.in_any_order:
            return self.packed.ranges
        groups: dict[tuple[bool, str], list[str]] = {}
        for name in self.packed.ranges:
            together = self.tensors[name].made_with
            groups.setdefault((bool(together), together or name), []).append(name)
        return chain.from_iterable(groups.values())

    def bytes_of(self, name: str) -> memoryview:
        """The bytes of one tensor, computed now."""
        return as_bytes(_rounded(self.tensors[name], self.path))

    def moved(self, name: str, buffer: Array) -> memoryview | None:
        """The bytes of one tensor in `buffer`, if they are those of stored ones and all its numbers are finite.

        They are checked where they lie: fresh memory for each tensor would cost as much as copying it.
        """
        tensor, nbytes = self.tensors[name], self.packed.ranges[name][1]
        if not isinstance(tensor.load, Moved):
            return None
        sources = tensor.load.tensors
        alike = all(source.dtype is tensor.dtype for source in sources)
        if not alike or sum(source.nbytes for source in sources) != nbytes or tensor.dtype.bits < 8:
            return None
        if nbytes > len(buffer):
            return None
        view, at = memoryview(buffer)[:nbytes], 0
        for source in sources:
            source.file.read_into(view[at : at + source.nbytes], source.offset)
            at += source.nbytes
        return view if all_finite(buffer[:nbytes].view(tensor.dtype.numpy)) else None

    def largest_moved(self) -> int:
        """Bytes of the largest tensor that is moved through a buffer."""
        sizes = (self.packed.ranges[name][1] for name, t in self.tensors.items() if isinstance(t.load, Moved))
        return max((size for size in sizes if size <= _LARGEST_BUFFER), default=0)

    def read(self, offset: int, nbytes: int) -> bytearray:
        """Bytes as they will lie in the file; computes the tensors that they are of."""
        window = bytearray(nbytes)

        def copy(start: int, data: bytes | memoryview) -> None:
            low, high = max(start, offset), min(start + len(data), offset + nbytes)
            if low >= high:
                return
            window[low - offset : high - offset] = data[low - start : high - start]

        needed = (
            name
            for name, (start, size) in self.packed.ranges.items()
            if self.packed.before is not None or (start < offset + nbytes and offset < start + size)
        )
        for start, data in self.packed.pieces((name, self.bytes_of(name)) for name in needed):
            copy(start, data)
        return window


class _Line:
    """The tensors of a file on their way to it: made a few at a time, written one by one, and looked at once written."""

    def __init__(self, content: _TensorFile, pool: ThreadPoolExecutor, threads: int, confirm: Confirm | None) -> None:
        self._content = content
        self._pool = pool
        self._confirm = confirm
        self._ahead = 2 * threads  # one would have the maker wait for the writer after each tensor
        self._buffers = [numpy.empty(content.largest_moved(), numpy.uint8) for _ in range(self._ahead + 1)]
        self._moved: dict[int, tuple[int, memoryview, Moved]] = {}  # by offset: buffer, bytes, where they are from
        self._looks: dict[int, Future[None]] = {}  # by buffer

    def tensors(self) -> Iterator[tuple[str, memoryview]]:
        """All of the file, each until the next is asked for."""
        made: deque[Future[tuple[str, memoryview]]] = deque()
        for number, name in enumerate(self._content.order()):
            made.append(self._pool.submit(self._make, number % len(self._buffers), name))
            if len(made) > self._ahead:
                yield made.popleft().result()
        for done in made:
            yield done.result()

    def _make(self, buffer: int, name: str) -> tuple[str, memoryview]:
        if buffer in self._looks:
            self._looks[buffer].result()
        data, load = self._content.moved(name, self._buffers[buffer]), self._content.tensors[name].load
        if data is None or not isinstance(load, Moved):
            return name, self._content.bytes_of(name)
        self._moved[self._content.packed.ranges[name][0]] = buffer, data, load
        return name, data

    def written(self, offset: int) -> None:
        """The piece at `offset` is in the file; bytes that were moved are looked at beside what follows."""
        if self._confirm is not None and offset in self._moved:
            buffer, data, load = self._moved.pop(offset)
            self._looks[buffer] = self._pool.submit(self._look, self._confirm, offset, data, load)

    def _look(self, confirm: Confirm, offset: int, data: memoryview, load: Moved) -> None:
        at = 0
        for source in load.tensors:
            confirm(data[at : at + source.nbytes], offset + at, source.file, source.offset)
            at += source.nbytes

    def finish(self) -> None:
        """All was written; raises what was found."""
        for look in self._looks.values():
            look.result()


def rendered_size(rendering: Rendering) -> int:
    """Bytes of the tensor file that `rendering` will be."""
    return _TensorFile.of(rendering).size


def rendered_fingerprint(rendering: Rendering) -> str:
    """`fingerprint` of the tensor file that `rendering` would be: it names an adapter that is in no file yet."""
    file = _TensorFile.of(rendering)
    return fingerprint_of(file.size, lambda offset, nbytes: [file.read(offset, nbytes)])


def _rounded(tensor: NewTensor, file: Path) -> Array:
    """The tensor's values, rounded once; `file` is what messages call the file that they are for.

    Raises:
        FitError: a value is too large for the stored type, or no number.
    """
    values = tensor.load()
    if tuple(values.shape) != tensor.shape:
        raise ProofError(f"made with shape {list(values.shape)} instead of {list(tensor.shape)}", tensor=tensor.name)
    stored = cast(values, tensor.dtype).reshape(-1)
    if tensor.dtype.is_float and not all_finite(stored):
        if not all_finite(values):
            what, hint = "holds NaN or Inf", "the weights that it is made of are damaged, or their scale is too large"
        else:
            what = f"a value is too large for {tensor.dtype.label}"
            hint = "lower its scale" if tensor.dtype is DType.F32 else "store it as bf16 or fp32"
        raise FitError(what, file=file, tensor=tensor.name, hint=hint)
    return stored
