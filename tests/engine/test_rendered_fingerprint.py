# SPDX-License-Identifier: Apache-2.0
"""An adapter that is in no file yet is named by the fingerprint that its file would have."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.engine.adapter_output import WriteOptions, rendered_fingerprint, rendered_size, write_adapter
from surgery_formats.adapters.registry import format_named, read_adapter
from surgery_formats.files.raw import open_file
from surgery_formats.models import identity
from tests.support.kit import make_lora


@pytest.mark.parametrize("sampled", [False, True])
def test_a_rendering_has_the_fingerprint_of_its_file(
    sampled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = format_named("peft")
    rendering = peft.render(read_adapter(make_lora(tmp_path / "lora")), None)
    write_adapter(rendering, peft, "0" * 64, lambda folder: {}, WriteOptions(tmp_path / "out"))
    if sampled:  # as large files are
        for name, value in (("_WHOLE", 64), ("_HEAD", 300), ("_SAMPLE", 16)):
            monkeypatch.setattr(identity, name, value)
    file = open_file(tmp_path / "out" / "adapter_model.safetensors")
    assert rendered_size(rendering) == file.size
    assert rendered_fingerprint(rendering) == identity.fingerprint(file)
