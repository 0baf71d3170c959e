# SPDX-License-Identifier: Apache-2.0
"""One logical weight: a name, the storage that holds it, and the view that finds it there."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

from surgery_formats.arrays import Array, cast, dtype_of
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import Storage, read_block, read_values
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.apply import gather, scatter
from surgery_formats.tensors.tensor import StoredTensor, Tensor
from surgery_formats.tensors.views import View, whole

__all__ = ["Parameter", "Parameters"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A logical weight ``(out, in)``, or bias ``(n, 1)``.

    Attributes:
        name: In its component, as the model's code has it; the stored tensor's, unless several make it.
        storage: The values on disk.
        view: Where in their matrix this weight lies.
        component: Part of a pipeline (``unet``), or empty.
    """

    name: str
    storage: Storage
    view: View
    component: str = ""

    @classmethod
    def of(cls, tensor: Tensor, component: str = "", *, stacked: bool = False) -> Parameter:
        """The whole of one tensor."""
        storage = Plain.of(tensor, stacked=stacked)
        return cls(tensor.name, storage, whole(storage.shape), component)

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.view.shape

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of what its storage holds, as the model's code has it."""
        return self.storage.sizes

    @property
    def numel(self) -> int:
        """Number of elements of what its storage holds."""
        return math.prod(self.storage.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of its stored tensors."""
        return sum(source.nbytes for source in self.storage.sources)

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """Stored tensors this weight is made of."""
        return self.storage.sources

    @property
    def is_whole(self) -> bool:
        """Whether it is all that its storage holds."""
        return math.prod(self.shape) == self.numel

    def get(self, dtype: DType | None = None) -> Array:
        """The whole weight in logical orientation; float32 (float64 where stored so), or `dtype`."""
        rows = self.storage.shape[0]
        return gather(read_values(self.storage, 0, rows, dtype), self.view.locate(0, rows))

    def put(self, weight: Array) -> dict[StoredTensor, bytes]:
        """Bytes of every stored tensor with `weight` in place: ``put(get())`` is the identity."""
        rows = self.storage.shape[0]
        matrix = read_values(self.storage, 0, rows)
        scatter(matrix, self.view.locate(0, rows), cast(weight, dtype_of(matrix)))
        written = self.storage.put(0, matrix, read_block(self.storage, 0, rows))
        return {self.sources[chunk.part]: bytes(chunk.data) for chunk in written}


class Parameters(Mapping[str, Parameter]):
    """Parameters by name, each made when it is first asked for: of most, an operation needs the name alone."""

    def __init__(self, weights: Mapping[str, Storage], make: Callable[[Storage], Parameter]) -> None:
        self._weights, self._make = weights, make
        self._made: dict[str, Parameter] = {}

    def __getitem__(self, name: str) -> Parameter:
        if name not in self._made:
            self._made[name] = self._make(self._weights[name])
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def without(self, names: Container[str]) -> Parameters:
        """All but those that are called `names`."""
        return Parameters({name: w for name, w in self._weights.items() if name not in names}, lambda w: self[w.name])

    def below(self, prefix: str) -> Parameters:
        """Those whose names begin with `prefix`, called by what follows it; each keeps its own name."""
        size = len(prefix)
        return Parameters(
            {n[size:]: w for n, w in self._weights.items() if n.startswith(prefix)}, lambda w: self[w.name]
        )
