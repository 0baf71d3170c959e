# SPDX-License-Identifier: Apache-2.0
"""Checks that several verbs share name what is wrong and what to do about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from surgery.engine.input_checks import check_nothing_dropped, float_type
from surgery_formats.adapters.format import Entry, Rendering
from surgery_formats.canonical.consumption import check_consumed
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from tests.support.toy_kinds import adapter_of, gained_lora


def test_dtype_options_name_floating_point_types() -> None:
    assert float_type("keep") is None
    assert float_type("bf16") is DType.BF16
    with pytest.raises(FitError, match="no type 'bf17'"):
        float_type("bf17")
    with pytest.raises(FitError, match="weights cannot be stored as I8"):
        float_type("i8", "weights")


def _told(*reasons: str) -> FitError:
    entries = [Entry("kept", "exact"), *(Entry(f"site{n}", "dropped", why) for n, why in enumerate(reasons))]
    rendering = Rendering("a.safetensors", (), entries=tuple(entries))
    with pytest.raises(FitError) as caught:
        check_nothing_dropped(rendering, "mlx", Path("lora"), "do that", base=None)
    assert caught.value.file == "lora"
    kept = Rendering("a.safetensors", (), entries=tuple(entries[:1]))
    check_nothing_dropped(kept, "mlx", Path("lora"), None, base=None)
    return caught.value


def test_dropped_parts_are_counted_and_three_reasons_are_named() -> None:
    error = _told(*(f"why {n}" for n in range(5)))
    assert error.message == (
        "mlx cannot hold 5 of 6 parts: 'site0' (why 0); 'site1' (why 1); 'site2' (why 2); and 2 more"
    )
    assert error.hint == "do that"


def test_a_reason_is_given_once() -> None:
    error = _told("no", "no", "never", "no", "no")
    assert error.message == "mlx cannot hold 5 of 6 parts: 'site0', 'site1', 'site3' and 1 more (no); 'site2' (never)"


def test_a_base_is_asked_for_where_it_is_what_is_missing() -> None:
    assert _told("only the base can tell its dots").hint == "give the base with `base=`"


@pytest.mark.parametrize("error", [FitError, ProofError])
def test_tensors_that_no_update_uses_are_named(tmp_path: Path, error: type[FitError | ProofError]) -> None:
    toy = gained_lora(tmp_path / "a.safetensors")
    whole = adapter_of(toy)
    check_consumed(whole, error)
    with pytest.raises(error, match="3 of 3 tensors are not used by any update: A, B, gain"):
        check_consumed(replace(whole, updates={}), error)
