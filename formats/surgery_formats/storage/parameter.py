# SPDX-License-Identifier: Apache-2.0
"""One logical weight: a name, the storage that holds it, and the view that finds it there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.apply import gather, scatter
from surgery_formats.tensors.tensor import StoredTensor, Tensor
from surgery_formats.tensors.views import View, whole

if TYPE_CHECKING:
    import torch

__all__ = ["Parameter"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A logical weight ``(out, in)``, or bias ``(n, 1)``.

    Attributes:
        name: The stored tensor's name in its component.
        storage: The matrix on disk.
        view: Where in that matrix this weight lies.
        component: Part of a pipeline (``unet``), or empty.
    """

    name: str
    storage: Plain
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
    def sources(self) -> tuple[StoredTensor, ...]:
        """Stored tensors this weight is made of."""
        return self.storage.sources

    def get(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole weight in logical orientation; float32 (float64 where stored so), or `dtype`."""
        matrix = self.storage.get(0, self.storage.shape[0], dtype)
        at = self.view.locate(0, self.storage.shape[0])
        return gather(matrix, at)

    def put(self, weight: torch.Tensor) -> dict[StoredTensor, bytes]:
        """Bytes of every stored tensor with `weight` in place: ``put(get())`` is the identity."""
        matrix = self.storage.get(0, self.storage.shape[0])
        at = self.view.locate(0, self.storage.shape[0])
        scatter(matrix, at, weight.to(matrix.dtype))
        (stored,) = self.sources
        return {stored: bytes(self.storage.put(0, matrix)[1])}
