# SPDX-License-Identifier: Apache-2.0
"""A container for ``.toyz`` files: a magic, the length of a JSON header, the header, then raw little-endian data."""

import json
import math
from dataclasses import dataclass

from surgery_formats.containers.base import FileLayout, Shard, one_file, stored_tensors
from surgery_formats.errors import MalformedError, SurgeryError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.files.raw import open_file

MAGIC = b"TOYZ"
BEGIN = len(MAGIC) + 8  # of the header, which its length precedes


@dataclass(frozen=True)
class Toyz:
    name: str = "toyz"
    title: str = "model.toyz: a JSON header and raw data"
    written_as: str = "toyz"
    suffixes: tuple[str, ...] = (".toyz",)

    def detect(self, path):
        try:
            return open_file(path).read(0, len(MAGIC)) == MAGIC
        except SurgeryError:  # not a file, or a shorter one
            return False

    def open(self, path):
        file = open_file(path)
        length = int.from_bytes(file.read(len(MAGIC), 8), "little")
        if file.read(0, len(MAGIC)) != MAGIC or length > file.size - BEGIN:
            raise MalformedError("not a toyz file", file=path)
        header = parse_object(file.read(BEGIN, length), file=path)
        tensors, config = header.get("tensors"), header.get("config")
        if header.keys() != {"tensors", "config"} or not isinstance(tensors, list) or not isinstance(config, dict):
            raise MalformedError("its header does not hold tensors and a config", file=path)
        if not all(isinstance(entry, list) and len(entry) == 4 for entry in tensors):
            raise MalformedError("a tensor is not [name, dtype, shape, offset]", file=path)
        return one_file(Shard(path, self.name, file, stored_tensors(file, tensors, BEGIN + length)), config)

    def lay_out(self, tensors, like=None, alignment=1):
        entries, ranges, at = [], {}, 0
        for name, dtype, shape in tensors:
            nbytes = math.prod(shape) * dtype.bits // 8
            entries.append([name, dtype.label, shape, at])
            ranges[name] = at, nbytes
            at += nbytes
        header = json.dumps({"tensors": entries, "config": {}}).encode()
        header += b" " * (-(BEGIN + len(header)) % alignment)
        begin = BEGIN + len(header)
        moved = {name: (begin + offset, nbytes) for name, (offset, nbytes) in ranges.items()}
        return FileLayout(MAGIC + len(header).to_bytes(8, "little") + header, moved, begin + at)


TOYZ = Toyz()
