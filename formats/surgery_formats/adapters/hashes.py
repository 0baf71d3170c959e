# SPDX-License-Identifier: Apache-2.0
"""The hashes of its tensors that a file of sd-scripts has in its header, as sd-scripts works them out.

Sources: sd-scripts, ``library/train_util.py`` (``precalculate_safetensors_hashes``, ``addnet_hash_legacy``) and
``library/sai_model_spec.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

from surgery_formats.containers.base import TensorSpec

__all__ = ["HASHES", "FileHashes"]

HASHES: Mapping[str, str] = {
    "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "0" * 8,
    "modelspec.hash_sha256": "0x" + "0" * 64,
}
"""The fields, each with a value as long as all that it can have: a header's length is fixed before the tensors are known."""

_BEGIN, _NBYTES = 0x100000, 0x10000  # what the first program of its kind took of a file


class FileHashes:
    """Takes the bytes of a file's tensors in their order, and tells its hashes.

    The old hash is of bytes at a fixed place in a file whose header has the fields ``ss_`` and no others.
    """

    def __init__(self, tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """For a file of `tensors`, in the order given, with free strings `metadata`."""
        self._first = tensors[0][0] if tensors else ""
        self._header = 8 + _header_nbytes(tensors, metadata)
        self._begin()

    def _begin(self) -> None:
        self._whole, self._old = hashlib.sha256(), hashlib.sha256()
        self._at = self._header

    def update(self, name: str, data: bytes | memoryview) -> None:
        """The bytes of the next tensor; the first one begins anew."""
        if name == self._first:
            self._begin()
        self._whole.update(data)
        low, high = (min(max(end - self._at, 0), len(data)) for end in (_BEGIN, _BEGIN + _NBYTES))
        self._old.update(memoryview(data)[low:high])
        self._at += len(data)

    def values(self) -> dict[str, str]:
        """All fields."""
        whole = self._whole.hexdigest()
        return dict(zip(HASHES, (whole, self._old.hexdigest()[:8], f"0x{whole}"), strict=True))


def _header_nbytes(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> int:
    """The length of the header that the reference implementation writes, whose strings are UTF-8."""
    header: dict[str, object] = {"__metadata__": {k: v for k, v in metadata.items() if k.startswith("ss_")}}
    at = 0
    for name, dtype, shape in tensors:
        nbytes = dtype.nbytes(math.prod(shape))
        header[name] = {"dtype": dtype.label, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return length + -length % 8
