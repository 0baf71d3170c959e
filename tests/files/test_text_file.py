# SPDX-License-Identifier: Apache-2.0
"""A text is UTF-8 wherever one is given: bytes of anything else are not measured as if somebody had written them."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.onnx.run.text_rows import rows_of_text
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.text_file import read_text_file

BASE = Path("examples/base")


@pytest.mark.parametrize(
    ("data", "limit", "text"),
    [
        ("naïve".encode(), None, ("naïve", False)),
        ("naïve".encode(), 3, ("na", True)),
        ("naïve".encode(), 4, ("naï", True)),
        (b"a\r\nb", 100, ("a\r\nb", False)),
    ],
)
def test_a_limit_keeps_whole_characters(tmp_path: Path, data: bytes, limit: int | None, text: tuple[str, bool]) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    read, limited = read_text_file(tmp_path / "a.txt", limit)
    assert (read.decode(), limited) == text


def test_logits_are_measured_on_texts_alone(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="not a text in UTF-8"):
        rows_of_text(BASE, BASE / "model.safetensors", 1536, 0)
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(FitError, match="there is no text in it; give a file that has one"):
        rows_of_text(BASE, tmp_path / "blank.txt", 1536, 0)
    assert len(rows_of_text(BASE, "examples/heldout/target.txt", 1536, 0)) == 8
