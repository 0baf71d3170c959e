# SPDX-License-Identifier: Apache-2.0
"""The first pattern that matches is the one that PEFT finds, whether it was looked up or tried."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from surgery_formats.adapters.peft.patterns import Patterns

paths = st.text("ab.1", min_size=1, max_size=7)
patterns = st.lists(
    st.one_of(paths, st.text("ab.1[]()*+", min_size=1, max_size=6).filter(lambda p: _valid(p))), max_size=8
)


def _valid(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@given(patterns, paths)
def test_as_peft_does(some: list[str], path: str) -> None:
    found = Patterns(some).first(path, lambda pattern: re.match(rf"(.*\.)?({pattern})$", path) is not None)
    theirs = get_pattern_key(some, path)  # the path itself if none matches
    assert found == theirs or (found is None and theirs == path)


def test_a_dot_matches_anything_and_the_first_counts() -> None:
    plain = Patterns(["layers.1.q", "q", "layersx1.q", r"^model\.k"])

    def never(pattern: str) -> bool:
        raise AssertionError(pattern)

    assert plain.first("model.layers.1.q", never) == "layers.1.q"
    assert plain.first("model.layers.1xq", never) == "layers.1.q"
    assert plain.first("model.layers.2.q", never) == "q"
    assert plain.first("model.layers.2.k", never) is None
    assert plain.first("model.k", never) == r"^model\.k"
    assert plain.first("a.model.k", never) is None
    assert plain.first("modelxk", never) is None
