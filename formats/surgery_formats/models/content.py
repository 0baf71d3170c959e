# SPDX-License-Identifier: Apache-2.0
"""What a model or adapter holds, as one hash: the same for the same tensors, in whatever files, order and container.

It is the Merkle tree of RFC 6962 (certificate transparency) with sha256, over a leaf for each tensor in the order of names
(of code points)::

    leaf   sha256(00 || JSON of [name, dtype, shape, sha256 of the bytes in C order])
    node   sha256(01 || left || right)     the left side has the greatest power of two of leaves that leaves some to the right

The JSON has no spaces, and escapes with four hexadecimal digits for what is not ASCII, as Python writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery_formats.errors import FitError
from surgery_formats.files.output.hashing import hash_threads
from surgery_formats.tensors.tensor import StoredTensor, Tensor, as_bytes

__all__ = ["TensorContent", "content_of", "merkle_root"]


@dataclass(frozen=True, slots=True)
class TensorContent:
    """What identifies a tensor.

    Attributes:
        dtype: Name of its type.
        shape: Sizes.
        sha256: Of its bytes in C order, in hexadecimal.
        nbytes: Their number.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    nbytes: int

    def leaf(self, name: str) -> bytes:
        """The hash of the tensor under this name."""
        text = json.dumps([name, self.dtype, list(self.shape), self.sha256], separators=(",", ":"))
        return hashlib.sha256(b"\0" + text.encode()).digest()

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}


def content_of(
    tensors: Mapping[str, Tensor], read: Callable[[int], None] = lambda nbytes: None
) -> dict[str, TensorContent]:
    """The content of every tensor, in the order of names; a thread per core hashes, and `read` is told of their bytes.

    Raises:
        InputError: a file is shorter than its header says.
        FitError: values that are stored nowhere, and cannot be read.
    """

    def one(tensor: Tensor) -> TensorContent:
        digest = _digest(tensor)
        read(tensor.nbytes)
        return TensorContent(tensor.stored_type, tuple(tensor.shape), digest, tensor.nbytes)

    names = sorted(tensors)
    with hash_threads() as threads:
        try:
            return dict(zip(names, threads.map(one, [tensors[name] for name in names]), strict=True))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _digest(tensor: Tensor) -> str:
    state = hashlib.sha256()
    if isinstance(tensor, StoredTensor) and tensor.strides is None:
        for block in tensor.file.blocks(tensor.offset, tensor.nbytes, 1 << 20):
            state.update(block)
        return state.hexdigest()
    values = tensor.read()
    if not hasattr(values, "tobytes"):
        raise FitError("its values cannot be read", file=tensor.path, tensor=tensor.name)
    import numpy

    state.update(as_bytes(numpy.ascontiguousarray(values)))
    return state.hexdigest()


def merkle_root(leaves: Sequence[bytes]) -> str:
    """The root of the tree in hexadecimal; of no leaves, sha256 of nothing."""
    if not leaves:
        return hashlib.sha256().hexdigest()
    level: Iterable[bytes] = leaves
    nodes = list(level)
    # Pairs from the left, and a last one without a partner goes up as it is: the same tree as the recursive definition.
    while len(nodes) > 1:
        pairs = [hashlib.sha256(b"\1" + a + b).digest() for a, b in zip(nodes[::2], nodes[1::2], strict=False)]
        nodes = pairs + (nodes[-1:] if len(nodes) % 2 else [])
    return nodes[0].hex()
