# SPDX-License-Identifier: Apache-2.0
"""The dialect keeps what formats promise: ``pytest conformance.py``, with the package installed."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from toy_dialect import TOY_FILE

from surgery_formats.adapters.registry import format_at
from surgery_formats.testing.format import FORMAT_CHECKS, FormatCase


def write(folder):
    """As the format's own program would, without the format."""
    draw = np.random.default_rng(0)
    path = folder / "mine.safetensors"
    tensors = {"layer.q.lora_down.weight": (3, 40), "layer.q.lora_up.weight": (24, 3)}
    factors = {f"toy/{name}": draw.standard_normal(shape, np.float32) for name, shape in tensors.items()}
    save_file({**factors, "toy/layer.q.alpha": np.array(6.0, np.float32)}, path)
    return path


@pytest.mark.parametrize("check", FORMAT_CHECKS, ids=lambda check: check.__name__)
def test_the_dialect_conforms(check, tmp_path):
    check(FormatCase(TOY_FILE, write), tmp_path)


def test_its_files_are_known(tmp_path):
    assert format_at(write(tmp_path)) is TOY_FILE
