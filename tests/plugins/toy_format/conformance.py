# SPDX-License-Identifier: Apache-2.0
"""The format keeps what formats promise: ``pytest conformance.py``, with the package installed."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from toy_format import TOY

from surgery_formats.adapters.registry import format_at
from surgery_formats.testing.format import FORMAT_CHECKS, FormatCase


def write(folder):
    """As the format's own program would, without the format."""
    draw = np.random.default_rng(0)
    path = folder / "mine"
    path.mkdir(exist_ok=True)
    shapes = {"layer.q:down": (3, 40), "layer.q:up": (24, 3)}
    save_file({n: draw.standard_normal(s, np.float32) for n, s in shapes.items()}, path / "toy.safetensors")
    (path / "toy.json").write_text('{"toy": "base"}')
    return path


@pytest.mark.parametrize("check", FORMAT_CHECKS, ids=lambda check: check.__name__)
def test_the_format_conforms(check, tmp_path):
    check(FormatCase(TOY, write), tmp_path)


def test_its_folders_are_known(tmp_path):
    assert format_at(write(tmp_path)) is TOY
