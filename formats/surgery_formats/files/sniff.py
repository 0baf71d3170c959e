# SPDX-License-Identifier: Apache-2.0
"""Recognise a file by its first bytes, so that an error can be more specific than "malformed"."""

from __future__ import annotations

from surgery_formats.files.raw import File

__all__ = ["hint_for"]

_MAGIC = (
    (b"version https://git-lfs", "this is a Git LFS pointer, not the weights: run 'git lfs pull'"),
    (b"PK\x03\x04", "this is a zip archive, as torch.save writes: name it .bin, .pt, .pth or .ckpt"),
    (b"\x80", "this looks like a pickle: name it .bin, .pt, .pth or .ckpt"),
    (b"GGUF", "this is a GGUF file"),
    (b"\x93NUMPY", "this is a numpy array"),
    (b"\x89HDF", "this is an HDF5 file"),
    (b"7z\xbc\xaf\x27\x1c", "this is a 7z archive"),
    (b"\x1f\x8b", "this is a gzip archive: unpack it first"),
    (b"<", "this looks like a web page: download the file again"),
)


def hint_for(file: File) -> str | None:
    """Describe `file` if its content differs from what its name suggests; None if it is not recognised."""
    head = bytes(file.read(0, min(file.size, 32)))
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= file.size - 8:
        return "this looks like a safetensors file: name it .safetensors"
    return next((hint for magic, hint in _MAGIC if head.startswith(magic)), None)
