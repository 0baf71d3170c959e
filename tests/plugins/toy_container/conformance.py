# SPDX-License-Identifier: Apache-2.0
"""The container keeps what containers promise: ``pytest conformance.py``, with the package installed."""

import json
import struct

import pytest
from toy_container import TOYZ

from surgery_formats.arrays import dtype_of
from surgery_formats.containers.registry import containers
from surgery_formats.testing.container import CONTAINER_CHECKS, ContainerCase


def write(folder, tensors):
    """As the container's own program would, without the container."""
    entries, data = [], b""
    for name, tensor in tensors.items():
        entries.append([name, dtype_of(tensor).label, list(tensor.shape), len(data)])
        data += tensor.tobytes()
    header = json.dumps({"tensors": entries, "config": {}}).encode()
    path = folder / "model.toyz"
    path.write_bytes(b"TOYZ" + struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize("check", CONTAINER_CHECKS, ids=lambda check: check.__name__)
def test_the_container_conforms(check, tmp_path):
    check(ContainerCase(TOYZ, write), tmp_path)


def test_it_is_registered():
    assert containers()["toyz"] is TOYZ
