# SPDX-License-Identifier: Apache-2.0
"""JSON of strangers: bounded in bytes, depth, digits and number of values, and it means one thing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from surgery_formats.errors import MalformedError
from surgery_formats.files import bounded_json
from surgery_formats.files.bounded_json import CONFIG_LIMIT, parse_object, read_object

HOSTILE = {
    "deep lists": (b'{"a":' + b"[" * 65 + b"]" * 65 + b"}", "nested deeper than 64"),
    "deep objects": (b'{"a":' * 70 + b"1" + b"}" * 70, "nested deeper than 64"),
    "depth beyond the stack": (b'{"a":' + b"[" * 1_000_000, "not JSON"),
    "a key twice": (b'{"a":1,"b":{"c":1,"c":2}}', "'c' appears twice"),
    "a long number": (b'{"a":' + b"9" * 100_000 + b"}", "100000 digits"),
    "a number beyond float64": (b'{"a":1e999}', "does not fit a double"),
    "NaN": (b'{"a":NaN}', "NaN is not JSON"),
    "no object": (b"[1]", "not a JSON object"),
    "no text": (b'{"a":"\xff"}', "not JSON"),
    "something behind": (b'{"a":1}{}', "not JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_hostile_is_refused_at_once(case: str) -> None:
    raw, said = HOSTILE[case]
    begun = time.process_time()
    with pytest.raises(MalformedError, match=said):
        parse_object(raw, file="config.json")
    assert time.process_time() - begun < 2


def test_countless_small_values_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty list is three bytes in the file, and 64 in memory."""
    monkeypatch.setattr(bounded_json, "_OPENINGS", 1000)
    assert len(parse_object(b'{"a":[' + b"[]," * 900 + b"1]}", file="x")["a"]) == 901
    for inner in (b"[],", b'{"":{}},'):
        with pytest.raises(MalformedError, match="more than 1000 lists and objects"):
            parse_object(b'{"a":[' + inner * 1000 + b"1]}", file="x")


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a":1}' + b" " * (CONFIG_LIMIT - 7))
    assert read_object(path) == {"a": 1}
    path.write_bytes(b'{"a":1}' + b" " * (CONFIG_LIMIT - 6))
    with pytest.raises(MalformedError, match="at most"):
        read_object(path)
