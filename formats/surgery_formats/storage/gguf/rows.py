# SPDX-License-Identifier: Apache-2.0
"""The rows of a GGUF's tensor in the order of the model's code, as bytes.

llama.cpp's converter stores the queries and keys of Llama's architecture with the two halves of each head interleaved
(``LlamaModel.permute``). Both orders keep a head's rows together, so whole heads are read and written.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.arrays import Array
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import PartBytes
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

__all__ = ["StoredRows"]


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A stored tensor as rows of bytes.

    Attributes:
        tensor: All of it.
        count: Rows.
        nbytes: Bytes of a row.
        head: Rows of a head whose halves are interleaved; 1 where rows lie in the order of the model's code.
    """

    tensor: StoredTensor
    count: int
    nbytes: int
    head: int = 1

    def read(self, start: int, stop: int) -> Array:
        """Rows ``[start, stop)``, uint8 ``(stop - start, nbytes)``.

        Raises:
            MalformedError: the file ends before.
        """
        first, last = start - start % self.head, min(-(-stop // self.head) * self.head, self.count)
        import numpy as np

        raw = self.tensor.file.read(self.tensor.offset + first * self.nbytes, (last - first) * self.nbytes)
        rows = np.frombuffer(raw, np.uint8).reshape(last - first, self.nbytes)
        if self.head > 1:
            rows = np.ascontiguousarray(rows.reshape(-1, self.head // 2, 2, self.nbytes).swapaxes(1, 2))
        return rows.reshape(last - first, self.nbytes)[start - first : stop - first]

    def written(self, start: int, rows: Array) -> tuple[PartBytes, ...]:
        """The bytes of whole heads from row `start`; `rows` is of any type, ``(n, ...)``."""
        import numpy as np

        if self.head > 1:
            rows = rows.reshape(-1, 2, self.head // 2, *rows.shape[1:]).swapaxes(1, 2)
        return (PartBytes(0, start * self.nbytes, as_bytes(np.ascontiguousarray(rows))),)

    def fault(self, what: str) -> MalformedError:
        """An error about what is stored."""
        return MalformedError(what, file=self.tensor.path, tensor=self.tensor.name)
